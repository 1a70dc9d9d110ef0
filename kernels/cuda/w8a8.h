// Weights and tokens of 8 bits on CUDA: tokens rounded to the weight's kind of codes, products of codes, one multiplication with the scales
// at the end.
//
//   y[m, n] = sum_k value(code[n, k]) * value(x_code[m, k])  *  (token_scale[m] * scale[n])  + bias[n]
//
// Codes are int8 (W8A8), rows of two's complement bytes (layout "signed", hfq/kernels/cuda_int8.py), or E4M3 as stored (hfq/formats/fp8.py).
// The rule for tokens is that of hfq/core/activations.py to the bit. What is computed is that of hfq/kernels/int8.py to the bit, since sums are of
// integers, whose order does not matter, and that of fp8.py up to the order of float32 sums.
#pragma once

#include "experts.h"

namespace hfq {

// ---- hfq::cuda_quantize_tokens, cuda_fp8_quantize_tokens ----

enum CodeType : int32_t { kInt8Codes = 0, kE4M3Codes = 1 };

struct TokensParams {
  const void* x;             // [tokens, K]
  const float* input_scale;  // [1] or null: each token's largest magnitude / the largest code
  uint8_t* codes;            // [tokens, K]
  float* scales;             // [tokens]
  int64_t tokens;            // M
  int64_t in_features;       // K, a multiple of 16
  DType x_dtype;
  CodeType code_type;
};

// Enqueues the kernel. Returns null, or CUDA's description of the error; so do the others.
const char* launch_quantize_tokens(const TokensParams& params, cudaStream_t stream);

// ---- hfq::cuda_int8_linear, cuda_fp8_linear ----

// 128 * 127 * 2^17 < 2^31: the sum of a row of integers fits 32 bits. 32 rows of E4M3 fit offsets of 32 bits.
constexpr int64_t kMostColumnsW8A8 = int64_t{1} << 17, kMostColumnsFp8 = int64_t{1} << 26;

struct W8A8Params {
  const uint8_t* qweight;     // [N, K]
  const void* scales;         // [N]
  const void* x;              // [tokens, K]  read where the kernel quantizes, of x_dtype
  const float* input_scale;   // [1] or null: likewise
  const uint8_t* codes;       // [tokens, K]  read where it does not
  const float* token_scales;  // [tokens]     likewise
  const void* bias;           // [N] or null
  void* y;                    // [tokens, N]  of x_dtype
  int64_t tokens;             // M
  int64_t out_features;       // N
  int64_t in_features;        // K, a multiple of 16, at most kMostColumnsW8A8 or kMostColumnsFp8
  DType scale_dtype;
  DType x_dtype;
  DType bias_dtype;
  uint32_t token_blocks;      // set by the launcher: thread blocks side by side for other tokens
};

// Whether the kernel quantizes x itself.
//
// A launch of its own for the tokens is about 3 us between two kernels that depend on each other (1 to 2 in a graph), where 4096 x 4096
// weights take 5 us from memory. In the kernel, each thread block has to read all of its tokens before its first product. That is a
// load from L2, a reduction and two barriers, some 0.8 us with the first weights on their way meanwhile, and 10 instructions per number, for
// E4M3 17: a multiprocessor takes 0.7 us for 2^14 numbers, or 1.2. Measured for int8 on an H100 (4096 x 14336, graphs): 2 tokens inside
// 29.6 us, 4 tokens 33.7, 8 tokens with a launch of their own 30.5 (benchmarks/results/gpu_kernels.json); for E4M3 reasoned from that.
constexpr int64_t kMostTokensInside = 4;
inline bool quantizes_inside(CodeType type, int64_t tokens, int64_t in_features) {
  const int64_t most_numbers = int64_t{1} << (type == kInt8Codes && tokens <= 2 ? 14 : 13);
  return tokens <= kMostTokensInside && tokens * in_features <= most_numbers;
}

const char* launch_w8a8(const W8A8Params& params, cudaStream_t stream);
const char* launch_fp8(const W8A8Params& params, cudaStream_t stream);

// ---- hfq::cuda_int8_experts_linear, cuda_fp8_experts_linear ----

struct W8A8ExpertsParams {
  W8A8Params product;  // of expert 0; codes, token_scales and y of all tokens, which are not quantized inside
  Routing routing;
};

// As launch_experts, with the same limits.
const char* launch_w8a8_experts(const W8A8ExpertsParams& params, cudaStream_t stream);
const char* launch_fp8_experts(const W8A8ExpertsParams& params, cudaStream_t stream);

// ---- hfq::cuda_int8_dequantize, cuda_fp8_dequantize ----

struct UnpackBytesParams {
  const uint8_t* qweight;  // [rows, K]
  const void* scales;      // [rows]
  void* y;                 // [rows, K]
  int64_t rows;            // N, or E * N
  int64_t in_features;     // K
  DType scale_dtype;
  DType y_dtype;
  CodeType code_type;
};

const char* launch_unpack_bytes(const UnpackBytesParams& params, cudaStream_t stream);

// ---- hfq::cuda_scale_sums ----

struct ScaleSumsParams {
  const int32_t* sums;        // [tokens, N]
  const float* token_scales;  // [tokens]
  const void* scales;         // [N]
  const void* bias;           // [N] or null
  void* y;                    // [tokens, N]
  int64_t tokens;             // M
  int64_t out_features;       // N
  DType scale_dtype;
  DType bias_dtype;
  DType y_dtype;
  bool in_fours;              // set by the launcher: rows and addresses allow four columns at a time
};

const char* launch_scale_sums(const ScaleSumsParams& params, cudaStream_t stream);

}  // namespace hfq
