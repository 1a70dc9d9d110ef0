// Operators of hfq for CUDA on weights of E4M3 that ask for activations of E4M3 (hfq/kernels/fp8_ops.py).
#include "cuda_w8a8.h"

namespace hfq {
namespace {

// hfq::cuda_fp8_quantize_tokens(x [M, K], input_scale? [1]) -> float8_e4m3fn [M, K], float32 [M, 1]
void cuda_fp8_quantize_tokens(StableIValue* stack, uint64_t, uint64_t) {
  quantize_tokens("cuda_fp8_quantize_tokens", kE4M3Codes, aoti_torch_dtype_float8_e4m3fn(), stack);
}

// hfq::cuda_fp8_linear(x [M, K], qweight [N, K, 1], scales [N, 1], input_scale? [1], bias? [N]) -> [M, N]
void cuda_fp8_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_fp8_linear";
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor input_scale(op, "input_scale", Tensor::unwrap(stack[3])), bias(op, "bias", Tensor::unwrap(stack[4]));

  W8A8Params p = {};
  if (qweight.dtype() != aoti_torch_dtype_uint8() || qweight.dim() != 3 || qweight.size(2) != 1) qweight.refuse("uint8 of shape [N, K, 1]");
  p.out_features = qweight.size(0);
  p.in_features = qweight.size(1);
  expect_columns(op, kE4M3Codes, p.in_features);
  expect(p.out_features > 0 && p.out_features < kMostBlocks, op, "out_features must be between 1 and 2^31, got " + std::to_string(p.out_features));
  stack[0] = product_of_codes(op, kE4M3Codes, p, x, qweight, scales, input_scale, bias);
}

}  // namespace

bool register_fp8(TorchLibraryHandle library) {
  return register_impl(library, "cuda_fp8_quantize_tokens", cuda_fp8_quantize_tokens) &&
         register_product(library, "cuda_fp8_linear", cuda_fp8_linear);
}

}  // namespace hfq
