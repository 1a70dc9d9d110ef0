#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_int3(const LinearParams& params, cudaStream_t stream) { return launch_linear_of<IntCodes<3>>(params, stream); }

}  // namespace hfq
