// The kernel of cuda_linear for few tokens, for one kind of codes in each file that includes this.
//
// A thread block takes one or two tiles of 16 rows and up to 8 tokens; its 8 (or 4) warps take turns with steps of 128 columns. Each warp has a ring
// of stages of its own in shared memory, into which all that a step needs is copied steps ahead: codes, activations, scales and zero points.
// Partial sums of the warps meet in shared memory and are added in a fixed order.
//
// Nothing in the loop is loaded from global memory to registers. ptxas gives all such loads that live across a loop's end one scoreboard, which
// counts: to wait for the oldest is to wait for all of them, however many blocks ahead they were issued. A warp then takes a step for each
// latency of memory (1100 clocks on an H100, 60 % of its bandwidth); groups of asynchronous copies end in order.
//
// Bytes and instructions: per clock a multiprocessor gets some 14 bytes of weights from memory on an H100 (3.35 TB/s, 132 of them at
// 1.75 GHz), 20 on an H200, and issues 4 instructions. 1 KB of 4-bit codes thus has 280 (200) issue slots, and takes about 127 instructions
// in the loop with two tiles: 88 for codes, 8 mma, 6 loads from shared memory, the rest for copies and scales; 194 were counted with beginnings and
// ends (4096 x 14336, one token), and most of those for codes take two clocks. With 8 tokens, activations are twice
// the bytes of one tile of 4-bit codes, from L2; hence two tiles for one read of them where there are enough tiles for all multiprocessors.
#pragma once

#include "linear_step.h"

namespace hfq {
namespace {

constexpr int kMostWarps = 8, kMostThreads = 32 * kMostWarps;

// Steps in a warp's ring, all but one on the way: 16 warps of a multiprocessor then have 32 KB of 4-bit codes of one tile there, where
// 20 bytes per clock over a latency of 1000 clocks need 20 KB. Where shared memory is too small there are two.
constexpr uint32_t kMostStages = 3;

// Of a stage, codes of all tiles, then activations [tokens, 128], then pairs of scales [tiles, 8] and of zero points [tiles, 8]: once if groups
// end with steps, or else for each unit.
template <class Kind, bool kZeros, int kTiles>
struct LinearWarp : StepCodes<Kind> {
  using StepCodes<Kind>::kBits;
  using StepCodes<Kind>::kBlock;
  using StepCodes<Kind>::kBytes;
  static constexpr int kRowBytes = 2 * kStepColumns, kRowPieces = kRowBytes / 16, kTokensAtOnce = 32 / kRowPieces;  // of activations
  static constexpr int kPairs = kTiles * (kZeros ? 2 : 1), kPairLanes = 8 * kPairs;
  static constexpr int kActivationsAt = kTiles * kBytes;

  const LinearParams& p;
  int lane, tokens;                // of the thread block
  uint32_t steps;                  // of the weight's columns
  uint32_t blocks;                 // that are stored
  // What the lane copies next: codes of each tile, and activations, and of which steps. A pair of group 0.
  const uint8_t* codes_from[kTiles];
  const uint8_t* x_from;
  const uint8_t* pairs_from;
  uint32_t next, next_x;
  uint32_t columns;                // from the lane's piece of step 0 to the end of the row
  uint32_t pair, group_bytes;      // of one pair; from one group's pairs to the next
  // Where these go, from the beginning of a stage, and what the lane reads: activations of even and odd units; pairs.
  uint32_t codes_at, x_to, pairs_to, x_at[2], pairs_at;

