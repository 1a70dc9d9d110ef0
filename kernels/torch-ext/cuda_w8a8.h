// What the operators for CUDA on weights and tokens of 8 bits share: activations, their rounding, the product of few of them, the dense weight.
#pragma once

#include "../cuda/w8a8.h"
#include "cuda_arguments.h"

namespace hfq {

constexpr int64_t kMostBlocks = int64_t{1} << 31;  // thread blocks of a launch are numbered with 31 bits
constexpr int64_t kPiece = 16;                     // columns of a load

inline void expect_device(const Tensor& tensor, int32_t index, const char* other) {
  if (tensor.device_index() != index) tensor.refuse(std::string("on the device of ") + other);
}

inline int64_t most_columns(CodeType type) { return type == kInt8Codes ? kMostColumnsW8A8 : kMostColumnsFp8; }

inline void expect_columns(const char* op, CodeType type, int64_t in_features) {
  const int64_t most = most_columns(type);
  expect(in_features > 0 && in_features <= most && in_features % kPiece == 0, op,
         "in_features must be a multiple of 16 up to " + std::to_string(most) + ", got " + std::to_string(in_features));
}

inline W8A8Params sizes_of(const char* op, CodeType type, int64_t in_features, int64_t out_features) {
  W8A8Params p = {};
  p.in_features = in_features;
  p.out_features = out_features;
  expect_columns(op, type, in_features);
  expect(out_features > 0 && out_features < kMostBlocks, op, "out_features must be between 1 and 2^31, got " + std::to_string(out_features));
  return p;
}

// A tensor of floats of any dtype with this shape, behind `count` if that is not 0, on device `index`.
inline const void* floats(const Tensor& tensor, std::initializer_list<int64_t> shape, int32_t index, DType& dtype, int64_t count = 0) {
  dtype = float_dtype(tensor.dtype());
  if (dtype == kUnsupported) tensor.refuse("float32, float16 or bfloat16");
  tensor.expect_stack(count, shape);
  expect_device(tensor, index, "the other tensors");
  return tensor.data(aoti_torch_device_type_cuda(), element_size(dtype));
}

inline const float* float32s(const Tensor& tensor, std::initializer_list<int64_t> shape, int32_t index) {
  if (tensor.dtype() != aoti_torch_dtype_float32()) tensor.refuse("float32");
  DType dtype;
  return static_cast<const float*>(floats(tensor, shape, index, dtype));
}

// Activations `[M, K]`: their dtype, and an address at a multiple of 16 bytes. A part of a larger tensor may begin anywhere and is copied.
class Tokens {
 public:
  Tokens(const char* op, const Tensor& x, int64_t in_features) : op_(op), x_(x), dtype_(float_dtype(x.dtype())) {
    if (dtype_ == kUnsupported) x.refuse("float32, float16 or bfloat16");
    if (x.dim() != 2 || x.size(1) != in_features) x.refuse("of shape [M, " + std::to_string(in_features) + "]");
    data_ = x.data(aoti_torch_device_type_cuda(), element_size(dtype_));
    expect(x.size(0) < kMostBlocks, op, "too many tokens for one launch");
  }
  Tokens(const Tokens&) = delete;
  Tokens& operator=(const Tokens&) = delete;
  // Memory that is freed here is used again behind the kernel, in order of the stream.
  ~Tokens() { const Tensor freed(op_, "x", copy_); }

  DType dtype() const { return dtype_; }
  int64_t count() const { return x_.size(0); }

  const void* data(cudaStream_t stream) {
    if (aligned(data_, 16)) return data_;
    const int64_t sizes[] = {x_.size(0), x_.size(1)};
    void* to = nullptr;
    copy_ = empty_tensor(sizes, 2, x_.dtype(), aoti_torch_device_type_cuda(), x_.device_index(), &to);
    if (const char* error = copy_on_device(to, data_, x_.numel() * element_size(dtype_), stream))
      fail(std::string("hfq::") + op_ + ": CUDA error: " + error);
    return to;
  }

