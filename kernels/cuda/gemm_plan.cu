// How a product is cut into thread blocks.
//
// Blocks of many rows read activations seldom but are few; cutting the columns makes more of them, and sums that are added afterwards. All
// cuts are compared by the clocks that the busiest multiprocessor would take: for bytes that arrive from L2, for instructions, and for
// what follows. Rates are those of an H100 (published figures); none was measured with these kernels.
#include "gemm.h"
#include "target.h"

namespace hfq {
namespace {

constexpr float kBytesPerClock = 28;       // from L2 to a multiprocessor: 6.5 TB/s, 132 of them, 1.75 GHz; an A100 has 29 (4.4 TB/s at 1.41)
constexpr float kMmaClocks = 5;            // of one mma.m16n8k16 on one of four schedulers; an A100 takes 8
constexpr float kUnitInstructions = 45;    // for a unit of one tile, 22 of them for codes; each mma and load of activations is one more
constexpr float kSpqrUnitInstructions = 75;  // the same where weights are scaled first (spqr_gemm_kernel.h)
constexpr float kReductionClocks = 3500;   // until a second kernel has started and ended, 2 us
constexpr float kStartClocks = 1000;       // until a block's first stage is there
constexpr float kSharedBytesPerClock = 128;

struct Candidate {
  const LinearParams& p;
  int64_t multiprocessors, columns, chunks;  // columns of a chunk
  GemmPlan plan;
  int64_t runs = 0;  // of tokens of experts, or 0
  GemmStats stats;   // scales and zero points, or what stands in their place

  Candidate(const LinearParams& params, const GemmStats* given)
      : p(params), multiprocessors(hfq::multiprocessors()), columns(params.weight.bits == 8 ? kChunkColumns<8> : kChunkColumns<4>), plan() {
    if (multiprocessors < 1) multiprocessors = 1;
    chunks = divided(params.weight.in_features, columns);
    stats = given ? *given : GemmStats{columns / kUnitColumns * kScaleBytes * (params.weight.zeros ? 2 : 1), 0};
  }

  int64_t rows() const { return kGemmWarps * kWarpTiles * kTileRows >> plan.column_shift; }
  int64_t blocks() const { return divided(p.weight.out_features, rows()) * (runs ? runs : divided(p.tokens, plan.tokens)) * plan.splits; }
  int64_t table_bytes() const { return p.weight.codebook && p.weight.bits == 4 ? 256 * 32 * 4 : 0; }
  // Sums of all warps, which take the place of the stages.
  int64_t partial_bytes() const { return (static_cast<int64_t>(plan.tokens) << plan.column_shift) * (rows() + 4) * 4; }
  int64_t fixed_bytes() const { return table_bytes() + plan.sums_bytes; }

  // Bytes and stages within `most` bytes of shared memory; false if there is no room for two.
  bool fit(int64_t most) {
    const Weight& w = p.weight;
    const int64_t units = columns / kUnitColumns, codes = kTileRows * columns * (w.bits == 3 ? 3 : w.bits) / 8;
    const int64_t warp = kWarpTiles * codes + stats.stage_bytes;
    plan.stage_bytes = static_cast<int32_t>((plan.tokens * columns * 2 << plan.column_shift) + kGemmWarps * warp);
    plan.sums_bytes = static_cast<int32_t>(w.zeros ? units * plan.tokens * 4 << plan.column_shift : kGemmWarps * stats.number_bytes);
    plan.stages = kMostStages;
    while (plan.stages >= 2 && bytes() > most) --plan.stages;
    plan.shared_bytes = static_cast<int32_t>(bytes());
    return plan.stages >= 2;
  }
  // Two blocks share a multiprocessor where registers allow it and there are that many.
  bool fits(int64_t most) {
    const bool two = plan.tokens < kMostTokens && blocks() > multiprocessors;
    return (two && fit(most / 2 - 1024)) || fit(most);
  }
  int64_t bytes() const {
    const int64_t ring = static_cast<int64_t>(plan.stages) * plan.stage_bytes, partial = partial_bytes();
    return fixed_bytes() + (ring > partial ? ring : partial);
  }

