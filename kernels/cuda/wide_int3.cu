#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_int3(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<IntCodes<3>>(params, stream); }

}  // namespace hfq
