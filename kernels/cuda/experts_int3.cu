#include "experts_kernel.h"

namespace hfq {

const char* launch_experts_int3(const ExpertsParams& params, cudaStream_t stream) { return launch_experts_of<IntCodes<3>>(params, stream); }

}  // namespace hfq