  __device__ __forceinline__ LinearWarp(const LinearParams& params, int64_t first_tile, int64_t first_token)
      : p(params), lane(threadIdx.x % 32), next(threadIdx.x / 32), next_x(next) {
    const Weight& w = p.weight;
    const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows;
    const uint32_t in_features = static_cast<uint32_t>(w.in_features);
    steps = (in_features + kStepColumns - 1) / kStepColumns;
    blocks = (in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>;
    tokens = static_cast<int>(p.tokens - first_token < 8 ? p.tokens - first_token : 8);
    // An odd number of tiles: the last one is computed twice and stored once.
    const auto of_weight = [&](int i) { return first_tile + i < tiles ? first_tile + i : tiles - 1; };
    codes_at = kept(16u * lane);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) codes_from[i] = kept(w.qweight + of_weight(i) * blocks * kBlock + next * kBytes + codes_at);

    // Halves of 128 bytes, of two units, change places in odd tokens, so that 8 lanes read from all banks.
    const uint32_t piece = lane % kRowPieces, token = lane / kRowPieces;
    x_from = kept(static_cast<const uint8_t*>(p.x) + ((first_token + token) * w.in_features + 8 * piece) * 2 + next * kRowBytes);
    x_to = kept(kActivationsAt + token * kRowBytes + 16 * (piece ^ 4 * (token % 2)));
    columns = kept(in_features > 8 * piece ? in_features - 8 * piece : 0);
    // Columns of a matrix instruction are independent: lanes whose token does not exist take token 0, and nobody stores their sums.
    const uint32_t own = lane / 4 < tokens ? lane / 4 : 0, first = kActivationsAt + own * kRowBytes + 16 * (lane % 4);
#pragma unroll
    for (uint32_t u = 0; u < 2; ++u) x_at[u] = kept(first + 64 * (u ^ own % 2));

    pair = kept(pair_bytes(w.scale_dtype)), group_bytes = kept(8 * pair);
    const uint32_t pairs = kActivationsAt + p.stage_tokens * kRowBytes;
    pairs_to = kept(pairs + lane * pair), pairs_at = kept(pairs + lane / 4 * pair);
    const void* of_lane = kZeros && lane >= 8 * kTiles ? w.zeros : w.scales;
    pairs_from = kept(static_cast<const uint8_t*>(of_lane) + (of_weight(lane / 8 % kTiles) * w.groups * 8 + lane % 8) * pair);
  }

  // From a stage's pairs to those of unit u, behind which a group may end.
  __device__ __forceinline__ uint32_t pairs_of(int u) const { return p.flush_mask == kStepUnits - 1 ? 0 : u * kPairLanes * pair; }

  // ---- from global memory to a stage

  __device__ __forceinline__ void copy_activations(uint32_t stage) {
    const bool exists = next_x * kStepColumns < columns;
#pragma unroll
    for (int first = 0; first < 8; first += kTokensAtOnce) {
      if (first >= tokens) break;
      if (first + lane / kRowPieces < tokens)
        cp_async_or_zero(stage + x_to + first * kRowBytes, x_from + first * 2 * p.weight.in_features, exists);
    }
    x_from += blockDim.x * (kRowBytes / 32), next_x += blockDim.x / 32;
  }

