#include "wide_kernel.h"

namespace hfq {

const char* launch_wide_int8(const LinearParams& params, cudaStream_t stream) { return launch_wide_of<IntCodes<8>>(params, stream); }

}  // namespace hfq
