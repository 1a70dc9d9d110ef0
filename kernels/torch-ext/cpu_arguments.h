// What the operators for the CPU share in reading their arguments.
#pragma once

#include "../cpu/launch.h"
#include "arguments.h"

namespace hfq {

constexpr int64_t kLargest = int64_t{1} << 31;  // keeps every product of sizes within 64 bits

inline void expect_sizes(const char* op, int64_t in_features, int64_t out_features) {
  expect(in_features > 0 && in_features < kLargest, op, "in_features must be between 1 and 2^31, got " + std::to_string(in_features));
  expect(out_features > 0 && out_features < kLargest, op, "out_features must be between 1 and 2^31, got " + std::to_string(out_features));
}

inline const float* float32_data(const Tensor& tensor) {
  if (tensor.dtype() != aoti_torch_dtype_float32()) tensor.refuse("float32");
  return static_cast<const float*>(tensor.data(aoti_torch_device_type_cpu(), 4));
}

// torch_binding_*.cpp. Return false on failure.
bool register_spqr(TorchLibraryHandle library);
bool register_rounding(TorchLibraryHandle library);
bool register_moments(TorchLibraryHandle library);
bool register_planes(TorchLibraryHandle library);
bool register_decode(TorchLibraryHandle library);

}  // namespace hfq
