// What the operators for CUDA share in reading their arguments.
#pragma once

#include "../cuda/dtype.h"
#include "arguments.h"

namespace hfq {

inline int64_t element_size(DType dtype) { return dtype == kFloat32 ? 4 : 2; }

class DeviceGuard {
 public:
  explicit DeviceGuard(int32_t index) { check_shim(aoti_torch_create_cuda_guard(index, &guard_), "create_cuda_guard"); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  ~DeviceGuard() { aoti_torch_delete_cuda_guard(guard_); }

 private:
  CUDAGuardHandle guard_ = nullptr;
};

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  check_shim(aoti_torch_get_current_cuda_stream(device_index, &stream), "get_current_cuda_stream");
  return static_cast<cudaStream_t>(stream);
}

// A result, or the error of the launch that was to fill it; frees the result in that case.
inline StableIValue checked(const char* op, StableIValue y, const char* error) {
  if (error) {
    const Tensor freed(op, "y", y);
    fail(std::string("hfq::") + op + ": CUDA error: " + error);
  }
  return y;
}

// Operators of other files.
bool register_fp8(TorchLibraryHandle library);
bool register_fragments(TorchLibraryHandle library);
bool register_int8(TorchLibraryHandle library);
bool register_spqr_fragments(TorchLibraryHandle library);
bool register_decode(TorchLibraryHandle library);

}  // namespace hfq
