// When wide_kernel.h is taken, and how a product is cut into clusters of thread blocks.
#include "wide.h"

#include "target.h"

namespace hfq {

bool takes_wide(const LinearParams& p) {
  const Weight& w = p.weight;
  // E4M3 in groups of 64 has no kernels: launch_wide_tokens.
  const bool groups = w.groups == 1 || w.group_size % 128 == 0 || (w.group_size % 64 == 0 && !(w.codebook && w.bits == 8));
  return p.tokens <= kMostWideTokens && groups && tried("wide") && compute_capability() == 90;
}

// Multiprocessors have their thread blocks' steps to do, which take turns; one of few warps alone leaves its schedulers idle half of the time. A
// block's beginning and end count as a step: with one step a warp, nothing would be ahead of anything.
int32_t wide_splits(int64_t blocks, int64_t steps, int warps) {
  const int64_t count = multiprocessors(), least_at_once = 8 / warps;
  int32_t best = 1;
  int64_t least = 0;
  for (int32_t splits = 1; splits <= kMostWideSplits && (splits == 1 || splits * warps <= steps); ++splits) {
    const int64_t at_once = divided(blocks * splits, count > 0 ? count : 1);
    const int64_t clocks = (at_once > least_at_once ? at_once : least_at_once) * (divided(steps, splits * warps) + 1);
    if (least == 0 || clocks < least) best = splits, least = clocks;
  }
  return best;
}

}  // namespace hfq
