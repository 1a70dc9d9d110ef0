// Arguments of the kernels of format "spqr" (hfq/formats/spqr.py). As rows16.h: plain data and raw pointers, no functions.
//
// Names: M tokens, N out_features, K in_features, G groups of `group_size` columns, Z outliers; U = ceil(K / 32) units of 32 columns, whose
// codes fill `bits` whole words.
//
//   qweight     uint8 [ceil(N/16), W, 16, 4]   line (b, w) as in rows16.h; code k of a row is bits [bits*k, bits*(k+1)) of its words
//   stat_codes  uint8 [ceil(N/16), V, 16, 4]   codes of scale and zero point of group g: bits [2*stat_bits*g, ...) of the row's words
//   stats       float [R, G, 4]                step and offset of scales, step and offset of zero points; 16 rows of a block share them
//   offsets     int32 [N + 1]                  outliers of row n: offsets[n] to offsets[n + 1]
//   columns     int16 or int32 [Z]             ascending within a row
//   values      float [Z]                      added to the dense weight
#pragma once

#include <cstddef>
#include <cstdint>

#include "rows16.h"

namespace hfq {

constexpr int64_t kUnit = 32;  // columns per unit
constexpr int64_t kQuad = 4;   // group sizes are multiples of this, so that a unit can be unrolled without knowing them

struct SpqrWeight {
  int64_t in_features;     // K
  int64_t out_features;    // N
  int64_t words;           // W
  int64_t stat_words;      // V
  int64_t group_size;
  int64_t groups;          // G
  int64_t rows_per_stat;   // stat_group_size, a multiple of 16
  int64_t outliers;        // Z
  int32_t bits;            // 2, 3 or 4
  int32_t stat_bits;       // 2 .. 8
  const uint8_t* qweight;
  const uint8_t* stat_codes;
  const void* stats;
  const int32_t* offsets;
  const void* columns;
  const void* values;
  DType stat_dtype;        // of stats and values
  bool wide_columns;       // int32
};

struct SpqrLinearParams {
  SpqrWeight weight;
  const void* bias;        // [N] or null
  DType bias_dtype;
  DType x_dtype;           // of x and y
  int32_t tokens;          // 1 .. spqr_max_tokens
  const void* x;           // [tokens, K]
  float* values;           // [U, tokens, 32] x as fp32, zero beyond K: written by prepare, read by linear
  float* group_sums;       // [G, tokens] likewise, the sum of x over each group
  void* y;                 // [tokens, N]
};

struct SpqrDequantizeParams {
  SpqrWeight weight;
  DType y_dtype;
  void* y;                 // [N, K]
};

}  // namespace hfq
