// Operators of hfq for CUDA on weights that ask for int8 activations (hfq/kernels/cuda_int8_ops.py).
#include "cuda_w8a8.h"

namespace hfq {
namespace {

// hfq::cuda_quantize_tokens(x [M, K], input_scale? [1]) -> int8 [M, K], float32 [M, 1]
void cuda_quantize_tokens(StableIValue* stack, uint64_t, uint64_t) {
  quantize_tokens("cuda_quantize_tokens", kInt8Codes, aoti_torch_dtype_int8(), stack);
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

  const W8A8Params p = sizes_of(op, kInt8Codes, as_int(stack[5]), as_int(stack[6]));
  qweight.expect_shape({p.out_features, p.in_features / kPiece, kPiece, 1});
  stack[0] = product_of_codes(op, kInt8Codes, p, x, qweight, scales, input_scale, bias);
}

// hfq::cuda_int8_experts_linear(x [M, K], counts int64 [E], qweight [E, N, K / 16, 16, 1], scales [E, N, 1], bias? [E, N], in_features,
//   out_features) -> [M, N]
void cuda_int8_experts_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_int8_experts_linear";
  const Tensor x(op, "x", stack[0]), counts(op, "counts", stack[1]), qweight(op, "qweight", stack[2]), scales(op, "scales", stack[3]);
  const Tensor bias(op, "bias", Tensor::unwrap(stack[4]));
  const W8A8Params p = sizes_of(op, kInt8Codes, as_int(stack[5]), as_int(stack[6]));
  qweight.expect_shape({qweight.dim() ? qweight.size(0) : 0, p.out_features, p.in_features / kPiece, kPiece, 1});
  stack[0] = products_of_experts(op, kInt8Codes, p, x, counts, qweight, scales, bias);
}

// hfq::cuda_int8_dequantize(qweight [N, C, 16, 1], scales [N, 1], dtype) -> [N, 16 C]
void cuda_int8_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_int8_dequantize";
  const Tensor qweight(op, "qweight", stack[0]), scales(op, "scales", stack[1]);
  if (qweight.dim() != 4 || qweight.size(2) != kPiece || qweight.size(3) != 1) qweight.refuse("of shape [N, C, 16, 1]");
  const int64_t sizes[] = {qweight.size(0), kPiece * qweight.size(1)};
  stack[0] = unpacked_bytes(op, kInt8Codes, qweight, scales, sizes, 2, as_dtype(stack[2]));
}

}  // namespace

bool register_int8(TorchLibraryHandle library) {
  return register_impl(library, "cuda_quantize_tokens", cuda_quantize_tokens) && register_impl(library, "cuda_scale_sums", cuda_scale_sums) &&
         register_product(library, "cuda_int8_linear", cuda_int8_linear) &&
         register_impl(library, "cuda_int8_experts_linear", cuda_int8_experts_linear) &&
         register_impl(library, "cuda_int8_dequantize", cuda_int8_dequantize);
}

}  // namespace hfq
