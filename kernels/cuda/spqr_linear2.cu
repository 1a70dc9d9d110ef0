#include "spqr_linear_kernel.h"

namespace hfq {

const char* launch_spqr_linear2(const SpqrLinearParams& params, cudaStream_t stream) { return launch_spqr_linear_of<2>(params, stream); }

}  // namespace hfq
