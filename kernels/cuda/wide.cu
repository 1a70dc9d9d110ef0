// When wide_kernel.h is taken, and how a product is cut into clusters of thread blocks.
#include "wide.h"

#include "target.h"

namespace hfq {

namespace {

// Of a weight: from so many numbers on these kernels are faster. Measured on an H200, in us, 4096 x 4096 (2^24) and 4096 x 14336: one token in nf4
// 6.2 beside 5.4 and 11.6 beside 14.3; 8 tokens in int4 5.6 beside 6.1 and 10.1 beside 13.8; 16 tokens 6.5 beside 8.4 and 12.5 beside 15.9, and 4.6
// beside 10.2 for 4096 x 1024. One token in digits takes 9.0 of 4096 x 14336, 9.8 here; 36.4 of 8192 x 28672, 31.8 here.
int64_t least_numbers(const LinearParams& p) {
  if (p.tokens > 8) return 0;
  if (p.tokens > 4 && !(p.weight.codebook && p.weight.bits == 4)) return int64_t{1} << 24;
  return takes_digits(p) ? int64_t{1} << 27 : int64_t{3} << 23;
}

}  // namespace

bool takes_wide(const LinearParams& p) {
  constexpr const char* kVariable = "HFQ_CUDA_WIDE";
  const Weight& w = p.weight;
  // E4M3 in groups of 64 has no kernels: launch_wide_tokens.
  const bool groups = w.groups == 1 || w.group_size % 128 == 0 || (w.group_size % 64 == 0 && !(w.codebook && w.bits == 8));
  if (p.tokens > kMostWideTokens || !groups || is_set(kVariable, "0")) return false;
  if (w.out_features * w.in_features < least_numbers(p) && !is_set(kVariable, "1")) return false;
  return compute_capability() == 90 && wide_was_compiled();
}

// Estimated, in the time that a multiprocessor takes for a tile of a step (28 ns with 16 tokens on an H200): what it has to do, however many warps do
// it; what each warp waits for by itself; and what a cluster takes for its sums. Of some 40 plans it chose the fastest, or one that took up to 9 %
// longer (1 % in the mean), for 32 products there: int4, int8 and nf4, 1 to 16 tokens, 17 M to 235 M weights; and of up to 103 plans with 4 tiles in
// place of 8 (int4 with 16 tokens, nf4 with one, three large weights) the fastest or 2 % longer, but for two things that it does not see: blocks of
// 14 warps, which leave no room for the next kernel's, are slower than it thinks and no choice, and with a table those of 12 are (14336 x 4096: 12.5
// us, 11.7 with 8).
//
// As many groups as run at a time, or a multiple: what mattered most. With 128 thread blocks for 132 multiprocessors the next kernel, which starts
// early, puts two of its own onto each of the four that are free, and they take twice as long (4096 x 14336, 8 tokens: 14.0 us, 10.1 with 132). For
// the same reason a multiprocessor has room for as many of them as each gets, or a multiple, and not for one more (16 tokens, nf4: 18.1 us, 14.0 so).
WidePlan plan_wide(int64_t tiles, int64_t steps, const WideShape& shape) {
  constexpr int kWarps[] = {4, 6, 8, 12};
  constexpr float kAlone = 2.5f, kCluster = 30;
  const size_t most_shared = most_shared_bytes() + kReservedShared;
  WidePlan best = {};
  float least = 0;
  for (int splits = 1; splits <= kMostWideSplits; ++splits) {
    const int64_t active = shape.active_clusters(splits);
    if (active == 0) continue;
    for (const int warps : kWarps) {
      if ((splits > 1 || warps > kWarps[0]) && splits * warps > steps) continue;  // some would have nothing to do
      if (shape.table_bytes && warps > 8) continue;
      const size_t needed = shape.table_bytes + warps * shape.warp_bytes + (splits > 1 ? shape.sums_bytes : 0);
      const size_t room = most_shared / (needed + kReservedShared);
      const int64_t at_once = room < static_cast<size_t>(shape.warps / warps) ? room : shape.warps / warps;
      const int64_t fewest = divided(tiles, active * shape.tiles);
      if (at_once == 0) continue;
      for (int64_t each = fewest; each < fewest + 3; ++each) {  // groups of a multiprocessor
        const int64_t groups = active * each < tiles ? active * each : tiles;
        const float of_warp = divided(steps, splits * warps) * (divided(tiles, groups) + shape.x);
        const float time = each * warps * of_warp + kAlone * divided(each, at_once) * of_warp + (splits > 1 ? kCluster * each : 0);
        if (least == 0 || time < least)
          best = {static_cast<int32_t>(groups), splits, warps, static_cast<int32_t>(at_once / each * each)}, least = time;
      }
    }
  }
  return best;
}

}  // namespace hfq
