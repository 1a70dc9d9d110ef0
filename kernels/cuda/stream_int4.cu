#include "stream_kernel.h"

namespace hfq {

const char* launch_stream_int4(const StreamParams& params, cudaStream_t stream) { return launch_stream_of<IntCodes<4>>(params, stream); }

// All kernels have as many threads, and no more registers than leave room for two of their blocks.
int stream_clusters(uint32_t blocks) {
  constexpr auto kKernel = stream_kernel<IntCodes<4>, BFloat16, false, 1>;
  return active_clusters<StreamParams, kKernel>(static_cast<int>(blocks), kStreamThreads, most_shared_bytes(), 0);
}

bool stream_was_compiled() { return facts_of(stream_kernel<IntCodes<4>, BFloat16, false, 1>).architecture >= 90; }

}  // namespace hfq
