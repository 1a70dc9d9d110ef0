#include "gemm_kernel.h"

namespace hfq {

const char* launch_gemm_table4(const GemmParams& params, cudaStream_t stream) { return launch_gemm_of<TableCodes>(params, stream); }

}  // namespace hfq
