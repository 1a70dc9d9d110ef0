#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_int4(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<IntCodes<4>>(params, stream); }

bool stream_was_compiled() { return facts_of(stream_kernel<IntCodes<4>, BFloat16, false, 1>).architecture >= 90; }

}  // namespace hfq
