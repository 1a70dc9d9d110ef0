#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_e4m3(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<E4m3Codes>(params, stream); }

}  // namespace hfq
