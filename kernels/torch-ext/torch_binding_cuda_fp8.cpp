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

  if (qweight.dtype() != aoti_torch_dtype_uint8() || qweight.dim() != 3 || qweight.size(2) != 1) qweight.refuse("uint8 of shape [N, K, 1]");
  const W8A8Params p = sizes_of(op, kE4M3Codes, qweight.size(1), qweight.size(0));
  stack[0] = product_of_codes(op, kE4M3Codes, p, x, qweight, scales, input_scale, bias);
}

// hfq::cuda_fp8_experts_linear(x [M, K], counts int64 [E], qweight [E, N, K, 1], scales [E, N, 1], bias? [E, N]) -> [M, N]
void cuda_fp8_experts_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_fp8_experts_linear";
  const Tensor x(op, "x", stack[0]), counts(op, "counts", stack[1]), qweight(op, "qweight", stack[2]), scales(op, "scales", stack[3]);
  const Tensor bias(op, "bias", Tensor::unwrap(stack[4]));
  if (qweight.dtype() != aoti_torch_dtype_uint8() || qweight.dim() != 4 || qweight.size(3) != 1) qweight.refuse("uint8 of shape [E, N, K, 1]");
  const W8A8Params p = sizes_of(op, kE4M3Codes, qweight.size(2), qweight.size(1));
  stack[0] = products_of_experts(op, kE4M3Codes, p, x, counts, qweight, scales, bias);
}

// hfq::cuda_fp8_dequantize(qweight [..., N, K, 1], scales [..., N, 1], dtype) -> [..., N, K]
void cuda_fp8_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_fp8_dequantize";
  constexpr int64_t kMostDims = 8;
  const Tensor qweight(op, "qweight", stack[0]), scales(op, "scales", stack[1]);
  const int64_t dims = qweight.dim() - 1;
  if (dims < 2 || dims > kMostDims || qweight.size(dims) != 1) qweight.refuse("of shape [..., N, K, 1]");
  int64_t sizes[kMostDims];
  for (int64_t i = 0; i < dims; ++i) sizes[i] = qweight.size(i);
  stack[0] = unpacked_bytes(op, kE4M3Codes, qweight, scales, sizes, dims, as_dtype(stack[2]));
}

}  // namespace

bool register_fp8(TorchLibraryHandle library) {
  return register_impl(library, "cuda_fp8_quantize_tokens", cuda_fp8_quantize_tokens) &&
         register_product(library, "cuda_fp8_linear", cuda_fp8_linear) &&
         register_impl(library, "cuda_fp8_experts_linear", cuda_fp8_experts_linear) &&
         register_impl(library, "cuda_fp8_dequantize", cuda_fp8_dequantize);
}

}  // namespace hfq
