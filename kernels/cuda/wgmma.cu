// When wgmma is taken, and how a product is cut into clusters of thread blocks, or into ranges.
#include "wgmma.h"

#include <map>
#include <tuple>

#include "target.h"

namespace hfq {
namespace {

// Published figures of an H100; none was measured with these kernels.
constexpr float kBytesPerClock = 28;         // from L2 to a multiprocessor
constexpr float kProductsPerClock = 2048;    // of tensor cores
constexpr float kStartClocks = 2000;         // until a block's first stage is there, and its sums have gone
constexpr float kClusterClocks = 1500;       // two barriers of a cluster, and the way to a neighbour's shared memory
constexpr float kClusterBytesPerClock = 16;  // from there

// Of pairs: a chunk, beginning and end, to write a block's partial sums of a tile or to read them. Measured on an H200: 4096 x 14336 with 256 tokens
// took 49.4 us for 32 chunks, 14336 x 4096 with partial sums 64.1 for 38. (`partial` is reckoned.)
constexpr struct {
  int64_t chunk, start, partial;
} kPairClocks = {2500, 6500, 2500};

// Of a weight. Measured on an H200, in us (K x N): 16 tokens of 4096 x 4096 take 9.2, 8.3 with gemm_kernel.h; of 4096 x 14336 15.7 and 21.2.
// 128 tokens of 4096 x 4096 take 22.7 in large blocks, of which there are few, 20.8 in others; of 4096 x 14336 32 and 50, of 14336 x 4096 42 and 59,
// of 8192 x 28672 109 and 218. (64 tokens in large blocks of as many were slower everywhere: 32.8 beside 29.6.)
constexpr int64_t kSmall = int64_t{1} << 25;

int64_t numbers(const LinearParams& p) { return p.weight.out_features * p.weight.in_features; }

bool wanted(const char* value) { return is_set("HFQ_CUDA_WGMMA", value); }

const char* launch_kind(const WgmmaParams& p, cudaStream_t stream) {
  return of_kind(p.weight, launch_wgmma_int2, launch_wgmma_int3, launch_wgmma_int4, launch_wgmma_int8, launch_wgmma_table4,
                 launch_wgmma_e4m3)(p, stream);
}

}  // namespace

bool takes_wgmma(const LinearParams& p) {
  if (wanted("0") || (p.tokens <= 16 && numbers(p) < kSmall && !wanted("1") && !wanted("large"))) return false;
  if (compute_capability() != 90 || !wgmma_was_compiled()) return false;
  return of_kind(p.weight, runs_wgmma_int2, runs_wgmma_int3, runs_wgmma_int4, runs_wgmma_int8, runs_wgmma_table4, runs_wgmma_e4m3)(p);
}

bool takes_large_wgmma(const LinearParams& p) {
  // In float16 a code behind K, which is any, times a scale above 136 (E4M3) or 8190 (4 bits) is infinite, and infinity times zero is not.
  const bool exact_end = p.x_dtype == kBFloat16 || p.weight.in_features % kWgmmaColumns == 0;
  return p.tokens > 64 && ((numbers(p) > kSmall && exact_end) || wanted("large"));
}

bool scales_whole_chunks(const Weight& w) {
  constexpr uint32_t kUnits = kWgmmaColumns / kUnitColumns;
  return !w.zeros && flush_mask(w, kUnits) == kUnits - 1;
}

int32_t arranged_tokens(const LinearParams& p) {
  return p.tokens > kLargeTokens ? kPairTokens : kLargeTokens;
}

int64_t wgmma_workspace(const LinearParams& p) {
  if (!takes_large_wgmma(p)) return 0;
  const int64_t tokens = arranged_tokens(p), partials = tokens == kLargeTokens ? 0 : most_ranges(p) * kPairRows * tokens;
  return arranged_floats(p) + flags_of_pairs(p) + partials;
}

// The number of blocks that share the columns with which the last round of clusters ends first.
WgmmaPlan plan_wgmma(const LinearParams& p, const WgmmaShape& shape) {
  const int64_t chunks = divided(p.weight.in_features, kWgmmaColumns);
  const int64_t tiles = divided(p.weight.out_features, shape.rows) * divided(p.tokens, shape.tokens);
  const float read = (shape.rows * p.weight.bits / 8.0f + 2.0f * shape.tokens) / kBytesPerClock;
  const float multiplied = static_cast<float>(shape.rows) * shape.tokens / kProductsPerClock;
  const float chunk_clocks = kWgmmaColumns * (read > multiplied ? read : multiplied);
  WgmmaPlan best = {};
  float least = 0;
  for (int32_t splits = 1; splits <= kMostClusterBlocks && (splits == 1 || chunks >= 2 * splits); ++splits) {
    const int active = shape.active_clusters(splits);
    if (active == 0) continue;
    const int64_t split_chunks = divided(chunks, splits);
    if (divided(chunks, split_chunks) < splits) continue;  // a block would have no columns
    const float sums = splits == 1 ? 0 : kClusterClocks + 4.0f * shape.rows * shape.tokens / kClusterBytesPerClock;
    const float clocks = divided(tiles, active) * (kStartClocks + split_chunks * chunk_clocks + sums);
    if (least == 0 || clocks < least) best = {splits, static_cast<int32_t>(split_chunks)}, least = clocks;
  }
  return best;
}

namespace {

int64_t pair_chunks(const LinearParams& p) { return divided(p.weight.in_features, kWgmmaColumns); }
int64_t pair_tiles(const LinearParams& p) { return divided(p.weight.out_features, kPairRows) * divided(p.tokens, arranged_tokens(p)); }

// Until the range that needs longest has ended.
int64_t clocks_of(const PairPlan& plan) {
  const uint32_t chunks = plan.tile_chunks();
  int64_t most = 0;
  for (uint32_t range = 0, begin = 0, end; range < plan.ranges; ++range, begin = end) {
    end = plan.first_chunk(range + 1);
    const uint32_t last_tile = (end - 1) / chunks;
    uint32_t partials = begin % chunks ? 1 : 0;                                    // written
    if (begin <= last_tile * chunks) partials += plan.last_range(last_tile) - range;  // read
    const int64_t of_range = int64_t{end - begin} * kPairClocks.chunk + partials * kPairClocks.partial;
    if (of_range > most) most = of_range;
  }
  return kPairClocks.start + most;
}

// Whole tiles, if there are more of them than pairs; else so many ranges of each tile; or ranges that begin anywhere, which leaves no pair idle, but
// of which most write partial sums and read others'.
PairPlan best_plan(int64_t tiles, int64_t chunks, int active) {
  const int64_t all = tiles * chunks, pairs = active < all ? active : all, whole = tiles < pairs ? tiles : pairs;
  const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
  PairPlan best = {number(tiles), 1, 0, number(chunks), number(whole)};
  if (2 * all * pairs >> 32) return best;  // so many rounds that none of it matters
  int64_t least = kPairClocks.start + divided(tiles, whole) * chunks * kPairClocks.chunk;
  // So many ranges. That with a tile's first chunk has fewer, by all or half of the time in which it adds up what `others` have.
  const auto consider = [&](int64_t ranges, int64_t others) {
    const int64_t most = all / ranges - 1, full = others * kPairClocks.partial / kPairClocks.chunk;
    for (const int64_t wanted : {int64_t{0}, full / 2, full}) {
      const int64_t time = wanted < most ? wanted : most;
      const PairPlan plan = {number(tiles * (chunks + time)), number(chunks + time), number(time), 1, number(ranges)};
      const int64_t found = clocks_of(plan);
      if (found < least) best = plan, least = found;
    }
  };
  for (int64_t splits = 2; splits * tiles <= pairs && splits <= chunks; ++splits) consider(splits * tiles, splits - 1);
  // No more ranges than the longest one makes necessary: 56 tiles of 32 chunks are 64 ranges of 28, two to a tile, or 66 of which some have 28, too,
  // and up to three are in a tile.
  consider(divided(all, divided(all, pairs)), pairs > tiles ? pairs / tiles : 1);
  return best;
}

}  // namespace

int64_t most_ranges(const LinearParams& p) {
  const int64_t pairs = multiprocessors() / 2, chunks = pair_tiles(p) * pair_chunks(p);
  return pairs < chunks ? pairs : chunks;
}

PairPlan plan_pairs(const LinearParams& p, int active) {
  if (active == 0) return {};
  // Some microseconds, of each product on its way: a model has few of these.
  thread_local std::map<std::tuple<int64_t, int64_t, int>, PairPlan> plans;
  PairPlan& plan = plans[{pair_tiles(p), pair_chunks(p), active}];
  if (plan.ranges == 0) plan = best_plan(pair_tiles(p), pair_chunks(p), active);
  return plan;
}

const char* launch_wgmma(const LinearParams& params, cudaStream_t stream) {
  WgmmaParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.flush_mask = flush_mask(p.weight, kWgmmaColumns / kUnitColumns);
  return launch_kind(p, stream);
}

}  // namespace hfq
