// How spqr_gemm.h is put together: x by columns, outliers, the dense part, and the sum of all.
//
// An outlier meets one activation of each token. With x as it is, these lie in as many lines of memory: 64 tokens times 0.5 % of 4096 x 14336 weights
// would read 600 MB from L2. So x is put by columns first, tokens of a tile next to each other, and a warp reads those of an outlier at once.
#include "spqr_gemm.h"

#include "gemm_output.h"
#include "runs.h"
#include "spqr_parts.h"
#include "target.h"

namespace hfq {
namespace {

constexpr int kThreads = 256, kSparseThreads = 32 * kTileRows;
constexpr int kSlabColumns = 64;  // that a thread block of by_columns_kernel takes

// The tokens of a tile; none if they belong to no expert, too.
template <int kTokens>
__device__ __forceinline__ Run tokens_of(const SpqrGemmParams& p, uint32_t tile) {
  const uint32_t tokens = static_cast<uint32_t>(p.tokens), first = tile * kTokens;
  if (!p.routing.counts) return {0, first, tokens - first < kTokens ? tokens : first + kTokens};
  Run run = find_run<kTokens>(p.routing, tokens, tile);
  if (run.expert == p.routing.experts) run.end = run.first;
  return run;
}

// ---- kernels

// x_columns from x: 64 columns of a tile of tokens. Those that do not exist are zeros.
template <int kTokens>
__global__ void __launch_bounds__(kThreads) by_columns_kernel(const SpqrGemmParams p) {
  constexpr uint32_t kPieces = kSlabColumns / 8, kWords = kSlabColumns / 2 + 1;  // words of a token, of 32-bit, with one to other banks
  uint32_t* const shared = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t columns = static_cast<uint32_t>(p.weight.in_features), slabs = (columns + kSlabColumns - 1) / kSlabColumns;
  const uint32_t tile = blockIdx.x / slabs, first = blockIdx.x % slabs * kSlabColumns;
  const Run run = tokens_of<kTokens>(p, tile);
  if (run.first >= run.end) return;
  for (uint32_t i = threadIdx.x; i < kTokens * kPieces; i += kThreads) {
    const uint32_t token = i / kPieces, column = first + i % kPieces * 8;
    const int64_t m = run.first + token;
    uint4 v = make_uint4(0, 0, 0, 0);
    if (m < run.end && column < columns) v = load(reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(p.x) + m * columns + column));
    uint32_t* const to = shared + token * kWords + i % kPieces * 4;
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  }
  sync_block();
  for (uint32_t i = threadIdx.x; i < kSlabColumns * kTokens / 2; i += kThreads) {
    const uint32_t column = i / (kTokens / 2), token = i % (kTokens / 2) * 2;
    if (first + column >= columns) continue;
    const uint32_t low = shared[token * kWords + column / 2], high = shared[(token + 1) * kWords + column / 2];
    const uint32_t pair = column % 2 ? permute_bytes(low, high, 0x7632u) : permute_bytes(low, high, 0x5410u);
    store(reinterpret_cast<uint32_t*>(p.x_columns) + ((static_cast<int64_t>(tile) * columns + first + column) * kTokens + token) / 2, pair);
  }
}

// The products of outliers: a thread block has a tile of rows and of tokens, a warp one row, whose outliers it takes 32 at a time; kTokens / 2 lanes
// have two tokens each, and where those are not all, others take every second, or fourth outlier. They are added in one order.
template <class T, int kTokens>
__global__ void __launch_bounds__(kSparseThreads) outliers_kernel(const SpqrGemmParams p) {
  constexpr int kLanes = kTokens / 2, kShare = 32 / kLanes, kStride = kTokens + 1;
  float* const sums = reinterpret_cast<float*>(shared_memory());  // [16][kStride]
  const uint32_t tile = blockIdx.x / p.token_tiles, token_tile = blockIdx.x % p.token_tiles, lane = threadIdx.x % 32, row = threadIdx.x / 32;
  const Run run = tokens_of<kTokens>(p, token_tile);
  if (run.first >= run.end) return;
  const SpqrWeight w = of_expert(p.spqr, p.routing, p.stat_bytes, run.expert);
  const uint32_t columns = static_cast<uint32_t>(w.in_features), share = lane / kLanes;
  const int64_t n = static_cast<int64_t>(tile) * kTileRows + row;
  const uint32_t* const x = reinterpret_cast<const uint32_t*>(p.x_columns) + static_cast<int64_t>(token_tile) * columns * kLanes + lane % kLanes;
  Span span = {0, 0};
  if (n < w.out_features) span = outliers_of(w, n);
  // A lane's outlier of the 32 that begin with `first`; one of no column if there is none.
  const auto column_at = [&](uint32_t first) { return first + lane < span.end ? outlier_column(w, first + lane) : ~0u; };
  const auto value_at = [&](uint32_t first) { return first + lane < span.end ? load_float(w.values, first + lane, w.stat_dtype) : 0.0f; };
  float sum[2] = {};
  uint32_t column = column_at(span.begin);
  float value = value_at(span.begin);
  for (uint32_t first = span.begin; first < span.end; first += 32) {
    const uint32_t next_column = column_at(first + 32);
    const float next_value = value_at(first + 32);
    constexpr int kAtOnce = 8;
#pragma unroll
    for (int i = 0; i < 32 / kShare; i += kAtOnce) {
      if (first + i * kShare >= span.end) break;
      uint32_t pairs[kAtOnce];
      float values[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int from = static_cast<int>((i + j) * kShare + share);
        const uint32_t at = shuffle_from(column, from);
        values[j] = as_float(shuffle_from(as_bits(value), from));
        const bool exists = at < columns;
        pairs[j] = exists ? load_written(x + static_cast<int64_t>(at) * kLanes) : 0;
        if (!exists) values[j] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const float2 numbers = unpacked(T{}, pairs[j]);
        sum[0] = multiply_add(values[j], numbers.x, sum[0]);
        sum[1] = multiply_add(values[j], numbers.y, sum[1]);
      }
    }
    column = next_column, value = next_value;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int lanes = kLanes; lanes < 32; lanes *= 2) sum[i] = add(sum[i], as_float(shuffle_xor(as_bits(sum[i]), lanes)));
    if (share == 0) sums[row * kStride + 2 * lane + i] = sum[i];
  }
  sync_block();
  const int64_t padded = (w.out_features + kTileRows - 1) / kTileRows * kTileRows;
  for (uint32_t i = threadIdx.x; i < kTokens * kTileRows / 4; i += kSparseThreads) {
    const uint32_t token = i / (kTileRows / 4), first = i % (kTileRows / 4) * 4;
    const int64_t m = run.first + token;
    if (m >= run.end) continue;
    const float* const from = sums + first * kStride + token;
    float* const to = p.extra + m * padded + static_cast<int64_t>(tile) * kTileRows + first;
    store(reinterpret_cast<float4*>(to), make_float4(from[0], from[kStride], from[2 * kStride], from[3 * kStride]));
  }
}

