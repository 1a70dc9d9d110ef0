#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_int3(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<IntCodes<3>>(params, stream); }

}  // namespace hfq
