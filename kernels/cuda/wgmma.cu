// When wgmma is taken, and how a product is cut into ranges.
#include "wgmma.h"

#include <atomic>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "target.h"

namespace hfq {
namespace {

// Pairs, of up to 128 tokens and of more. Chunks of 256 tokens are measured on an H200 (4096 x 14336 took 49.4 us for 32 of them), and so is the
// beginning, which includes x in order; the rest is reckoned.
constexpr RangeShape kPairShapes[2] = {{kPairRows, 128, 2, 1450, 6500, 2000, 1300}, {kPairRows, 256, 2, 2500, 6500, 2500, 2500}};

// Staged blocks, of 16, 32 and 64 tokens. Chunks of 256 rows are measured: in clusters 4096 x 14336 took 14.9 and 19.5 us for 16 of them (int4,
// scales of whole chunks and no zero points; else, and with 8 bits or a codebook, 1.7 times as many clocks). The rest is reckoned: zero points of
// whole chunks, and that of 128 rows all but x is half.
constexpr RangeShape kStagedShapes[] = {{128, 16, 1, 550, 5500, 1600, 700},
                                        {128, 32, 1, 700, 5500, 1800, 800},
                                        {256, 32, 1, 1150, 5500, 2000, 1300},
                                        {128, 64, 1, 1000, 5500, 2000, 1000},
                                        {256, 64, 1, 1700, 5500, 2300, 2100},
                                        {256, 64, 2, 800, 6500, 2000, 1000},  // wgmma_shared.h
                                        {512, 64, 2, 1400, 6500, 2300, 2100}};

// Of a weight. Measured on an H200, in us (K x N): 16 tokens of 4096 x 4096 take 9.2, 8.3 with gemm_kernel.h; of 4096 x 14336 15.7 and 21.2.
constexpr int64_t kSmall = int64_t{1} << 25;

int64_t chunks_of(const LinearParams& p) { return divided(p.weight.in_features, kWgmmaColumns); }
int64_t tiles_of(const LinearParams& p, const RangeShape& shape) {
  return divided(p.weight.out_features, shape.rows) * divided(p.tokens, shape.tokens);
}

// No plan on the current device has more.
int most_clusters(const RangeShape& shape) {
  const int found = multiprocessors() / shape.blocks;
  return found > 1 ? found : 1;
}
int64_t most_ranges(const LinearParams& p, const RangeShape& shape) {
  const int64_t clusters = most_clusters(shape), chunks = tiles_of(p, shape) * chunks_of(p);
  return clusters < chunks ? clusters : chunks;
}

int64_t flag_floats(int64_t flags) { return divided(2 * flags, 32) * 32; }  // what follows begins a line of 128 bytes

// A number that memory which happens to be there does not begin with, but once in 2^64: another one for each launch, since all that is done to their
// count can be undone (the last steps of SplitMix64; Steele, Lea and Flood, OOPSLA 2014), and others in each process, whose count begins anywhere. Of
// 0 alone it makes 0.
uint64_t tag_of(uint64_t launch) {
  launch = (launch ^ launch >> 30) * 0xbf58476d1ce4e5b9u;
  launch = (launch ^ launch >> 27) * 0x94d049bb133111ebu;
  return launch ^ launch >> 31;
}

int64_t numbers(const LinearParams& p) { return p.weight.out_features * p.weight.in_features; }

bool wanted(const char* value) { return is_set("HFQ_CUDA_WGMMA", value); }

const char* launch_kind(const WgmmaParams& p, cudaStream_t stream) {
  return of_kind(p.weight, launch_wgmma_int2, launch_wgmma_int3, launch_wgmma_int4, launch_wgmma_int8, launch_wgmma_table4,
                 launch_wgmma_e4m3)(p, stream);
}

}  // namespace

bool takes_wgmma(const LinearParams& p) {
  if (wanted("0") || (p.tokens <= 16 && numbers(p) < kSmall && !wanted("1") && !wanted("pairs"))) return false;
  if (compute_capability() != 90 || !wgmma_was_compiled()) return false;
  return of_kind(p.weight, runs_wgmma_int2, runs_wgmma_int3, runs_wgmma_int4, runs_wgmma_int8, runs_wgmma_table4, runs_wgmma_e4m3)(p);
}

bool takes_pairs(const LinearParams& p) {
  // In float16 a code behind K, which is any, times a scale above 136 (E4M3) or 8190 (4 bits) is infinite, and infinity times zero is not.
  const bool exact_end = p.x_dtype == kBFloat16 || p.weight.in_features % kWgmmaColumns == 0;
  return p.tokens > kStagedTokens && (exact_end || wanted("pairs"));
}

namespace {

// Floats of the workspace before flags, which are x in order of pairs; before partial sums; and all.
struct Workspace {
  int64_t flags, partials, all;
};

Workspace workspace_of(const LinearParams& p, const RangeShape& shape) {
  const int64_t ranges = most_ranges(p, shape), flags = shape.blocks > 1 ? arranged_floats(p) : 0;
  const int64_t partials = flags + flag_floats(ranges * shape.blocks);
  return {flags, partials, partials + ranges * shape.rows * shape.tokens};
}

struct PlannedRanges {
  RangePlan plan;
  int64_t clocks;
};

// Until the last range has ended. (Fewer chunks for who adds up what others have written gain nothing: it waits for them. So it was measured, too.)
int64_t clocks_of(const RangePlan& plan, const RangeShape& shape) {
  const uint32_t chunks = plan.tile_chunks();
  std::vector<int64_t> written(plan.ranges);  // when its partial sums are
  int64_t last_end = 0;
  // Those that are waited for have the next ranges.
  for (uint32_t range = plan.ranges, begin, end = plan.first_chunk(range); range-- > 0; end = begin) {
    begin = plan.first_chunk(range);
    const uint32_t last_tile = (end - 1) / chunks, left = chunks - begin % chunks;
    int64_t clock = int64_t{end - begin} * shape.chunk;
    if (begin % chunks) {
      const uint32_t first = left < end - begin ? left : end - begin;
      written[range] = first * shape.chunk + shape.write;
      if (first == end - begin) clock = written[range];
    }
    if (begin <= last_tile * chunks)
      for (uint32_t other = plan.last_range(last_tile); other > range; --other)
        clock = (clock < written[other] ? written[other] : clock) + shape.read;
    if (clock > last_end) last_end = clock;
  }
  return shape.start + last_end;
}

// Whole tiles, if there are more of them than clusters; else so many ranges of each tile; or ranges that begin anywhere, which leaves no cluster
// idle, but of which most write partial sums and read others'.
PlannedRanges best_ranges(int64_t tiles, int64_t chunks, const RangeShape& shape, int active) {
  const int64_t all = tiles * chunks, clusters = active < all ? active : all, whole = tiles < clusters ? tiles : clusters;
  const auto cut = [](int64_t units, int64_t tile_units, int64_t unit_chunks, int64_t ranges) {
    const auto number = [](int64_t n) { return static_cast<uint32_t>(n); };
    return RangePlan{number(units),
                     number(tile_units),
                     number(unit_chunks),
                     number(ranges),
                     reciprocal(number(units)),
                     reciprocal(number(ranges)),
                     reciprocal(number(tile_units * unit_chunks))};
  };
  PlannedRanges best = {cut(tiles, 1, chunks, whole), shape.start + divided(tiles, whole) * chunks * shape.chunk};
  if (all * clusters >> 32) return best;  // so many rounds that none of it matters
  const auto of_chunks = [&](int64_t ranges) -> PlannedRanges {
    const RangePlan plan = cut(all, chunks, 1, ranges);
    return {plan, clocks_of(plan, shape)};
  };
  // Of 16 tokens two blocks find room on a multiprocessor: where one is free, two of the next kernel's would crowd on it.
  if (shape.tokens == 16) return whole < clusters ? of_chunks(clusters) : best;
  const auto consider = [&](int64_t ranges) {
    const PlannedRanges found = of_chunks(ranges);
    if (found.clocks < best.clocks) best = found;
  };
  for (int64_t splits = 2; splits * tiles <= clusters && splits <= chunks; ++splits) consider(splits * tiles);
  // No more ranges than the longest one makes necessary: 56 tiles of 32 chunks are 64 ranges of 28, two to a tile, or 66 of which some have 28, too,
  // and up to three are in a tile.
  consider(divided(all, divided(all, clusters)));
  return best;
}

PlannedRanges planned_ranges(const LinearParams& p, const RangeShape& shape, int active) {
  // Some microseconds, of each product on its way: a model has few of these.
  thread_local std::map<std::tuple<int64_t, int64_t, int32_t, int32_t, int32_t, int64_t, int>, PlannedRanges> plans;
  const int64_t tiles = tiles_of(p, shape), chunks = chunks_of(p);
  PlannedRanges& found = plans[{tiles, chunks, shape.rows, shape.tokens, shape.blocks, shape.chunk, active}];
  if (found.plan.ranges == 0) found = best_ranges(tiles, chunks, shape, active);
  return found;
}

}  // namespace

RangeShape range_shape(const LinearParams& p) {
  if (takes_pairs(p)) return kPairShapes[p.tokens > kPairTokens / 2];
  const Weight& w = p.weight;
  constexpr uint32_t kUnits = kWgmmaColumns / kUnitColumns;
  const bool fast = w.bits < 8 && !w.codebook && flush_mask(w, kUnits) == kUnits - 1;
  const int32_t tokens = p.tokens <= 16 ? 16 : p.tokens <= 32 ? 32 : kStagedTokens, blocks = tokens == kStagedTokens && wanted("shared") ? 2 : 1;
  RangeShape best = {};
  int64_t least = 0;
  for (RangeShape shape : kStagedShapes) {
    if (shape.tokens != tokens || shape.blocks != blocks) continue;
    if (!fast || (w.zeros && blocks > 1))
      shape.chunk = shape.chunk * 17 / 10;
    else if (w.zeros)
      shape.chunk = shape.chunk * 13 / 10;
    const int64_t clocks = planned_ranges(p, shape, most_clusters(shape)).clocks;
    if (best.rows == 0 || clocks < least) best = shape, least = clocks;
  }
  return best;
}

RangePlan plan_ranges(const LinearParams& p, const RangeShape& shape, int active) {
  if (active == 0) return {};
  const int most = most_clusters(shape);  // the workspace has room for no more
  return planned_ranges(p, shape, active < most ? active : most).plan;
}

void place_ranges(WgmmaParams& p, const RangeShape& shape) {
  static std::atomic<uint64_t> launches{uint64_t{std::random_device{}()} << 32 | std::random_device{}()};
  p.tag = tag_of(++launches);
  const Workspace workspace = workspace_of(p, shape);
  p.flags = reinterpret_cast<uint64_t*>(p.workspace + workspace.flags), p.partials = p.workspace + workspace.partials;
}

int64_t wgmma_workspace(const LinearParams& p) { return workspace_of(p, range_shape(p)).all; }

const char* launch_wgmma(const LinearParams& params, cudaStream_t stream) {
  WgmmaParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.flush_mask = flush_mask(p.weight, kWgmmaColumns / kUnitColumns);
  return launch_kind(p, stream);
}

}  // namespace hfq
