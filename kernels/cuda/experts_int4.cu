#include "experts_kernel.h"

namespace hfq {

const char* launch_experts_int4(const ExpertsParams& params, cudaStream_t stream) { return launch_experts_of<IntCodes<4>>(params, stream); }

}  // namespace hfq
