// Starting a kernel. What is no template stands in launch.cu: each kernel's file is compiled several times, and the standard library's headers that
// this takes as often.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

namespace hfq {

// Shared memory that a thread block of the current device may have.
size_t most_shared_bytes();

// What CUDA says of a kernel as it is on the current device: zeros if it was not compiled for it. Asked for until it is known.
struct KernelFacts {
  std::atomic<int> registers = 0;     // of a thread
  std::atomic<int> architecture = 0;  // compute capability for which its PTX was made (__CUDA_ARCH__ / 10)
  std::atomic<bool> has_shared = false;  // allow_shared has been here
};
KernelFacts& facts_of(const void* kernel);
template <class Params>
KernelFacts& facts_of(void (*kernel)(Params)) {
  return facts_of(reinterpret_cast<const void*>(kernel));
}

// For dynamic shared memory of a thread block above what needs not be asked for. Always for all there is: other threads and graphs may launch
// the kernel with more than this call. (No kernel has shared memory that is not dynamic.)
cudaError_t allow_shared(const void* kernel, size_t shared_bytes);
template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t shared_bytes) {
  return allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes);
}

// Whether a kernel may start before the one in front of it has ended: on GPUs and drivers that can, unless HFQ_CUDA_OVERLAP is 0. It has to have
// been compiled for them: code for older ones does not wait (wait_for_previous_kernel).
bool may_start_early(const KernelFacts& facts);

// Null, or CUDA's description of the error, which the next launch is not to find.
const char* described(cudaError_t error);

// Enqueues `kernel` with `shared_bytes` (at most `most_shared_bytes`) of dynamic shared memory. Returns null, or CUDA's description of the error.
template <class Params>
const char* launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return described(error);
  kernel<<<blocks, threads, shared_bytes, stream>>>(params);
  return described(cudaGetLastError());
}

// A launch that may begin before the kernel in front has ended if it is `early`, of clusters of thread blocks that run at one time (compute
// capability 9.0), or of single ones if `cluster` is 0.
struct ExtendedLaunch {
  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config = {};

  ExtendedLaunch(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes, cudaStream_t stream, bool early) {
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = attributes;
    if (cluster) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = cluster;
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    }
    if (early) {
      cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
      attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  ExtendedLaunch(const ExtendedLaunch&) = delete;  // it points to itself
  ExtendedLaunch& operator=(const ExtendedLaunch&) = delete;
};

// `launch` of a kernel that calls wait_for_previous_kernel(), with clusters.
template <class Params>
const char* launch_clusters(void (*kernel)(Params), unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes, cudaStream_t stream,
                            const Params& params) {
  if (const cudaError_t error = allow_shared(kernel, shared_bytes); error != cudaSuccess) return described(error);
  const ExtendedLaunch how(blocks, cluster, threads, shared_bytes, stream, may_start_early(facts_of(kernel)));
  return described(cudaLaunchKernelEx(&how.config, kernel, params));
}

// The same without clusters: the kernel may start before the one in front of it has ended.
template <class Params>
const char* launch_early(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  return launch_clusters(kernel, blocks, 0, threads, shared_bytes, stream, params);
}

// Clusters of `cluster` (1 to 8) thread blocks of `kKernel` that run on the current device at a time. 0 if none does, or if a thread does not
// begin with `registers`, where that is not 0. Asked for once: the other arguments have to be the same for each number.
template <class Params, void (*kKernel)(Params)>
int active_clusters(int cluster, unsigned threads, size_t shared_bytes, int registers) {
  constexpr int kDevices = 64, kUnknown = 0;
  static std::atomic<int> known[kDevices][8] = {};  // one more than the number
  int device = 0, count = 0;
  if (cudaGetDevice(&device) != cudaSuccess || device >= kDevices) return 0;
  std::atomic<int>& answer = known[device][cluster - 1];
  if (answer != kUnknown) return answer - 1;
  const ExtendedLaunch how(cluster, cluster, threads, shared_bytes, nullptr, false);
  cudaError_t error = allow_shared(kKernel, shared_bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kKernel, &how.config);
  if (described(error)) return 0;  // asked again: it may have been another one's
  if (registers && facts_of(kKernel).registers != registers) count = 0;
  answer = count + 1;
  return count;
}

// Enqueues a copy within the memory of the device.
const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t stream);

// Multiprocessors of the current device.
int multiprocessors();

// Compute capability of the current device: 90 for 9.0.
int compute_capability();

}  // namespace hfq
