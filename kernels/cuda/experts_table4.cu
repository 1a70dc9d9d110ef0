#include "experts_kernel.h"

namespace hfq {

const char* launch_experts_table4(const ExpertsParams& params, cudaStream_t stream) { return launch_experts_of<TableCodes>(params, stream); }

}  // namespace hfq
