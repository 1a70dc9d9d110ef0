// What launchers ask of CUDA.
#include "launch.h"

#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

namespace hfq {
namespace {

// Whether drivers take launches that may start early into graphs: those of CUDA 12.3 and later.
bool driver_overlaps() {
  static const int version = [] {
    int found = 0;
    return cudaDriverGetVersion(&found) == cudaSuccess ? found : 0;
  }();
  return version >= 12030;
}

}  // namespace

size_t most_shared_bytes() {
  int device = 0, bytes = 48 << 10;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return static_cast<size_t>(bytes);
}

KernelFacts& facts_of(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, KernelFacts> known;
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

cudaError_t allow_shared(const void* kernel, size_t shared_bytes) {
  constexpr size_t kUnasked = 48 << 10;
  if (shared_bytes <= kUnasked) return cudaSuccess;
  KernelFacts& facts = facts_of(kernel);
  if (facts.has_shared) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(most_shared_bytes()));
  facts.has_shared = error == cudaSuccess;
  return error;
}

bool may_start_early(const KernelFacts& facts) {
  const char* const wanted = std::getenv("HFQ_CUDA_OVERLAP");
  return (!wanted || wanted[0] != '0') && driver_overlaps() && facts.architecture >= 90;
}

const char* described(cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  cudaGetLastError();
  return cudaGetErrorString(error);
}

const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  return described(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, stream));
}

int multiprocessors() {
  int device = 0, count = 1;
  if (cudaGetDevice(&device) == cudaSuccess) cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

int compute_capability() {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  return 10 * major + minor;
}

}  // namespace hfq
