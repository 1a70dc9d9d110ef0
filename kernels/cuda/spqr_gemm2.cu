#include "spqr_gemm_kernel.h"

namespace hfq {

const char* launch_spqr_gemm2(const SpqrGemmParams& params, cudaStream_t stream) { return launch_spqr_gemm_of<2>(params, stream); }

}  // namespace hfq
