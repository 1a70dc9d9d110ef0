// When wgmma is taken, and how a product is cut into clusters of thread blocks.
#include "wgmma.h"

#include <cstdlib>
#include <cstring>

#include "target.h"

namespace hfq {
namespace {

// Published figures of an H100; none was measured with these kernels.
constexpr float kBytesPerClock = 28;         // from L2 to a multiprocessor
constexpr float kProductsPerClock = 2048;    // of tensor cores
constexpr float kStartClocks = 2000;         // until a block's first stage is there, and its sums have gone
constexpr float kClusterClocks = 1500;       // two barriers of a cluster, and the way to a neighbour's shared memory
constexpr float kClusterBytesPerClock = 16;  // from there

// Of a weight. Measured on an H200, in us (K x N): 16 tokens of 4096 x 4096 take 9.2, 8.3 with gemm_kernel.h; of 4096 x 14336 15.7 and 21.2.
// 128 tokens of 4096 x 4096 take 22.7 in large blocks, of which there are few, 20.8 in others; of 4096 x 14336 32 and 50, of 14336 x 4096 42 and 59,
// of 8192 x 28672 109 and 218. (64 tokens in large blocks of as many were slower everywhere: 32.8 beside 29.6.)
constexpr int64_t kSmall = int64_t{1} << 25;

int64_t numbers(const LinearParams& p) { return p.weight.out_features * p.weight.in_features; }

bool wanted(const char* value) {
  const char* const set = std::getenv("HFQ_CUDA_WGMMA");
  return set && std::strcmp(set, value) == 0;
}

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

int32_t large_tokens(const LinearParams& p) { return p.tokens > kLargeTokens && tried("tokens256") ? kPairTokens : kLargeTokens; }

int64_t wgmma_workspace(const LinearParams& p) { return takes_large_wgmma(p) ? arranged_floats(p) : 0; }

// The number of blocks that share the columns with which the last round of clusters ends first.
WgmmaPlan plan_wgmma(const LinearParams& p, const WgmmaShape& shape) {
  const int64_t chunks = divided(p.weight.in_features, kWgmmaColumns);
  const int64_t tiles = divided(p.weight.out_features, shape.rows * shape.neighbours) * divided(p.tokens, shape.tokens);
  const float read = (shape.rows * p.weight.bits / 8.0f + 2.0f * shape.tokens / shape.neighbours) / kBytesPerClock;
  const float multiplied = static_cast<float>(shape.rows) * shape.tokens / kProductsPerClock;
  const float chunk_clocks = kWgmmaColumns * (read > multiplied ? read : multiplied);
  WgmmaPlan best = {};
  float least = 0;
  for (int32_t splits = 1; splits * shape.neighbours <= kMostClusterBlocks && (splits == 1 || chunks >= 2 * splits); ++splits) {
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

const char* launch_wgmma(const LinearParams& params, cudaStream_t stream) {
  WgmmaParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.flush_mask = flush_mask(p.weight, kWgmmaColumns / kUnitColumns);
  return launch_kind(p, stream);
}

}  // namespace hfq