// ---- launchers

template <int kTokens>
const char* launch_outliers(const SpqrGemmParams& p, cudaStream_t stream) {
  const int64_t slabs = divided(p.weight.in_features, kSlabColumns), tiles = divided(p.weight.out_features, kTileRows);
  const size_t words = kTokens * (kSlabColumns / 2 + 1), floats = kTileRows * (kTokens + 1);
  const char* error = launch(by_columns_kernel<kTokens>, static_cast<unsigned>(slabs * p.token_tiles), kThreads, 4 * words, stream, p);
  if (error) return error;
  const unsigned blocks = static_cast<unsigned>(tiles * p.token_tiles);
  if (p.x_dtype == kBFloat16) return launch(outliers_kernel<BFloat16, kTokens>, blocks, kSparseThreads, 4 * floats, stream, p);
  return launch(outliers_kernel<Float16, kTokens>, blocks, kSparseThreads, 4 * floats, stream, p);
}

GemmStats stats_of(const SpqrWeight& w) {
  return {kWarpTiles * (kChunkColumns<4> / kHalfColumns) * (group_code_bytes(w) + line_bytes(w)), kSpqrNumberBytes};
}

// All but the plan and what follows from it.
SpqrGemmParams unplanned(const SpqrLinearParams& params) {
  const SpqrWeight& w = params.weight;
  SpqrGemmParams p = {};
  p.spqr = w;
  p.weight.bits = w.bits, p.weight.in_features = w.in_features, p.weight.out_features = w.out_features;
  p.x = params.x, p.bias = params.bias, p.y = params.y, p.tokens = params.tokens;
  p.x_dtype = params.x_dtype, p.bias_dtype = params.bias_dtype;
  p.group_magic = group_magic(w, kHalfColumns);
  p.workspace = params.workspace;
  return p;
}

