#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_int8(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<IntCodes<8>>(params, stream); }

}  // namespace hfq
