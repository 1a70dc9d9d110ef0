#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_e4m3(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<E4m3Codes>(params, stream); }

}  // namespace hfq