  // Codes, scales and zero points.
  __device__ __forceinline__ void copy_weights(uint32_t stage) {
    constexpr int kBlocks = kBytes / kBlock;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint8_t* const from = codes_from[i];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // The last step may have fewer blocks. Columns behind K meet activations of zero: any codes will do.
        const bool stored = block == 0 || next * kBlocks + block < blocks;
        const uint32_t to = stage + codes_at + i * kBytes + block * kBlock;
        cp_async(to, stored ? from + block * kBlock : from);
        if (kBlock > 512 && lane < (kBlock - 512) / 16) cp_async(to + 512, from + 512);
      }
      codes_from[i] += blockDim.x * (kBytes / 32);
    }
    const uint32_t step = next;
    next += blockDim.x / 32;
    if (lane >= kPairLanes) return;
    const uint32_t last = static_cast<uint32_t>(p.weight.groups) - 1;
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) {
      if ((u + 1) & p.flush_mask) continue;
      uint32_t group = multiply_high(2 * (step * kStepUnits + u), p.group_magic);
      group = group < last ? group : last;  // units behind K
      const uint32_t to = stage + pairs_to + pairs_of(u);
      const uint8_t* from = pairs_from + static_cast<uint64_t>(group) * group_bytes;
      copy_pair(to, from, p.weight.scale_dtype);
    }
  }

  // ---- from a stage to sums

  // For multiply_step. Columns behind K meet codes of others, and activations of zero.
  struct Operands {
    const LinearWarp& warp;
    uint32_t stage, pair_stride;
    __device__ __forceinline__ Kind codes(int tile, int block) const {
      Kind codes;
      codes.take(stage + warp.codes_at + tile * kBytes + block * kBlock, warp.lane);
      return codes;
    }
    __device__ __forceinline__ uint4 x(int u) const { return load_shared<uint4>(stage + warp.x_at[u % 2] + u / 2 * 128); }
    __device__ __forceinline__ uint32_t pairs(int u) const { return stage + warp.pairs_at + warp.pairs_of(u); }
  };

  // All steps of the warp. `fill`: what is to be done once while the first weights are on their way. `table`: of the lane.
  template <class T, class Fill>
  __device__ __forceinline__ void run(uint32_t ring, uint32_t table, StepSums<kTiles>& sums, const Fill& fill) {
    const uint32_t bytes = kept(p.stage_bytes), end = kept(ring + p.stages * bytes), warps = blockDim.x / 32;
    // What the kernel before this one gives is x; the weight is on its way when that ends. (No kernel that lets the next one start writes weights.
    // To ask for more of it in L2 here costs time: 32 KB of each tile 13.4 -> 14.0 us, 128 KB 16.7, H200, 14336 x 4096.)
    let_next_kernel_start();
    uint32_t at = ring;
    for (; at + bytes != end; at += bytes)
      if (next < steps) copy_weights(at);
    fill();
    wait_for_previous_kernel();
    for (at = ring; at + bytes != end; at += bytes) {
      if (next_x < steps) copy_activations(at);
      cp_async_commit();
    }
    uint32_t refilled = at;
    at = ring;
    for (uint32_t step = threadIdx.x / 32; step < steps; step += warps) {
      if (p.stages == kMostStages)
        cp_async_wait<kMostStages - 2>();
      else
        cp_async_wait<0>();
      sync_warp();  // the stage is there for all lanes, and all have read the one that is refilled
      if (next < steps) copy_weights(refilled), copy_activations(refilled);
      cp_async_commit();

      Kind codes[kTiles];
      multiply_step<Kind, T, kZeros, 0>(p, Operands{*this, at, group_bytes}, table, codes, sums);

      refilled = at;
      at = at + bytes == end ? ring : at + bytes;
    }
  }
};

