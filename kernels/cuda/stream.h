// The part of hfq::cuda_linear for few tokens on compute capability 9.0 and later: thread blocks that go through many tiles (stream_kernel.h).
#pragma once

#include "linear.h"

namespace hfq {

constexpr int kStreamWarps = 8;          // that multiply
constexpr int kStreamStepColumns = 128;  // of a warp in a stage
constexpr int kStageColumns = kStreamWarps * kStreamStepColumns, kStageUnits = kStageColumns / kUnitColumns;
constexpr uint32_t kMostStreamStages = 24;
constexpr int64_t kMostStreamTokens = 16;

// Tiles of rows that are multiplied at a time: two share loads of activations, and do not wait for each other. 8-bit codes are bytes enough, and two
// token tiles leave no registers.
constexpr int stream_tiles(int bits, int token_tiles) { return bits == 8 || token_tiles > 1 ? 1 : 2; }

// Whether products need sums of activations: for zero points, or for raw numbers (fragments.h).
constexpr bool needs_x_sums(int bits, bool zeros, bool codebook, DType dtype) { return zeros || (bits == 4 && !codebook && dtype == kBFloat16); }

// Shared memory: the table of a codebook, sums of all warps, three rounds of this block's sums for its cluster, barriers, activations,
// their sums, the ring.
struct StreamPlaces {
  uint32_t partial, block_sums, barriers, x;
};
constexpr StreamPlaces stream_places(int tiles, int token_tiles, bool table) {
  const uint32_t sums = static_cast<uint32_t>(tiles * token_tiles) * 512, partial = table ? 32 << 10 : 0;
  const uint32_t block_sums = partial + kStreamWarps * sums, barriers = block_sums + 3 * sums;
  return {partial, block_sums, barriers, barriers + 512};
}

struct StreamPlan {
  uint32_t splits;        // thread blocks that share the columns: a cluster of 2^split_bits; 0: the product does not fit
  uint32_t split_bits;
  uint32_t slice_steps;   // steps of columns of each of them
  uint32_t ring_stages, stage_bytes;
  uint32_t pairs_bytes;   // room for scales, or for zero points, of a tile in a stage
  uint32_t x_stride, x_bytes;  // from a token's activations to the next one's; of all
  uint32_t x_sums_bytes;       // of sums of activations, where they are needed
  uint32_t group_bits;         // 2^group_bits units have one such sum
  uint32_t shared_bytes;
};

struct StreamParams : LinearParams {
  StreamPlan plan;
  uint32_t clusters, tiles_of_cluster, more_tiles;  // the first `more_tiles` clusters have one more
};

// How the product is cut, without splits if it is not: it has up to 16 tokens, HFQ_CUDA_STREAM is 1, and activations fit into shared memory.
StreamPlan plan_stream(const LinearParams& params);

// Whether the kernels are there for the current device: those of a build for older ones are empty. How many clusters of so many blocks run at a
// time, each block on a multiprocessor of its own.
bool stream_was_compiled();
int stream_clusters(uint32_t blocks);

// Enqueues the kernel; launch_linear has set what is the launcher's to set in LinearParams.
const char* launch_stream(const LinearParams& params, const StreamPlan& plan, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_stream.
const char* launch_stream_int2(const StreamParams& params, cudaStream_t stream);
const char* launch_stream_int3(const StreamParams& params, cudaStream_t stream);
const char* launch_stream_int4(const StreamParams& params, cudaStream_t stream);
const char* launch_stream_int8(const StreamParams& params, cudaStream_t stream);
const char* launch_stream_table4(const StreamParams& params, cudaStream_t stream);
const char* launch_stream_e4m3(const StreamParams& params, cudaStream_t stream);

}  // namespace hfq
