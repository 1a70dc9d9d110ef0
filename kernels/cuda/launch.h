// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

namespace hfq {

// Enqueues `kernel` with `shared_bytes` (at most 48 KiB) of dynamic shared memory. Returns null, or CUDA's description of the error.
template <class Params>
const char* launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  kernel<<<blocks, threads, shared_bytes, stream>>>(params);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Enqueues a copy within the memory of the device.
inline const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

}  // namespace hfq
