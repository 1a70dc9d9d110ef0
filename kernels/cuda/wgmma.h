// The part of hfq::cuda_linear for 9 and more tokens on compute capability 9.0, with instructions of four warps (wgmma).
#pragma once

#include "linear.h"
#include "target.h"

namespace hfq {

constexpr int kWgmmaColumns = 128;  // of a stage
constexpr int kStagedTokens = 64;   // of a thread block of wgmma_staged.h, or a half or a quarter of it
constexpr int kPairTokens = 256;    // of one of wgmma_pair.h, or half of it
constexpr int kPairRows = 256;      // of the two that are a pair
// Of shared memory: all that a thread block may have. 28 KiB are left to the L1 cache.
constexpr int kMostWgmmaBytes = 227 << 10;

// wgmma_ranges.h: all tiles of the output stand in a row, of each its chunks of kWgmmaColumns columns, and each cluster has a range of it: range r is
// units [r * units / ranges, (r + 1) * units / ranges). A unit is a chunk, or a tile with all its chunks. units * ranges < 2^32.
struct RangePlan {
  uint32_t units;                    // of all tiles
  uint32_t tile_units, unit_chunks;  // units of a tile, chunks of a unit
  uint32_t ranges;                   // 0 if none runs
  // Reciprocals of units, of ranges, and of a tile's chunks.
  uint32_t of_units, of_ranges, of_tile_chunks;

  // Where a range begins: behind so many chunks of all tiles.
  __host__ __device__ uint32_t first_chunk(uint32_t range) const { return quotient(range * units, ranges, of_ranges) * unit_chunks; }
  __host__ __device__ uint32_t tile_chunks() const { return tile_units * unit_chunks; }
  // The tile of a chunk of all.
  __host__ __device__ uint32_t tile_of(uint32_t chunk) const { return quotient(chunk, tile_chunks(), of_tile_chunks); }
  // The last one that has chunks of a tile.
  __host__ __device__ uint32_t last_range(uint32_t tile) const { return quotient((tile + 1) * tile_units * ranges - 1, units, of_units); }
};

struct WgmmaParams : LinearParams {
  RangePlan cut;
  uint32_t of_token_tiles;           // the reciprocal
  uint32_t tiles;                    // of 16 rows
  uint32_t tile_bytes, scale_bytes;  // of the codes of one, of its scales
  uint64_t tag;     // that no other launch of this process has, and not 0
  uint64_t* flags;  // [ranges, blocks of a cluster], any numbers: the tag once a block has written its partial sums
  float* partials;  // [ranges, blocks of a cluster, n, threads that multiply, 4], as many numbers as its rows have tokens
};

// What the thread blocks of a cluster take, and the clocks that it takes: a chunk of a tile, beginning and end, until a block's partial sums are
// written, and to read them.
struct RangeShape {
  int32_t rows, tokens, blocks;  // rows of all of them
  int64_t chunk, start, write, read;
};

// Of a product that takes these kernels.
RangeShape range_shape(const LinearParams& params);
// For so many clusters that run at a time.
RangePlan plan_ranges(const LinearParams& params, const RangeShape& shape, int active);
// Sets where flags and partial sums are in the workspace, and the tag.
void place_ranges(WgmmaParams& params, const RangeShape& shape);

// Whether launch_linear takes these kernels for more than few tokens: where they are faster than gemm_kernel.h, unless HFQ_CUDA_WGMMA is 0; with 1 or
// "pairs" elsewhere as well. (wide.h goes first.)
bool takes_wgmma(const LinearParams& params);

// Whether a product that takes them takes pairs, for which weights are rounded to 16 bits: more than 64 tokens, unless it would not be right; with
// HFQ_CUDA_WGMMA=pairs even then. Else it takes staged blocks.
bool takes_pairs(const LinearParams& params);

// Floats of the workspace of a product that takes these kernels.
int64_t wgmma_workspace(const LinearParams& params);

// Of x in the order of pairs; and what enqueues the kernel that writes it to the workspace so (wgmma_tokens.cu). Words and pieces of 16 bytes are in
// the places of wgmma_block.h; numbers of tokens and columns that do not exist are zeros.
int64_t arranged_floats(const LinearParams& params);
const char* launch_arrange(const LinearParams& params, cudaStream_t stream);

// Whether the kernels are there for the current device: those of a build for sm_90 without the "a" are empty.
bool wgmma_was_compiled();

// Enqueues the kernel; launch_linear has set what is the launcher's to set in LinearParams.
const char* launch_wgmma(const LinearParams& params, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_wgmma and takes_wgmma.
const char* launch_wgmma_int2(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int2(const LinearParams& params);
const char* launch_wgmma_int3(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int3(const LinearParams& params);
const char* launch_wgmma_int4(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int4(const LinearParams& params);
const char* launch_wgmma_int8(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int8(const LinearParams& params);
const char* launch_wgmma_table4(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_table4(const LinearParams& params);
const char* launch_wgmma_e4m3(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_e4m3(const LinearParams& params);

}  // namespace hfq
