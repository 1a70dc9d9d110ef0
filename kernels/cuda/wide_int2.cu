#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_int2(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<IntCodes<2>>(params, stream); }

}  // namespace hfq
