// What the CUDA runtime says, which kernels do not need but hfq/kernels does.
#include <cuda_runtime.h>

#define HFQ_EXPORT extern "C" __attribute__((visibility("default")))

// Versions of CUDA as CUDA writes them, 12040 for 12.4: hfq/kernels/gpu_code.py says what they have to be. Neither call needs a GPU.
// That of the runtime in this library.
HFQ_EXPORT int hfq_cuda_runtime_version() { return CUDART_VERSION; }

// The latest one that the driver runs; 0 if there is no driver.
HFQ_EXPORT int hfq_cuda_driver_version() {
  int version = 0;
  if (cudaDriverGetVersion(&version) == cudaSuccess) return version;
  cudaGetLastError();
  return 0;
}

// Which graph the work of a stream is captured into: no two captures of a process have one number. 0 if into none.
HFQ_EXPORT unsigned long long hfq_cuda_capture(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long number = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &number);
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess && status == cudaStreamCaptureStatusActive ? number : 0;
}
