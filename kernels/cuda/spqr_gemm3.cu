#include "spqr_gemm_kernel.h"

namespace hfq {

const char* launch_spqr_gemm3(const SpqrGemmParams& params, cudaStream_t stream) { return launch_spqr_gemm_of<3>(params, stream); }

}  // namespace hfq
