#include "linear_kernel.h"

namespace hfq {

const char* launch_linear_e4m3(const LinearParams& params, cudaStream_t stream) { return launch_linear_of<E4m3Codes>(params, stream); }

}  // namespace hfq
