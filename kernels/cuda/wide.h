// The part of hfq::cuda_linear for 1 to 16 tokens on compute capability 9.0 with many rows for each read of x.
#pragma once

#include "linear.h"

namespace hfq {

constexpr int kMostWideTokens = 16;
constexpr int kMostWideSplits = 8;  // thread blocks of a cluster, as any GPU of compute capability 9.0 takes them

// How a product is shared out. Thread blocks of neighbouring rows have as many tiles, or one less; those of a cluster share the columns of the same
// rows.
struct WidePlan {
  int32_t groups;  // of rows: clusters; 0 if none runs
  int32_t splits;  // thread blocks of a cluster
  int32_t warps;   // of a thread block
  int32_t room;    // for so many thread blocks a multiprocessor is to have room; 0: for any number
};

struct WideParams : LinearParams {
  WidePlan plan;
  uint32_t tiles, more;  // of a group at least, and how many groups, the first ones, have one more
  uint32_t steps;        // of columns
  uint32_t stride;       // of a warp: splits times warps of a thread block
  uint32_t code_blocks;  // that are stored of a tile
  uint32_t tile_bytes;   // of codes
  uint32_t group_bytes;  // of the 8 pairs of a group of columns and a tile
  uint32_t pairs_bytes;  // of those of a tile
  uint32_t of_splits;    // the reciprocal
};

// What a kernel may have: tiles of a thread block, warps of a multiprocessor, and shared memory; what x of a step costs, in tiles; and how many
// clusters of so many thread blocks run at a time if each has a multiprocessor.
struct WideShape {
  int32_t tiles, warps;
  size_t warp_bytes, table_bytes, sums_bytes;  // the last of a thread block of a cluster
  float x;
  int (*active_clusters)(int splits);
};

WidePlan plan_wide(int64_t tiles, int64_t steps, const WideShape& shape);

// Whether launch_linear takes these kernels: where they are faster than others, unless HFQ_CUDA_WIDE is 0; with 1 wherever they run.
bool takes_wide(const LinearParams& params);

// Whether the kernels are there for the current device.
bool wide_was_compiled();

// One for each kind of codes, so that they are compiled side by side; called by launch_linear.
const char* launch_wide_int2(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int3(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int4(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int8(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_table4(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_e4m3(const LinearParams& params, cudaStream_t stream);

}  // namespace hfq
