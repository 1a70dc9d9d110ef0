// Starting a kernel.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace hfq {

// Shared memory that a thread block of the current device may have.
inline size_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

// What CUDA says of a kernel as it is on the current device: zeros if it was not compiled for it. Asked for until it is known.
struct KernelFacts {
  std::atomic<int> registers = 0;     // of a thread
  std::atomic<int> architecture = 0;  // compute capability for which its PTX was made (__CUDA_ARCH__ / 10)
  std::atomic<bool> has_shared = false;  // allow_shared has been here
};
template <class Params>
KernelFacts& facts_of(void (*kernel)(Params)) {
  static std::mutex mutex;
  static std::map<std::pair<int, void (*)(Params)>, KernelFacts> known;
  int device = 0;
  cudaGetDevice(&device);
  const std::lock_guard lock(mutex);
  KernelFacts& facts = known[{device, kernel}];
  if (facts.registers == 0) {
    cudaFuncAttributes attributes = {};
    if (cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess)
      facts.registers = attributes.numRegs, facts.architecture = attributes.ptxVersion;
    else
      cudaGetLastError();
  }
  return facts;
}

// For dynamic shared memory of a thread block above what needs not be asked for. Always for all there is: other threads and graphs may launch
// the kernel with more than this call. (No kernel has shared memory that is not dynamic.)
template <class Params>
cudaError_t allow_shared(void (*kernel)(Params), size_t shared_bytes) {
  constexpr size_t kUnasked = 48 << 10;
  if (shared_bytes <= kUnasked) return cudaSuccess;
  KernelFacts& facts = facts_of(kernel);
  if (facts.has_shared) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes()));
  facts.has_shared = error == cudaSuccess;
  return error;
}

// Whether drivers take such launches into graphs: those of CUDA 12.3 and later.
inline bool driver_overlaps() {
  static const int version = [] {
    int found = 0;
    return cudaDriverGetVersion(&found) == cudaSuccess ? found : 0;
  }();
  return version >= 12030;
}

// Whether `kernel` may start before the one in front of it has ended: on GPUs and drivers that can, unless HFQ_CUDA_OVERLAP is 0. It has to have
// been compiled for them: code for older ones does not wait (wait_for_previous_kernel).
template <class Params>
bool may_start_early(void (*kernel)(Params)) {
  const char* wanted = std::getenv("HFQ_CUDA_OVERLAP");
  return (!wanted || wanted[0] != '0') && driver_overlaps() && facts_of(kernel).architecture >= 90;
}

// Null, or CUDA's description of the error, which the next launch is not to find.
inline const char* described(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

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
  const ExtendedLaunch how(blocks, cluster, threads, shared_bytes, stream, may_start_early(kernel));
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
inline const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  return described(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

// Multiprocessors of the current device.
inline int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Compute capability of the current device: 90 for 9.0.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

}  // namespace hfq
