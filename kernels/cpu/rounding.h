// Arguments of the kernels that choose codes while a model is quantized. As rows16.h: plain data and raw pointers, no functions.
#pragma once

#include <cstdint>

#include "rows16.h"

namespace hfq {

constexpr int64_t kTileRows = 64;  // rows that round_columns() takes at once

// The loop of hfq/core/columns.py: B columns of N weights, one after the other, a column in one run of memory.
struct RoundParams {
  int64_t columns;        // B
  int64_t rows;           // N
  const float* targets;   // [B, N] what the codes should stand for, without corrections
  const float* origins;   // [B, N] a column's change is its origin less its rounded value
  const float* asked;     // [B, B] asked[i, j]: what a change of 1 in column j < i adds to the target of column i
  const int32_t* groups;  // [B] the group of each column
  const float* scales;    // [G, N]
  const float* zeros;     // [G, N]; null: `zero` everywhere
  const float* codebook;  // [16] or null
  float zero;
  float most;             // the largest code
  uint8_t* codes;         // [B, N]
  float* changes;         // [B, N]
};

// The search of hfq/core/fit.py: for each group of each row the best of some grids and of what least squares makes of them.
struct SearchParams {
  int64_t rows;             // N
  int64_t columns;          // K
  int64_t group_size;
  int64_t groups;           // G
  int64_t starts;           // A
  int64_t turns;
  const float* weight;      // [N, K]
  const float* importance;  // [K] or [N, K], null: all count the same
  bool importance_of_rows;  // [N, K]
  const float* scales;      // [A, N, G]
  const float* zeros;       // [A, N, G]; null: `zero` everywhere, and only scales are fitted
  const float* codebook;    // [16] or null
  float zero;
  float most;
  DType dtype;              // that scales and zero points are stored in
  float* best_scales;       // [N, G]
  float* best_zeros;        // [N, G]
};

}  // namespace hfq
