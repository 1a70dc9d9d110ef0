// The kernel of cuda_experts_linear, for one kind of codes in each file that includes this.
//
// A thread block takes tiles of 16 rows of one expert and up to 8 of its tokens: what a block of linear_kernel.h does, with pointers moved
// to the expert. Which expert and tokens follows from the counts: the runs of 8 tokens of all experts are numbered, and a block finds
// the owner of its number. There are never more runs than M / 8 plus one for each expert that can have tokens, so the grid is known without
// the counts: with 8 tokens of one of 128 experts each, 8 runs and no 128. Blocks behind the last run end at once.
#pragma once

#include "experts.h"
#include "linear_kernel.h"

namespace hfq {
namespace {

// Tokens `first` to `end` of x meet the weight of `expert`; E: none, they are behind the sum of counts.
struct Run {
  uint32_t expert, first, end;
};

// Each warp by itself: the same loads hit L1, and no barrier is needed. A lane takes E / 32 experts that are neighbours.
__device__ __forceinline__ Run find_run(const ExpertsParams& p, uint32_t slot) {
  const uint32_t lane = threadIdx.x % 32, tokens = static_cast<uint32_t>(p.linear.tokens), experts = static_cast<uint32_t>(p.experts);
  const uint32_t each = (experts + 31) / 32, begin = lane * each < experts ? lane * each : experts;
  const uint32_t end = begin + each < experts ? begin + each : experts;
  const auto count_of = [&](uint32_t expert) {
    const int64_t count = load_written(p.counts + expert);
    return count < 0 ? 0 : count < tokens ? static_cast<uint32_t>(count) : tokens;
  };

  // Tokens and runs of the lane, then of all lanes below it, and of all lanes.
  uint32_t all_tokens = 0, all_runs = 0, first = 0, run = 0;
  for (uint32_t expert = begin; expert < end; ++expert) {
    const uint32_t count = count_of(expert);
    all_tokens += count, all_runs += (count + 7) / 8;
  }
  const uint32_t own_runs = all_runs;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other_tokens = shuffle_xor(all_tokens, step), other_runs = shuffle_xor(all_runs, step);
    if (lane & step) first += other_tokens, run += other_runs;
    all_tokens += other_tokens, all_runs += other_runs;
  }

  Run found = {experts, all_tokens + 8 * (slot - all_runs), tokens};
  if (slot < all_runs) {  // the same in all lanes
    const bool mine = slot >= run && slot - run < own_runs;
    if (mine) {
      uint32_t expert = begin, count = count_of(begin);
      while (slot - run >= (count + 7) / 8) {
        run += (count + 7) / 8, first += count;
        count = count_of(++expert);
      }
      const uint32_t skipped = 8 * (slot - run);
      found = {expert, first + skipped, first + count};
    }
    const int owner = first_lane(mine);
    found = {shuffle_from(found.expert, owner), shuffle_from(found.first, owner), shuffle_from(found.end, owner)};
  }
  // Counts may add up to anything.
  found.end = found.end < tokens ? found.end : tokens;
  found.end = found.end < found.first + 8 ? found.end : found.first + 8;
  return found;
}

template <class Kind, class T, bool kZeros, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) experts_kernel(const ExpertsParams p) {
  // Neighbouring thread blocks read the same weights if their expert has many tokens: the second finds them in L2.
  const int64_t first_tile = static_cast<int64_t>(blockIdx.x / p.slots) * kTiles;
  wait_for_previous_kernel();  // counts
  const Run run = find_run(p, blockIdx.x % p.slots);
  if (run.first >= run.end) return;
  if (run.expert == p.experts) {
    const int64_t rows = p.linear.weight.out_features, n = first_tile * kTileRows;
    const uint32_t width = static_cast<uint32_t>(rows - n < kTiles * kTileRows ? rows - n : kTiles * kTileRows);
    for (uint32_t i = threadIdx.x; i < (run.end - run.first) * width; i += kThreads)
      store(static_cast<uint16_t*>(p.linear.y) + (run.first + i / width) * rows + n + i % width, uint16_t{0});
    return;
  }
  LinearParams own = p.linear;
  own.weight.qweight += run.expert * p.qweight_bytes;
  own.weight.scales = static_cast<const uint8_t*>(own.weight.scales) + run.expert * p.scale_bytes;
  if constexpr (kZeros) own.weight.zeros = static_cast<const uint8_t*>(own.weight.zeros) + run.expert * p.scale_bytes;
  if (own.bias) own.bias = static_cast<const uint8_t*>(own.bias) + run.expert * p.bias_bytes;
  own.tokens = run.end;
  linear_block<Kind, T, kZeros, kTiles>(own, first_tile, run.first);
}

// ---- launcher ----

template <class Kind, class T, bool kZeros, int kTiles>
const char* launch_expert_tiles(const ExpertsParams& params, cudaStream_t stream) {
  ExpertsParams p = params;
  const size_t shared = plan_ring<Kind, kZeros, kTiles>(p.linear, p.linear.tokens < 8 ? p.linear.tokens : 8);
  const int64_t tiles = (p.linear.weight.out_features + kTileRows - 1) / kTileRows;
  const unsigned blocks = static_cast<unsigned>((tiles + kTiles - 1) / kTiles * p.slots);
  return launch_early(experts_kernel<Kind, T, kZeros, kTiles>, blocks, kThreads, shared, stream, p);
}

template <class Kind, class T>
const char* launch_expert_dtype(const ExpertsParams& p, cudaStream_t stream) {
  if constexpr (!Kind::kTable)
    if (p.linear.weight.zeros) return launch_expert_tiles<Kind, T, true, 1>(p, stream);
  // As in linear_kernel.h: two tiles share activations where each expert has several tokens and there are tiles for all multiprocessors.
  const int64_t tiles = (p.linear.weight.out_features + kTileRows - 1) / kTileRows;
  if (p.linear.tokens > 2 * p.experts && tiles * p.slots >= int64_t{4} * multiprocessors())
    return launch_expert_tiles<Kind, T, false, 2>(p, stream);
  return launch_expert_tiles<Kind, T, false, 1>(p, stream);
}

template <class Kind>
const char* launch_experts_of(const ExpertsParams& p, cudaStream_t stream) {
  return p.linear.x_dtype == kBFloat16 ? launch_expert_dtype<Kind, BFloat16>(p, stream) : launch_expert_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
