#include "linear_w8a8_kernel.h"

namespace hfq {

const char* launch_fp8(const W8A8Params& params, cudaStream_t stream) { return launch_w8a8_of<E4M3>(params, stream); }

const char* launch_fp8_experts(const W8A8ExpertsParams& params, cudaStream_t stream) { return launch_w8a8_experts_of<E4M3>(params, stream); }

}  // namespace hfq
