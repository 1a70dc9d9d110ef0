// The part of hfq::cuda_linear for 1 to 16 tokens on compute capability 9.0 with many rows for each read of x.
#pragma once

#include "linear.h"

namespace hfq {

constexpr int kMostWideTokens = 16;
constexpr int kMostWideSplits = 8;  // thread blocks of a cluster, as any GPU of compute capability 9.0 takes them

struct WideParams : LinearParams {
  int32_t splits;         // thread blocks that share the columns of the same rows: a cluster
  uint32_t steps;         // of columns
  uint32_t stride;        // of a warp: splits times warps of a thread block
  uint32_t code_blocks;   // that are stored of a tile
  uint32_t tile_bytes;    // of codes
  uint32_t group_bytes;   // of the 8 pairs of a group and a tile
};

// Whether launch_linear takes these kernels.
bool takes_wide(const LinearParams& params);

// Into how many thread blocks of `warps` each of `blocks` is cut, for which there are `steps` steps of columns.
int32_t wide_splits(int64_t blocks, int64_t steps, int warps);

// One for each kind of codes, so that they are compiled side by side; called by launch_linear.
const char* launch_wide_int2(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int3(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int4(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_int8(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_table4(const LinearParams& params, cudaStream_t stream);
const char* launch_wide_e4m3(const LinearParams& params, cudaStream_t stream);

}  // namespace hfq