  float clocks() const {
    const float share = static_cast<float>(divided(blocks(), multiprocessors));
    const float k = static_cast<float>(plan.split_chunks * columns), tokens = static_cast<float>(plan.tokens);
    const float bytes = k * (rows() * (p.weight.bits / 8.0f) + 2 * tokens);
    const float mmas = tokens / 4, loads = tokens / 16;  // of a unit of one tile
    const float issue = (stats.number_bytes ? kSpqrUnitInstructions : kUnitInstructions) + mmas + loads, tensor = mmas * kMmaClocks;
    const float compute = k / kUnitColumns * rows() / kTileRows * (issue > tensor ? issue : tensor) / 4;
    const float read = bytes / kBytesPerClock;
    float all = share * ((read > compute ? read : compute) + 2 * partial_bytes() / kSharedBytesPerClock) + kStartClocks;
    if (plan.splits > 1) all += kReductionClocks + 2 * 4.0f * plan.splits * p.tokens * p.weight.out_features / (multiprocessors * kBytesPerClock);
    return all;
  }
};

// As few token tiles as there can be: each computes the weights' numbers again. Small shared memory may ask for more.
GemmPlan best_plan(Candidate c) {
  const int64_t most_shared = static_cast<int64_t>(most_shared_bytes());
  const LinearParams& params = c.p;
  GemmPlan best = {};
  float least = 0;
  for (int32_t tokens = params.tokens <= 16 ? 16 : params.tokens <= 32 ? 32 : kMostTokens; tokens >= 16 && !best.stages; tokens /= 2) {
    for (int32_t shift = 0; 1 << shift <= kGemmWarps; ++shift) {
      for (int32_t splits = 1; splits <= kMostSplits && (splits == 1 || c.chunks >= int64_t{4} * splits << shift); ++splits) {
        c.plan = {};
        c.plan.tokens = tokens;
        c.plan.column_shift = shift;
        // Whole rounds of the column warps; then no more splits than there is work for.
        c.plan.split_chunks = static_cast<int32_t>(divided(divided(c.chunks, splits), 1 << shift) << shift);
        c.plan.splits = static_cast<int32_t>(divided(c.chunks, c.plan.split_chunks));
        if (!c.fits(most_shared)) continue;
        const float clocks = c.clocks();
        if (!best.stages || clocks < least) best = c.plan, least = clocks;
        if (c.blocks() >= 2 * c.multiprocessors) break;  // more splits would only add
      }
    }
  }
  return best;
}

}  // namespace

GemmPlan plan_gemm(const LinearParams& params, const GemmStats* stats) { return best_plan(Candidate(params, stats)); }

GemmPlan plan_gemm_experts(const ExpertsParams& params, const GemmStats* stats) {
  const int64_t most_shared = static_cast<int64_t>(most_shared_bytes()), each = divided(params.linear.tokens, params.routing.experts);
  Candidate c(params.linear, stats);
  GemmPlan best = {};
  float least = 0;
  for (int32_t tokens = each <= 16 ? 16 : each <= 32 ? 32 : kMostTokens; tokens >= 16 && !best.stages; tokens /= 2) {
    c.runs = expert_slots(params.linear.tokens, params.routing.experts, tokens);
    for (int32_t shift = 0; 1 << shift <= kGemmWarps; ++shift) {
      c.plan = {};
      c.plan.tokens = tokens;
      c.plan.column_shift = shift;
      c.plan.splits = 1;
      c.plan.split_chunks = static_cast<int32_t>(divided(c.chunks, 1 << shift) << shift);
      if (!c.fits(most_shared)) continue;
      const float clocks = c.clocks();
      if (!best.stages || clocks < least) best = c.plan, least = clocks;
    }
  }
  return best;
}

}  // namespace hfq
