#include "spqr_linear_kernel.h"

namespace hfq {

const char* launch_spqr_experts2(const SpqrExpertsParams& params, cudaStream_t stream) { return launch_spqr_experts_of<2>(params, stream); }

}  // namespace hfq
