#include "experts_kernel.h"

namespace hfq {

const char* launch_experts_int8(const ExpertsParams& params, cudaStream_t stream) { return launch_experts_of<IntCodes<8>>(params, stream); }

}  // namespace hfq
