// Which tokens of which expert a thread block multiplies, from the counts of tokens of each.
//
// The runs of up to kTokens tokens of one expert are numbered over all experts; a thread block finds the owner of its number. There are
// never more runs than M / kTokens plus one for each expert that can have tokens, so the grid is known without the counts: with 8 tokens of one of
// 128 experts each, 8 runs and no 128. Blocks behind the last run end at once.
#pragma once

#include "experts.h"
#include "fragments.h"

namespace hfq {

// Tokens `first` to `end` of x meet the weight of `expert`; E: none, they are behind the sum of counts.
struct Run {
  uint32_t expert, first, end;
};

// Each warp by itself: the same loads hit L1, and no barrier is needed. A lane takes E / 32 experts that are neighbours.
template <uint32_t kTokens>
__device__ __forceinline__ Run find_run(const Routing& p, uint32_t tokens, uint32_t slot) {
  const uint32_t lane = threadIdx.x % 32, experts = static_cast<uint32_t>(p.experts);
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
    all_tokens += count, all_runs += (count + kTokens - 1) / kTokens;
  }
  const uint32_t own_runs = all_runs;
#pragma unroll
  for (uint32_t step = 1; step < 32; step *= 2) {
    const uint32_t other_tokens = shuffle_xor(all_tokens, step), other_runs = shuffle_xor(all_runs, step);
    if (lane & step) first += other_tokens, run += other_runs;
    all_tokens += other_tokens, all_runs += other_runs;
  }

  Run found = {experts, all_tokens + kTokens * (slot - all_runs), tokens};
  if (slot < all_runs) {  // the same in all lanes
    const bool mine = slot >= run && slot - run < own_runs;
    if (mine) {
      uint32_t expert = begin, count = count_of(begin);
      while (slot - run >= (count + kTokens - 1) / kTokens) {
        run += (count + kTokens - 1) / kTokens, first += count;
        count = count_of(++expert);
      }
      const uint32_t skipped = kTokens * (slot - run);
      found = {expert, first + skipped, first + count};
    }
    const int owner = first_lane(mine);
    found = {shuffle_from(found.expert, owner), shuffle_from(found.first, owner), shuffle_from(found.end, owner)};
  }
  // Counts may add up to anything.
  found.end = found.end < tokens ? found.end : tokens;
  found.end = found.end < found.first + kTokens ? found.end : found.first + kTokens;
  return found;
}

// Columns `first_row` on, at most `rows` of them, of the run's tokens in y `[M, out_features]`: zeros, for they belong to no expert. By `threads`
// threads.
template <class Number>
__device__ __forceinline__ void store_zeros(Number* y, int64_t out_features, const Run& run, int64_t first_row, uint32_t rows, uint32_t threads) {
  const uint32_t width = static_cast<uint32_t>(out_features - first_row < rows ? out_features - first_row : rows);
  for (uint32_t i = threadIdx.x; i < (run.end - run.first) * width; i += threads)
    store(y + (run.first + i / width) * out_features + first_row + i % width, Number{0});
}

}  // namespace hfq
