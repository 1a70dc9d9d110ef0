#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_table4(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<TableCodes>(params, stream); }

}  // namespace hfq
