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

struct ArrangeParams {
  const void* x;
  void* to;
  int64_t tokens;
  uint32_t in_features, chunks, tile;  // tile: tokens of a stage
};

// A thread has 16 bytes of a token: a word of each of four pieces.
__global__ void __launch_bounds__(256) arrange_kernel(const ArrangeParams p) {
  let_next_kernel_start();
  const uint32_t at = blockIdx.x * 256 + threadIdx.x, of_token = 16 * p.chunks;
  const uint32_t token = at / of_token, piece = at % of_token, chunk = piece / 16, half = piece / 8 % 2, unit = piece / 4 % 2, t = piece % 4;
  const uint32_t row = token % p.tile;
  wait_for_previous_kernel();
  uint4 v = {};
  if (token < p.tokens && 8 * piece < p.in_features)
    v = load_written(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(token) * p.in_features + 8 * piece));
  uint8_t* const to = static_cast<uint8_t*>(p.to) +
                      ((static_cast<int64_t>(token / p.tile) * p.chunks + chunk) * 2 + half) * p.tile * 128 + row * 128 + 4 * t;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i)
    if (token / p.tile * p.tile < p.tokens) store(reinterpret_cast<uint32_t*>(to + 16 * ((4 * unit + i) ^ row % 8)), words[i]);
}

int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

const char* launch_kind(const WgmmaParams& p, cudaStream_t stream) {
  return of_kind(p.weight, launch_wgmma_int2, launch_wgmma_int3, launch_wgmma_int4, launch_wgmma_int8, launch_wgmma_table4,
                 launch_wgmma_e4m3)(p, stream);
}

}  // namespace

bool takes_wgmma(const LinearParams& p) {
  // Measured on an H200: 4096 x 4096 weights take 9.2 us with 16 tokens, 8.3 with gemm_kernel.h; 4096 x 14336 17.3 and 21.2.
  constexpr int64_t kSmall = int64_t{1} << 25;
  const char* const set = std::getenv("HFQ_CUDA_WGMMA");
  const bool never = set && std::strcmp(set, "0") == 0, always = set && std::strcmp(set, "1") == 0;
  if (never) return false;
  if (p.tokens <= 16 && p.weight.out_features * p.weight.in_features < kSmall && !always) return false;
  if (compute_capability() != 90 || !wgmma_was_compiled()) return false;
  return of_kind(p.weight, runs_wgmma_int2, runs_wgmma_int3, runs_wgmma_int4, runs_wgmma_int8, runs_wgmma_table4, runs_wgmma_e4m3)(p);
}

bool takes_large_wgmma(int64_t tokens) {
  const char* const set = std::getenv("HFQ_CUDA_WGMMA_LARGE");
  return set && ((set[0] == '1' && tokens > 64) || (set[0] == '2' && tokens > 32) || (set[0] == '3' && tokens > 16) || set[0] == '4');
}

int64_t wgmma_workspace(const LinearParams& p) {
  if (!takes_large_wgmma(p.tokens)) return 0;
  const int64_t tokens = p.tokens > 64 ? 128 : p.tokens > 32 ? 64 : p.tokens > 16 ? 32 : 16;
  return divided(p.tokens, tokens) * tokens * divided(p.weight.in_features, kWgmmaColumns) * kWgmmaColumns / 2;
}

const char* launch_arrange(const LinearParams& params, int tokens, cudaStream_t stream) {
  ArrangeParams p = {};
  p.x = params.x, p.to = params.workspace;
  p.tokens = params.tokens, p.in_features = static_cast<uint32_t>(params.weight.in_features), p.tile = tokens;
  p.chunks = static_cast<uint32_t>(divided(params.weight.in_features, kWgmmaColumns));
  const int64_t pieces = divided(params.tokens, tokens) * tokens * p.chunks * 16;
  return launch_early(arrange_kernel, static_cast<unsigned>(divided(pieces, 256)), 256, 0, stream, p);
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

const char* launch_wgmma(const LinearParams& params, cudaStream_t stream) {
  WgmmaParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.flush_mask = flush_mask(p.weight, kWgmmaColumns / kUnitColumns);
  return launch_kind(p, stream);
}

}  // namespace hfq
