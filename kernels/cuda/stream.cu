// When thread blocks stream through tiles, and how shared memory is shared out.
#include "stream.h"

#include <cstdlib>

#include "target.h"

namespace hfq {
namespace {

constexpr uint32_t kStepUnits = kStreamStepColumns / kUnitColumns;

uint32_t divided(int64_t a, int64_t b) { return static_cast<uint32_t>((a + b - 1) / b); }

// Below, memory would wait for the ring: a multiprocessor of an H200 gets some 20 bytes a clock, after 1000 clocks.
constexpr size_t kLeastStages = 3, kLeastRing = 40 << 10;

// Groups of a stage, at most: a stage begins where a step does, and that need not be where a group begins.
int64_t groups_of_stage(const Weight& w) {
  if (w.groups == 1) return 1;
  const int64_t units = w.group_size / kUnitColumns;
  const int64_t groups = kStepUnits % units == 0 ? kStageUnits / units : (kStageUnits - 2 + units) / units + 1;
  return groups < w.groups ? groups : w.groups;
}

// With 2^split_bits blocks that share the columns, of which `blocks_of_one` share one multiprocessor: 2, of this kernel and the next one, or 1.
StreamPlan plan_split(const LinearParams& params, uint32_t split_bits, uint32_t blocks_of_one) {
  const uint32_t splits = 1u << split_bits;
  const Weight& w = params.weight;
  const int token_tiles = params.tokens <= 8 ? 1 : 2, tiles = stream_tiles(w.bits, token_tiles);
  const uint32_t steps = divided(w.in_features, kStreamStepColumns);
  StreamPlan p = {};
  p.slice_steps = divided(steps, splits);
  if (divided(steps, p.slice_steps) < splits) return p;  // a block would have no columns
  p.pairs_bytes = static_cast<uint32_t>(groups_of_stage(w) * kTileRows / 2 * (w.scale_dtype == kFloat32 ? 8 : 4));
  const uint32_t codes = static_cast<uint32_t>(kStageColumns * kTileRows * w.bits / 8);
  p.stage_bytes = static_cast<uint32_t>(tiles) * (codes + (w.zeros ? 2 : 1) * p.pairs_bytes);
  // Two tokens are read at a time: the second's 64 bytes come from the other banks.
  p.x_stride = p.slice_steps * 2 * kStreamStepColumns + 64;
  p.x_bytes = divided(params.tokens * p.x_stride, 128) * 128;
  const uint32_t units = flush_mask(w, kStepUnits) + 1;  // 4, 2 or 1
  p.group_bits = units / 2;
  if (needs_x_sums(w.bits, w.zeros, w.codebook, params.x_dtype)) p.x_sums_bytes = p.slice_steps * kStepUnits / units * token_tiles * 64;
  constexpr size_t kForOthers = 4 << 10;  // small kernels between two products would keep the next one from its place
  const size_t all = most_shared_bytes() + kReservedShared - (blocks_of_one > 1 ? kForOthers : 0), room = all / blocks_of_one - kReservedShared;
  const size_t fixed = stream_places(tiles, token_tiles, w.codebook && w.bits == 4).x + p.x_bytes + p.x_sums_bytes;
  const size_t stages = room < fixed ? 0 : (room - fixed) / p.stage_bytes;
  if (stages < kLeastStages || stages * p.stage_bytes < kLeastRing) return p;
  p.ring_stages = static_cast<uint32_t>(stages < kMostStreamStages ? stages : kMostStreamStages);
  const size_t bytes = fixed + size_t{p.ring_stages} * p.stage_bytes, least = shared_bytes_for(blocks_of_one);
  p.shared_bytes = static_cast<uint32_t>(bytes < least ? least : bytes);  // no more than `blocks_of_one`, so that they are placed evenly
  p.splits = splits, p.split_bits = split_bits;
  return p;
}

}  // namespace

StreamPlan plan_stream(const LinearParams& params) {
  const char* const set = std::getenv("HFQ_CUDA_STREAM");
  const bool wanted = set && set[0] == '1';
  if (!wanted || params.tokens > kMostStreamTokens || compute_capability() < 90 || !stream_was_compiled()) return {};
  for (uint32_t blocks = 2; blocks >= 1; --blocks)
    for (uint32_t split_bits = 0; split_bits <= 3; ++split_bits)
      if (const StreamPlan p = plan_split(params, split_bits, blocks); p.splits && (p.splits == 1 || stream_clusters(p.splits) > 0)) return p;
  return {};
}

const char* launch_stream(const LinearParams& params, const StreamPlan& plan, cudaStream_t stream) {
  StreamParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.flush_mask = flush_mask(p.weight, kStepUnits);
  p.plan = plan;
  const uint32_t tiles = divided(p.weight.out_features, kTileRows);
  const auto most = static_cast<uint32_t>(plan.splits == 1 ? multiprocessors() : stream_clusters(plan.splits));
  p.clusters = most < tiles ? most : tiles;
  p.tiles_of_cluster = tiles / p.clusters, p.more_tiles = tiles % p.clusters;
  return of_kind(p.weight, launch_stream_int2, launch_stream_int3, launch_stream_int4, launch_stream_int8, launch_stream_table4,
                 launch_stream_e4m3)(p, stream);
}

}  // namespace hfq
