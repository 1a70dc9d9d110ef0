#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_int2(const LinearParams& params, cudaStream_t stream) { return launch_linear_of<IntCodes<2>>(params, stream); }

}  // namespace hfq