SpqrGemmParams planned(const SpqrLinearParams& params) {
  SpqrGemmParams p = unplanned(params);
  const GemmStats stats = stats_of(p.spqr);
  p.plan = plan_gemm(p, &stats);
  p.token_tiles = static_cast<uint32_t>(divided(p.tokens, p.plan.tokens));
  return p;
}

SpqrGemmParams planned(const SpqrExpertsParams& params) {
  SpqrGemmParams p = unplanned(params.linear);
  const GemmStats stats = stats_of(p.spqr);
  p.plan = plan_gemm_experts({p, params.routing}, &stats);
  p.routing = params.routing;
  p.stat_bytes = params.stat_bytes;
  p.routing.slots = p.token_tiles = static_cast<uint32_t>(expert_slots(p.tokens, p.routing.experts, p.plan.tokens));
  return p;
}

// Sums of splits, then those of outliers, then x by columns; floats before each, and all.
struct Workspace {
  int64_t outliers, x_columns, all;
};

Workspace workspace_of(const SpqrGemmParams& p) {
  const int64_t splits = workspace_floats(p, p.plan), sums = p.tokens * divided(p.weight.out_features, kTileRows) * kTileRows;
  if (!p.spqr.outliers) return {splits, splits, splits};
  return {splits, splits + sums, splits + sums + p.token_tiles * p.weight.in_features * p.plan.tokens / 2};
}

const char* launch_planned(SpqrGemmParams p, cudaStream_t stream) {
  if (p.spqr.outliers) {
    const Workspace workspace = workspace_of(p);
    p.extra = p.workspace + workspace.outliers;
    p.x_columns = reinterpret_cast<uint16_t*>(p.workspace + workspace.x_columns);
    const auto launch_tokens = p.plan.tokens == 16 ? launch_outliers<16> : p.plan.tokens == 32 ? launch_outliers<32> : launch_outliers<64>;
    if (const char* error = launch_tokens(p, stream)) return error;
  }
  const auto launch_dense = p.spqr.bits == 2 ? launch_spqr_gemm2 : p.spqr.bits == 3 ? launch_spqr_gemm3 : launch_spqr_gemm4;
  const char* error = launch_dense(p, stream);
  return error || p.plan.splits == 1 ? error : add_splits(p, stream);
}

}  // namespace

int64_t spqr_gemm_workspace(const SpqrLinearParams& params) { return workspace_of(planned(params)).all; }
int64_t spqr_gemm_workspace(const SpqrExpertsParams& params) { return workspace_of(planned(params)).all; }
const char* launch_spqr_gemm(const SpqrLinearParams& params, cudaStream_t stream) { return launch_planned(planned(params), stream); }
const char* launch_spqr_gemm(const SpqrExpertsParams& params, cudaStream_t stream) { return launch_planned(planned(params), stream); }

}  // namespace hfq