 private:
  const char* op_;
  const Tensor& x_;
  DType dtype_;
  const void* data_;
  StableIValue copy_ = 0;
};

inline TokensParams tokens_params(const Tokens& tokens, CodeType type, int64_t in_features, const float* input_scale) {
  TokensParams p = {};
  p.input_scale = input_scale;
  p.tokens = tokens.count();
  p.in_features = in_features;
  p.x_dtype = tokens.dtype();
  p.code_type = type;
  return p;
}

// (x [M, K], input_scale? [1]) -> codes [M, K] of `dtype`, float32 [M, 1]
inline void quantize_tokens(const char* op, CodeType type, int32_t dtype, StableIValue* stack) {
  const Tensor x(op, "x", stack[0]), input_scale(op, "input_scale", Tensor::unwrap(stack[1]));
  const int32_t cuda = aoti_torch_device_type_cuda(), index = x.device_index();
  if (x.dim() != 2) x.refuse("of shape [M, K]");
  const int64_t in_features = x.size(1);
  expect_columns(op, type, in_features);
  Tokens tokens(op, x, in_features);
  TokensParams p = tokens_params(tokens, type, in_features, input_scale.defined() ? float32s(input_scale, {1}, index) : nullptr);

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  p.x = tokens.data(stream);
  const int64_t sizes[] = {p.tokens, in_features}, scale_sizes[] = {p.tokens, 1};
  void *codes_data = nullptr, *scales_data = nullptr;
  const StableIValue codes = empty_tensor(sizes, 2, dtype, cuda, index, &codes_data);
  StableIValue scales = 0;
  stack[0] = filled(op, codes, [&] {
    scales = empty_tensor(scale_sizes, 2, aoti_torch_dtype_float32(), cuda, index, &scales_data);
    p.codes = static_cast<uint8_t*>(codes_data);
    p.scales = static_cast<float*>(scales_data);
    checked(op, scales, launch_quantize_tokens(p, stream));
  });
  stack[1] = scales;
}

// The weight and its scales (and bias) in `p`, whose sizes and shape of qweight have been checked. `experts`: how many of them, 0 for one weight
// without a dimension of its own.
inline void set_weight(W8A8Params& p, int64_t experts, const Tensor& qweight, const Tensor& scales, const Tensor& bias) {
  const int32_t index = qweight.device_index();
  if (qweight.dtype() != aoti_torch_dtype_uint8()) qweight.refuse("uint8");
  p.qweight = static_cast<const uint8_t*>(qweight.data(aoti_torch_device_type_cuda(), 1));
  if (!aligned(p.qweight, 16)) qweight.refuse("aligned to 16 bytes");
  p.scales = floats(scales, {p.out_features, 1}, index, p.scale_dtype, experts);
  if (bias.defined()) p.bias = floats(bias, {p.out_features}, index, p.bias_dtype, experts);
}

// Rounds the tokens that `p` has into memory of their own: codes, and behind them scales, at a multiple of 16 bytes. To be kept until the launch.
inline StableIValue round_tokens(const char* op, CodeType type, const Tokens& tokens, int32_t index, cudaStream_t stream, W8A8Params& p) {
  const int64_t bytes = p.tokens * p.in_features, sizes[] = {bytes + 4 * p.tokens};
  void* memory = nullptr;
  const StableIValue codes = empty_tensor(sizes, 1, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(), index, &memory);
  TokensParams t = tokens_params(tokens, type, p.in_features, p.input_scale);
  t.x = p.x;
  p.codes = t.codes = static_cast<uint8_t*>(memory);
  p.token_scales = t.scales = reinterpret_cast<float*>(t.codes + bytes);
  return checked(op, codes, launch_quantize_tokens(t, stream));
}

// The dense weight, of the sizes `sizes` of which the last one is K, of bytes whose shape has been checked and scales with one for each row.
inline StableIValue unpacked_bytes(const char* op, CodeType type, const Tensor& qweight, const Tensor& scales, const int64_t* sizes, int64_t dims,
                                   int32_t dtype) {
  const int32_t cuda = aoti_torch_device_type_cuda(), index = qweight.device_index();
  UnpackBytesParams p = {};
  p.code_type = type;
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");
  if (qweight.dtype() != aoti_torch_dtype_uint8()) qweight.refuse("uint8");
  p.qweight = static_cast<const uint8_t*>(qweight.data(cuda, 1));
  p.in_features = sizes[dims - 1];
  p.rows = 1;
  bool same = scales.dim() == dims && scales.size(dims - 1) == 1;
  for (int64_t i = 0; i < dims - 1; ++i) {
    same = same && scales.size(i) == sizes[i];
    p.rows *= sizes[i];
  }
  if (!same) scales.refuse("of shape [..., N, 1] with the leading sizes of qweight " + qweight.shape_text());
  p.scale_dtype = float_dtype(scales.dtype());
  if (p.scale_dtype == kUnsupported) scales.refuse("float32, float16 or bfloat16");
  expect_device(scales, index, "qweight");
  p.scales = scales.data(cuda, element_size(p.scale_dtype));
  expect_blocks(op, (p.in_features + 255) / 256 * p.rows);

  const DeviceGuard guard(index);
  const StableIValue y = empty_tensor(sizes, dims, dtype, cuda, index, &p.y);
  return checked(op, y, launch_unpack_bytes(p, current_stream(index)));
}

// The product of few tokens with one weight.
inline StableIValue product_of_codes(const char* op, CodeType type, W8A8Params p, const Tensor& x, const Tensor& qweight, const Tensor& scales,
                                     const Tensor& input_scale, const Tensor& bias) {
  const int32_t index = qweight.device_index();
  set_weight(p, 0, qweight, scales, bias);
  if (input_scale.defined()) p.input_scale = float32s(input_scale, {1}, index);
  Tokens tokens(op, x, p.in_features);
  expect_device(x, index, "qweight");
  p.x_dtype = tokens.dtype();
  p.tokens = tokens.count();
  expect_blocks(op, ((p.tokens + 7) / 8) * ((p.out_features + 15) / 16));

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  p.x = tokens.data(stream);
  const bool inside = quantizes_inside(type, p.tokens, p.in_features);
  const Tensor kept(op, "codes", inside ? 0 : round_tokens(op, type, tokens, index, stream, p));
  const int64_t sizes[] = {p.tokens, p.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), aoti_torch_device_type_cuda(), index, &p.y);
  return checked(op, y, type == kInt8Codes ? launch_w8a8(p, stream) : launch_fp8(p, stream));
}

