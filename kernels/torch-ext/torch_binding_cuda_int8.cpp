// Operators of hfq for CUDA on weights that ask for int8 activations (hfq/kernels/cuda_int8_ops.py).
#include "../cuda/w8a8.h"
#include "cuda_arguments.h"

namespace hfq {
namespace {

constexpr int64_t kMostBlocks = int64_t{1} << 31;  // thread blocks of a launch are numbered with 31 bits
constexpr int64_t kPiece = 16;                     // columns of a load

void expect_device(const Tensor& tensor, int32_t index, const char* other) {
  if (tensor.device_index() != index) tensor.refuse(std::string("on the device of ") + other);
}

void expect_columns(const char* op, int64_t in_features) {
  expect(in_features > 0 && in_features <= kMostColumnsW8A8 && in_features % kPiece == 0, op,
         "in_features must be a multiple of 16 up to 131072, got " + std::to_string(in_features));
}

// A tensor of floats of any dtype with this shape, on device `index`.
const void* floats(const Tensor& tensor, std::initializer_list<int64_t> shape, int32_t index, DType& dtype) {
  dtype = float_dtype(tensor.dtype());
  if (dtype == kUnsupported) tensor.refuse("float32, float16 or bfloat16");
  tensor.expect_shape(shape);
  expect_device(tensor, index, "the other tensors");
  return tensor.data(aoti_torch_device_type_cuda(), element_size(dtype));
}

const float* float32s(const Tensor& tensor, std::initializer_list<int64_t> shape, int32_t index) {
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

TokensParams tokens_params(const Tokens& tokens, int64_t in_features, const float* input_scale) {
  TokensParams p = {};
  p.input_scale = input_scale;
  p.tokens = tokens.count();
  p.in_features = in_features;
  p.x_dtype = tokens.dtype();
  return p;
}

// hfq::cuda_quantize_tokens(x [M, K], input_scale? [1]) -> int8 [M, K], float32 [M, 1]
void cuda_quantize_tokens(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_quantize_tokens";
  const Tensor x(op, "x", stack[0]), input_scale(op, "input_scale", Tensor::unwrap(stack[1]));
  const int32_t cuda = aoti_torch_device_type_cuda(), index = x.device_index();
  if (x.dim() != 2) x.refuse("of shape [M, K]");
  const int64_t in_features = x.size(1);
  expect_columns(op, in_features);
  Tokens tokens(op, x, in_features);
  TokensParams p = tokens_params(tokens, in_features, input_scale.defined() ? float32s(input_scale, {1}, index) : nullptr);

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  p.x = tokens.data(stream);
  const int64_t sizes[] = {p.tokens, in_features}, scale_sizes[] = {p.tokens, 1};
  void *codes_data = nullptr, *scales_data = nullptr;
  const StableIValue codes = empty_tensor(sizes, 2, aoti_torch_dtype_int8(), cuda, index, &codes_data);
  StableIValue scales = 0;
  try {
    scales = empty_tensor(scale_sizes, 2, aoti_torch_dtype_float32(), cuda, index, &scales_data);
    p.codes = static_cast<int8_t*>(codes_data);
    p.scales = static_cast<float*>(scales_data);
    checked(op, scales, launch_quantize_tokens(p, stream));
  } catch (...) {
    const Tensor freed(op, "codes", codes);
    throw;
  }
  stack[0] = codes;
  stack[1] = scales;
}

// hfq::cuda_scale_sums(out [M, N], sums [M, N], token_scales [M, 1], scales [N, 1], bias? [N]) -> ()
void cuda_scale_sums(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_scale_sums";
  const Tensor out(op, "out", stack[0]), sums(op, "sums", stack[1]), token_scales(op, "token_scales", stack[2]);
  const Tensor scales(op, "scales", stack[3]), bias(op, "bias", Tensor::unwrap(stack[4]));
  const int32_t cuda = aoti_torch_device_type_cuda(), index = sums.device_index();

  ScaleSumsParams p = {};
  if (sums.dtype() != aoti_torch_dtype_int32() || sums.dim() != 2) sums.refuse("int32 of shape [M, N]");
  p.sums = static_cast<const int32_t*>(sums.data(cuda, 4));
  p.tokens = sums.size(0);
  p.out_features = sums.size(1);
  expect((p.out_features + 1023) / 1024 * p.tokens < kMostBlocks, op, "too many sums for one launch");
  p.token_scales = float32s(token_scales, {p.tokens, 1}, index);
  p.scales = floats(scales, {p.out_features, 1}, index, p.scale_dtype);
  if (bias.defined()) p.bias = floats(bias, {p.out_features}, index, p.bias_dtype);
  p.y = const_cast<void*>(floats(out, {p.tokens, p.out_features}, index, p.y_dtype));

  const DeviceGuard guard(index);
  if (const char* error = launch_scale_sums(p, current_stream(index))) fail(std::string("hfq::") + op + ": CUDA error: " + error);
}

// hfq::cuda_int8_linear(x [M, K], qweight [N, K / 16, 16, 1], scales [N, 1], input_scale? [1], bias? [N], in_features, out_features) -> [M, N]
void cuda_int8_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_int8_linear";
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor input_scale(op, "input_scale", Tensor::unwrap(stack[3])), bias(op, "bias", Tensor::unwrap(stack[4]));
  const int32_t cuda = aoti_torch_device_type_cuda(), index = qweight.device_index();

  W8A8Params p = {};
  p.in_features = as_int(stack[5]);
  p.out_features = as_int(stack[6]);
  expect_columns(op, p.in_features);
  expect(p.out_features > 0 && p.out_features < kMostBlocks, op, "out_features must be between 1 and 2^31, got " + std::to_string(p.out_features));
  if (qweight.dtype() != aoti_torch_dtype_uint8()) qweight.refuse("uint8");
  qweight.expect_shape({p.out_features, p.in_features / kPiece, kPiece, 1});
  p.qweight = static_cast<const uint8_t*>(qweight.data(cuda, 1));
  if (!aligned(p.qweight, 16)) qweight.refuse("aligned to 16 bytes");
  p.scales = floats(scales, {p.out_features, 1}, index, p.scale_dtype);
  if (input_scale.defined()) p.input_scale = float32s(input_scale, {1}, index);
  if (bias.defined()) p.bias = floats(bias, {p.out_features}, index, p.bias_dtype);
  Tokens tokens(op, x, p.in_features);
  expect_device(x, index, "qweight");
  p.x_dtype = tokens.dtype();
  p.tokens = tokens.count();
  expect_blocks(op, ((p.tokens + 7) / 8) * ((p.out_features + 15) / 16));

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  p.x = tokens.data(stream);
  StableIValue codes = 0;
  if (!quantizes_inside(p.tokens, p.in_features)) {
    // The scales stand behind the codes, at a multiple of 16 bytes.
    const int64_t bytes = p.tokens * p.in_features, sizes[] = {bytes + 4 * p.tokens};
    void* memory = nullptr;
    codes = empty_tensor(sizes, 1, aoti_torch_dtype_uint8(), cuda, index, &memory);
    TokensParams t = tokens_params(tokens, p.in_features, p.input_scale);
    t.x = p.x;
    p.codes = t.codes = static_cast<int8_t*>(memory);
    p.token_scales = t.scales = reinterpret_cast<float*>(t.codes + bytes);
    checked(op, codes, launch_quantize_tokens(t, stream));
  }
  const Tensor kept(op, "codes", codes);
  const int64_t sizes[] = {p.tokens, p.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cuda, index, &p.y);
  stack[0] = checked(op, y, launch_w8a8(p, stream));
}

}  // namespace

bool register_int8(TorchLibraryHandle library) {
  return register_impl(library, "cuda_quantize_tokens", cuda_quantize_tokens) && register_impl(library, "cuda_scale_sums", cuda_scale_sums) &&
         register_product(library, "cuda_int8_linear", cuda_int8_linear);
}

}  // namespace hfq
