#include "gemm_kernel.h"

namespace hfq {

const char* launch_gemm_int4(const GemmParams& params, cudaStream_t stream) { return launch_gemm_of<IntCodes<4>>(params, stream); }

}  // namespace hfq
