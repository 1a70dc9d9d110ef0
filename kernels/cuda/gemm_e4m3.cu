#include "gemm_kernel.h"

namespace hfq {

const char* launch_gemm_e4m3(const GemmParams& params, cudaStream_t stream) { return launch_gemm_of<E4m3Codes>(params, stream); }

}  // namespace hfq
