#include "experts_kernel.h"

namespace hfq {

const char* launch_experts_e4m3(const ExpertsParams& params, cudaStream_t stream) { return launch_experts_of<E4m3Codes>(params, stream); }

}  // namespace hfq