// The products of tokens that are sorted by expert.
inline StableIValue products_of_experts(const char* op, CodeType type, const W8A8Params& sizes_of_one, const Tensor& x, const Tensor& counts,
                                        const Tensor& qweight, const Tensor& scales, const Tensor& bias) {
  const int32_t index = qweight.device_index();
  const int64_t experts = qweight.size(0);
  W8A8ExpertsParams p = {};
  W8A8Params& product = p.product;
  product = sizes_of_one;
  Tokens tokens(op, x, product.in_features);
  expect_device(x, index, "qweight");
  p.routing = routing_of(op, counts, experts, tokens.count(), index);
  set_weight(product, experts, qweight, scales, bias);
  p.routing.qweight_bytes = product.out_features * product.in_features;
  p.routing.scale_bytes = product.out_features * element_size(product.scale_dtype);
  if (bias.defined()) p.routing.bias_bytes = product.out_features * element_size(product.bias_dtype);
  product.x_dtype = tokens.dtype();
  product.tokens = tokens.count();
  expect_blocks(op, (product.out_features + 15) / 16 * expert_slots(product.tokens, experts, 8));

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  product.x = tokens.data(stream);
  const Tensor kept(op, "codes", round_tokens(op, type, tokens, index, stream, product));
  const int64_t sizes[] = {product.tokens, product.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), aoti_torch_device_type_cuda(), index, &product.y);
  return checked(op, y, type == kInt8Codes ? launch_w8a8_experts(p, stream) : launch_fp8_experts(p, stream));
}

}  // namespace hfq
