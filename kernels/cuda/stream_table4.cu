#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_table4(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<TableCodes>(params, stream); }

}  // namespace hfq