// What a thread block computes: kTiles tiles of rows for up to 8 tokens.
template <class Kind, class T, bool kZeros, int kTiles>
__device__ __forceinline__ void linear_block(const LinearParams& p, int64_t first_tile, int64_t first_token) {
  constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0;
  uint8_t* shared = shared_memory();
  float* partial = reinterpret_cast<float*>(shared + kTableBytes);  // [warps][kTiles][32][4]
  const uint32_t rings = shared_address(partial + blockDim.x / 32 * kTiles * 128);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  LinearWarp<Kind, kZeros, kTiles> mine(p, first_tile, first_token);
  StepSums<kTiles> sums;
  const uint32_t ring = kept(rings + warp * (p.stages * p.stage_bytes)), table = kept(shared_address(shared) + 4 * lane);
  mine.template run<T>(ring, table, sums, [&] {
    if constexpr (Kind::kTable) {
      TableCodes::fill<T>(shared, p.weight.codebook);
      sync_block();
    }
  });
  store_sums(partial, sums);
  sync_block();

  for (int i = threadIdx.x; i < kTiles * kTileRows * 8; i += blockDim.x) {
    const int row = i % kTileRows, token = i / kTileRows % 8, tile = i / (kTileRows * 8);
    const int64_t n = (first_tile + tile) * kTileRows + row, m = first_token + token;
    if (n >= p.weight.out_features || m >= p.tokens) continue;
    float sum = sum_of_warps<kTiles * 128>(partial, (tile * 32 + row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2);
    if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
    store(static_cast<uint16_t*>(p.y) + m * p.weight.out_features + n, from_float(T{}, sum));
  }
}

template <class Kind, class T, bool kZeros, int kTiles>
__global__ void __launch_bounds__(kMostThreads, 2) linear_kernel(const LinearParams p) {
  linear_block<Kind, T, kZeros, kTiles>(p, static_cast<int64_t>(blockIdx.x) * kTiles, 0);
}

// ---- launcher ----

// Sets the stages of a ring for `tokens` tokens of a thread block of `warps`. Returns the bytes of shared memory of a thread block.
template <class Kind, bool kZeros, int kTiles>
size_t plan_ring(LinearParams& p, int64_t tokens, size_t warps = kMostWarps) {
  using Warp = LinearWarp<Kind, kZeros, kTiles>;
  p.flush_mask = flush_mask(p.weight, kStepUnits);
  const size_t pairs = (p.flush_mask == kStepUnits - 1 ? 1 : kStepUnits) * Warp::kPairLanes * pair_bytes(p.weight.scale_dtype);
  const size_t stage = Warp::kActivationsAt + static_cast<size_t>(tokens) * Warp::kRowBytes + pairs;
  const size_t fixed = (Kind::kTable ? TableCodes::kTableBytes : 0) + warps * kTiles * 32 * 4 * sizeof(float);
  const auto bytes = [&](size_t stages) { return fixed + warps * stages * stage; };
  p.stages = bytes(kMostStages) <= most_shared_bytes() ? kMostStages : 2;
  p.stage_bytes = static_cast<uint32_t>(stage);
  p.stage_tokens = static_cast<uint32_t>(tokens);
  return bytes(p.stages);
}

template <class Kind, class T, bool kZeros, int kTiles>
const char* launch_tiles(const LinearParams& params, cudaStream_t stream) {
  LinearParams p = params;
  const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows, blocks = (tiles + kTiles - 1) / kTiles;
  // Where there are many blocks of two tiles with few steps each, half the warps: for 4096 x 14336 in 4 bits 12.8 -> 11.6 us with 4 tokens, in 8 bits
  // 25.7 -> 21.7 with 8 (H200). A table is filled by each block.
  const bool few_steps = p.weight.in_features <= 32 * kStepColumns && blocks >= int64_t{3} * multiprocessors();
  const bool half = kTiles == 2 && few_steps && !(Kind::kTable && p.tokens < 3);
  const size_t warps = half ? kMostWarps / 2 : kMostWarps, shared = plan_ring<Kind, kZeros, kTiles>(p, p.tokens, warps);
  const auto kernel = linear_kernel<Kind, T, kZeros, kTiles>;
  return launch_early(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), evenly(shared, blocks), stream, p);
}

template <class Kind, class T, bool kZeros>
const char* launch_zeros(const LinearParams& p, cudaStream_t stream) {
  // Two tiles share activations, and take fewer instructions for each: measured on an H100 (4096 x 14336, one token) 17 instead of 20 us, with
  // 3 bits 15 and 18. 8-bit codes are read at full speed with one tile; two are 33 us instead of 28.
  // Two tiles of zero points for each unit of a large block leave too few registers.
  if constexpr (!kZeros || Kind::kUnits < 4) {
    const bool enough_tiles = p.weight.out_features >= int64_t{4} * kTileRows * multiprocessors();
    LinearParams two = p;
    if ((Kind::kUnits > 1 || p.tokens > 2) && enough_tiles && plan_ring<Kind, kZeros, 2>(two, p.tokens) <= most_shared_bytes())
      return launch_tiles<Kind, T, kZeros, 2>(p, stream);
  }
  return launch_tiles<Kind, T, kZeros, 1>(p, stream);
}

template <class Kind, class T>
const char* launch_dtype(const LinearParams& p, cudaStream_t stream) {
  if constexpr (Kind::kMayHaveZeros)
    if (p.weight.zeros) return launch_zeros<Kind, T, true>(p, stream);
  return launch_zeros<Kind, T, false>(p, stream);
}

template <class Kind>
const char* launch_linear_of(const LinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<Kind, BFloat16>(p, stream) : launch_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
