// W8A8 on CUDA: tokens quantized to int8, products of integers, one multiplication with the scales at the end.
//
//   y[m, n] = sum_k code[n, k] * x_code[m, k]  *  (token_scale[m] * scale[n])  + bias[n]
//
// Layout "signed" of the weight (hfq/kernels/cuda_int8.py): rows of two's complement bytes, one after the other. The rule for tokens is that
// of hfq/core/activations.py, what is computed that of hfq/kernels/int8.py, both to the bit: sums are of integers, so that no order matters.
#pragma once

#include "dtype.h"

namespace hfq {

// ---- hfq::cuda_quantize_tokens ----

struct TokensParams {
  const void* x;             // [tokens, K]
  const float* input_scale;  // [1] or null: each token's largest magnitude / 127
  int8_t* codes;             // [tokens, K]
  float* scales;             // [tokens]
  int64_t tokens;            // M
  int64_t in_features;       // K, a multiple of 16
  DType x_dtype;
};

// Enqueues the kernel. Returns null, or CUDA's description of the error; so do the others.
const char* launch_quantize_tokens(const TokensParams& params, cudaStream_t stream);

// ---- hfq::cuda_int8_linear ----

constexpr int64_t kMostColumnsW8A8 = int64_t{1} << 17;  // 128 * 127 * 2^17 < 2^31: the sum of a row fits 32 bits

struct W8A8Params {
  const uint8_t* qweight;     // [N, K]       two's complement
  const void* scales;         // [N]
  const void* x;              // [tokens, K]  read where the kernel quantizes, of x_dtype
  const float* input_scale;   // [1] or null: likewise
  const int8_t* codes;        // [tokens, K]  read where it does not
  const float* token_scales;  // [tokens]     likewise
  const void* bias;           // [N] or null
  void* y;                    // [tokens, N]  of x_dtype
  int64_t tokens;             // M
  int64_t out_features;       // N
  int64_t in_features;        // K, a multiple of 16, at most kMostColumnsW8A8
  DType scale_dtype;
  DType x_dtype;
  DType bias_dtype;
  uint32_t token_blocks;      // set by the launcher: thread blocks side by side for other tokens
};

// Whether the kernel quantizes x itself.
//
// A launch of its own for the tokens is about 3 us between two kernels that depend on each other (1 to 2 in a graph), where 4096 x 4096
// weights take 5 us from memory. In the kernel, each thread block has to read all of its tokens before its first product. That is a
// load from L2, a reduction and two barriers, some 0.8 us with the first weights on their way meanwhile, and 9 instructions per number: 0.08 ns
// of a multiprocessor that two thread blocks share, so that 2^14 numbers come to 1.3 us. A thread block with 16 rows has 16 K bytes
// of weights, which leave 3.3 K issue slots at 20 bytes per clock; 4 tokens take a third of them. Not measured: reasoned.
constexpr int64_t kMostTokensInside = 4, kMostNumbersInside = int64_t{1} << 14;
inline bool quantizes_inside(int64_t tokens, int64_t in_features) {
  return tokens <= kMostTokensInside && tokens * in_features <= kMostNumbersInside;
}

const char* launch_w8a8(const W8A8Params& params, cudaStream_t stream);

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
