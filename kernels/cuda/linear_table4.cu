#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_table4(const LinearParams& params, cudaStream_t stream) { return launch_linear_of<TableCodes>(params, stream); }

}  // namespace hfq
