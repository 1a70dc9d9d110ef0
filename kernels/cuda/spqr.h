// hfq::cuda_spqr_linear, cuda_spqr_dequantize and cuda_spqr_lookup: a weight of format "spqr" as the kernels for CUDA take it. Layouts of
// codes: hfq/kernels/spqr_fragments.py; what the tensors mean: hfq/formats/spqr.py.
#pragma once

#include "experts.h"

namespace hfq {

constexpr int kHalfColumns = 16;  // columns of one matrix instruction: a group may end behind each

struct SpqrWeight {
  const uint8_t* qweight;     // [N16, C, 32 | 48, 16]  as in weight.h, columns in another order
  const uint8_t* stat_codes;  // [N16, H, 8, 2 | 4]     rows g and g + 8: scale, zero point, scale, zero point, in 4 or 8 bits each
  const void* stats;          // [R, G, 4]              step and offset of scales, step and offset of zero points
  const int32_t* offsets;     // [N + 1]                outliers of row n: offsets[n] to offsets[n + 1]
  const void* columns;        // [Z]                    int16 or int32
  const void* values;         // [Z]                    added to the dense weight
  int64_t out_features;       // N
  int64_t in_features;        // K, a multiple of 8
  int64_t groups;             // G
  int64_t stat_groups;        // H, G or one more: what the bytes of a stored row have room for
  int64_t group_size;         // a multiple of 16, or at least K
  int64_t rows_per_stat;      // a multiple of 16
  int64_t outliers;           // Z, below 2^31
  int32_t bits;               // 2, 3 or 4
  int32_t wide_codes;         // codes of scales have 8 bits, not 4
  int32_t wide_columns;       // int32
  DType stat_dtype;           // of stats and values
};

// Of a group's parts.
inline uint32_t group_magic(const SpqrWeight& w, int64_t part_columns) {
  return part_magic(w.groups > 1 ? w.group_size : w.in_features, part_columns);
}

struct SpqrLinearParams {
  SpqrWeight weight;
  const void* x;         // [tokens, K]
  const void* bias;      // [N] or null
  void* y;               // [tokens, N]
  int64_t tokens;        // M
  DType x_dtype;         // of x and y: kFloat16 or kBFloat16
  DType bias_dtype;
  float* workspace;      // as many floats as spqr_workspace says
  // What follows is set by the launcher.
  uint32_t short_groups;  // groups may end behind 16 columns, not only behind 32
  uint32_t last_group;    // G - 1
  uint32_t group_magic;   // of parts of 16 or 32 columns
  // A warp's ring (spqr_ring.h).
  uint32_t row_bytes;     // of a token's activations
  uint32_t steps;         // of 128 columns
  uint32_t last_step;     // that is copied when all are multiplied
  uint32_t stages;        // 2, 3, 4 or 6
  uint32_t stage_bytes;
  uint32_t tile_stats;    // bytes of a stage's codes of scales and lines of one tile
  uint32_t stage_tokens;  // that a stage has room for
  uint32_t ring_bytes;    // stages that the columns have no use for are left out
};

struct SpqrExpertsParams {
  SpqrLinearParams linear;  // weight: that of expert 0; bias [E, N] or null; x and y of all tokens
  Routing routing;          // scale_bytes: of stat_codes
  int64_t stat_bytes;       // from one expert's stats to the next
};

struct SpqrUnpackParams {
  SpqrWeight weight;
  const int64_t* index;  // [rows] which rows, or null: all, in order
  void* y;               // [rows, K]
  int64_t rows;          // T, or N
  DType y_dtype;
  // What follows is set by the launcher.
  uint32_t group_magic;     // of parts of 16 columns
  uint32_t tiles_per_stat;  // of 16 rows
};

// Floats of memory that the kernels need, aligned to 16 bytes; on the current device, which is that of the launch.
int64_t spqr_workspace(const SpqrLinearParams& params);
int64_t spqr_workspace(const SpqrExpertsParams& params);

// Enqueue the kernels. Return null, or CUDA's description of the error. K below 2^19.
const char* launch_spqr_linear(const SpqrLinearParams& params, cudaStream_t stream);
const char* launch_spqr_unpack(const SpqrUnpackParams& params, cudaStream_t stream);

// As launch_experts, with the same limits.
const char* launch_spqr_experts(const SpqrExpertsParams& params, cudaStream_t stream);

// One for each number of bits, so that they are compiled side by side; called by launch_spqr_linear and launch_spqr_experts.
const char* launch_spqr_linear2(const SpqrLinearParams& params, cudaStream_t stream);
const char* launch_spqr_linear3(const SpqrLinearParams& params, cudaStream_t stream);
const char* launch_spqr_linear4(const SpqrLinearParams& params, cudaStream_t stream);
const char* launch_spqr_experts2(const SpqrExpertsParams& params, cudaStream_t stream);
const char* launch_spqr_experts3(const SpqrExpertsParams& params, cudaStream_t stream);
const char* launch_spqr_experts4(const SpqrExpertsParams& params, cudaStream_t stream);

}  // namespace hfq
