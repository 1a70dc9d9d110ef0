// What the operators for CUDA share in reading their arguments.
#pragma once

#include "../cuda/copy.h"
#include "../cuda/experts.h"
#include "../cuda/weight.h"
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

inline bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// Thread blocks are numbered with 31 bits.
inline void expect_blocks(const char* op, int64_t blocks) { expect(blocks < (int64_t{1} << 31), op, "too many rows for one launch"); }

// ---- products and rows of weights ----

// Activations of 16 bits, for a product whose weight has been checked.
template <class Operands, class Params>
void set_x(const Operands& operands, const Tensor& x, Params& p) {
  p.x_dtype = float_dtype(x.dtype());
  if (p.x_dtype != kFloat16 && p.x_dtype != kBFloat16) x.refuse("float16 or bfloat16");
  if (x.dim() != 2 || x.size(1) != p.weight.in_features) x.refuse("of shape [M, " + std::to_string(p.weight.in_features) + "]");
  operands.expect_device(x);
  if (x.numel() >= int64_t{1} << 35) x.refuse("below 64 GiB");  // kernels count pieces of 16 bytes with 32 bits
  p.x = x.data(aoti_torch_device_type_cuda(), 2);
  p.tokens = x.size(0);
}

template <class Operands, class Params>
void set_bias(const Operands& operands, const Tensor& bias, std::initializer_list<int64_t> shape, Params& p) {
  p.bias_dtype = expect_float(bias);
  bias.expect_shape(shape);
  operands.expect_device(bias);
  p.bias = bias.data(aoti_torch_device_type_cuda(), element_size(p.bias_dtype));
}

// A part of a larger tensor may begin anywhere: if that is not at a multiple of 16 bytes, a copy, which `p` then reads. To be kept until the
// launch: memory that is freed then is used again behind the kernels, in order of the stream.
template <class Params>
Tensor aligned_x(const char* op, const Tensor& x, int32_t index, cudaStream_t stream, Params& p) {
  if (aligned(p.x, 16)) return Tensor(op, "x", 0);
  const int64_t sizes[] = {p.tokens, p.weight.in_features};
  void* to = nullptr;
  const StableIValue copy = empty_tensor(sizes, 2, x.dtype(), aoti_torch_device_type_cuda(), index, &to);
  checked(op, copy, copy_on_device(to, p.x, p.tokens * p.weight.in_features * 2, stream));
  p.x = to;
  return Tensor(op, "x", copy);
}

// So many floats, on the current stream's device, that kernels write before they read them; none for 0. To be kept likewise.
inline Tensor workspace_tensor(const char* op, int64_t floats, int32_t index, float*& workspace) {
  if (!floats) return Tensor(op, "workspace", 0);
  void* memory = nullptr;
  const StableIValue tensor = empty_tensor(&floats, 1, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), index, &memory);
  workspace = static_cast<float*>(memory);
  return Tensor(op, "workspace", tensor);
}

// The rows `index` of a weight, or all, in `dtype`.
template <class Params, class Operands>
StableIValue unpacked(const char* op, const Operands& operands, const Tensor* index, int32_t dtype,
                      const char* (*launch)(const Params&, cudaStream_t)) {
  const int32_t cuda = aoti_torch_device_type_cuda();
  Params p = {};
  p.weight = operands.weight();
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");
  p.rows = p.weight.out_features;
  if (index) {
    if (index->dtype() != aoti_torch_dtype_int64() || index->dim() != 1) index->refuse("int64 of shape [T]");
    operands.expect_device(*index);
    p.index = static_cast<const int64_t*>(index->data(cuda, 8));
    p.rows = index->size(0);
  }
  expect_blocks(op, (p.rows + kTileRows - 1) / kTileRows * ((p.weight.in_features + 255) / 256));
  const DeviceGuard guard(operands.device_index());
  const int64_t sizes[] = {p.rows, p.weight.in_features};
  const StableIValue y = empty_tensor(sizes, 2, dtype, cuda, operands.device_index(), &p.y);
  return checked(op, y, launch(p, current_stream(operands.device_index())));
}

// ---- experts ----

// How many tokens each of `experts` weights meets, for `tokens` tokens in all, on device `index`.
inline Routing routing_of(const char* op, const Tensor& counts, int64_t experts, int64_t tokens, int32_t index) {
  Routing r = {};
  r.experts = experts;
  expect(experts > 0 && experts <= kMostExperts, op, "takes 1 to " + std::to_string(kMostExperts) + " experts, got " + std::to_string(experts));
  expect(tokens <= kMostExpertTokens, op, "takes up to 2^20 tokens, got " + std::to_string(tokens));
  if (counts.dtype() != aoti_torch_dtype_int64()) counts.refuse("int64");
  counts.expect_shape({experts});
  if (counts.device_index() != index) counts.refuse("on the device of qweight");
  r.counts = static_cast<const int64_t*>(counts.data(aoti_torch_device_type_cuda(), 8));
  return r;
}

// Operators of other files.
bool register_fp8(TorchLibraryHandle library);
bool register_fragments(TorchLibraryHandle library);
bool register_int8(TorchLibraryHandle library);
bool register_packing(TorchLibraryHandle library);
bool register_spqr_fragments(TorchLibraryHandle library);
bool register_decode(TorchLibraryHandle library);

}  // namespace hfq
