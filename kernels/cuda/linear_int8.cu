#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_int8(const LinearParams& params, cudaStream_t stream) { return launch_linear_of<IntCodes<8>>(params, stream); }

}  // namespace hfq
