// Versions of CUDA as CUDA writes them, 12040 for 12.4: hfq/kernels/gpu_code.py says what they have to be. Neither call needs a GPU.
#include <cuda_runtime.h>

#define HFQ_EXPORT extern "C" __attribute__((visibility("default")))

// That of the runtime in this library.
HFQ_EXPORT int hfq_cuda_runtime_version() { return CUDART_VERSION; }

// The latest one that the driver runs; 0 if there is no driver.
HFQ_EXPORT int hfq_cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}
