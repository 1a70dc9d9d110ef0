// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

namespace hfq {

// Enqueues `kernel` with `shared_bytes` (at most `most_shared_bytes`) of dynamic shared memory. Returns null, or CUDA's description of the error.
template <class Params>
const char* launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  constexpr size_t kUnasked = 48 << 10;  // more has to be asked for, for each kernel on each device
  if (shared_bytes > kUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) {
      cudaGetLastError();  // reported here; the next launch is not to find it
      return cudaGetErrorString(error);
    }
  }
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

// Shared memory that a thread block of the current device may have.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

}  // namespace hfq
