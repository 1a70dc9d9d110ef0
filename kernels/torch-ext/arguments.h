// What operators for all devices share in reading their arguments.
#pragma once

#include "../common/dtype.h"
#include "boxed_call.h"

namespace hfq {

inline DType float_dtype(int32_t dtype) {
  if (dtype == aoti_torch_dtype_float32()) return kFloat32;
  if (dtype == aoti_torch_dtype_float16()) return kFloat16;
  if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
  return kUnsupported;
}

inline DType expect_float(const Tensor& tensor) {
  const DType dtype = float_dtype(tensor.dtype());
  if (dtype == kUnsupported) tensor.refuse("float32, float16 or bfloat16");
  return dtype;
}

inline void expect(bool condition, const char* op, const std::string& message) {
  if (!condition) fail(std::string("hfq::") + op + ": " + message);
}

// A new result, and what fills it; freed where that throws.
template <class Fill>
StableIValue filled(const char* op, StableIValue y, const Fill& fill) {
  try {
    fill();
  } catch (...) {
    const Tensor freed(op, "y", y);
    throw;
  }
  return y;
}

}  // namespace hfq
