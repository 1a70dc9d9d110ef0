// From stages to sums for many tokens: 256 rows and 128 tokens, for which accumulators leave no registers for a second set of sums.
//
// So weights are what they are after dequantizing: a number times its scale, rounded to 16 bits, as unpack.cu does it and the matrix library reads it
// with many tokens (Scaling says how, and where a weight can be the other one of two neighbours; entries of a table are rounded before). x comes
// in the order of stages (wgmma_tokens.cu).
// Each of 8 warps has two tiles, each of two warpgroups two instructions side by side. Tensor cores take 2048 clocks for a chunk of 128 tokens,
// while a scheduler issues some 880 instructions of consumers (4 bits, bfloat16, scales in two parts; through float32 1720). Measured on an H200:
// 2230 clocks.
#pragma once

#include "wgmma_block.h"

namespace hfq {
namespace {

// Fills stages, a quarter of each a warp, in bulk. (One warp whose lanes ask for all 33 copies of a chunk needs some 80 clocks for each, 2600 beside
// the 2048 of the tensor cores.)
template <class Block>
struct WgmmaLargeProducer {
  static constexpr int kXBytes = 2 * Block::kHalf, kShare = kXBytes / Block::kProducers;

  const Block& block;
  WgmmaWeights<Block> weights;
  uint32_t x_to;          // the warp's share of x, in a stage
  const uint8_t* x_from;  // of the chunk that is copied next

  __device__ __forceinline__ WgmmaLargeProducer(const WgmmaParams& p, const Block& b, int warp)
      : block(b), weights(p, b, warp), x_to(warp * kShare) {
    const int64_t chunks = (p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns, tile = block.first_token / Block::kTokens;
    x_from = reinterpret_cast<const uint8_t*>(p.workspace) + (tile * chunks + block.chunk) * kXBytes + x_to;
  }

  __device__ __forceinline__ void run() {
    const uint32_t ahead = block.chunks < Block::kStages ? block.chunks : Block::kStages;
#pragma unroll 1
    for (uint32_t i = 0; i < ahead; ++i) weights.copy(i, kShare);
    wait_for_previous_kernel();
#pragma unroll 1
    for (uint32_t i = 0; i < ahead; ++i) copy_x(i);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (uint32_t i = ahead; i < block.chunks; ++i, turn.next()) {
      mbarrier_wait(block.empty(turn.at), turn.round % 2);
      sync_warp();  // a lane that copies nothing could come so late that it sees the bit of the next phase but one
      weights.copy(turn.at, kShare);
      copy_x(turn.at);
    }
  }

  __device__ __forceinline__ void copy_x(uint32_t at) {
    if (threadIdx.x % 32 == 0) copy_bulk(block.stage(at) + x_to, x_from, kShare, block.full(at));
    x_from += kXBytes;
  }
};

// How a number of 16 bits becomes a weight. What dequantizing gives is the product in float32, rounded.
enum Scaling {
  kAsStored,    // times a scale of the dtype of x: the same
  kInTwoParts,  // times a scale of another dtype, rounded to bfloat16, and times what that lacks, rounded: the same but where the product is within
                // 2^-15 of the middle of two bfloat16s, one of some hundred, which may become the other one
  kInFloats,    // the same: for zero points, and for float16, in which what small scales lack would be subnormal, and large ones infinite
};

template <class Kind, class T, class Block>
struct WgmmaLargeConsumer {
  static constexpr int kTiles = Block::kWarpTiles, kUnits = Block::kUnits, kSums = Block::kSums;
  static constexpr float kMiddle = 1 << (Block::kBits - 1);
  static constexpr bool kIsBFloat16 = std::is_same<T, BFloat16>::value;
  static constexpr DType kOwn = kIsBFloat16 ? kBFloat16 : kFloat16;

  const WgmmaParams& p;
  const Block& block;
  int lane, first_tile;          // of the warp's, four apart
  uint32_t codes_at, scales_at;  // what the lane reads, from the beginning of a stage
  uint32_t table;                // of the lane
  float sums[kTiles][kSums] = {};
  Kind codes[kTiles];
  Pair scales[kTiles], zeros[kTiles];
  uint32_t factors[kTiles][2];  // the scales of rows g and g + 8, twice each, in 16 bits
  uint32_t rests[kTiles][2];    // what those lack
  uint32_t a[2][kTiles][2][4];  // of two units, in turns

  __device__ __forceinline__ WgmmaLargeConsumer(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), lane(threadIdx.x % 32), first_tile(warp / 4 * 4 * kTiles + warp % 4) {
    codes_at = kept(static_cast<uint32_t>(Block::kCodesAt + first_tile * Block::kBytes + 16 * lane));
    const uint32_t pair = lane / 4 * pair_bytes(p.weight.scale_dtype);
    scales_at = kept(static_cast<uint32_t>(Block::kScalesAt + first_tile * Block::kScaleBytes + pair));
    if constexpr (Kind::kTable) table = kept(block.ring + Block::kRing + 4 * lane);
  }

  // Weights of unit `u` of a stage, of which `unit` is the first one of all columns. `kWhole`: scales change with chunks only.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void unpack(uint32_t stage, uint32_t unit) {
    const bool new_scales = kWhole ? u == 0 : (u & p.flush_mask) == 0;
    const uint32_t pair = stage + scales_at + (!kWhole && new_scales ? scales_of(p, unit, u) : 0);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t of_codes = stage + codes_at + 4 * i * Block::kBytes + u / Kind::kUnits * kBlockBytes<Block::kBits>;
      if constexpr (u % Kind::kUnits == 0) codes[i].take(of_codes, lane);
      uint32_t(&to)[2][4] = a[u % 2][i];
      codes[i].template unit<T, u % Kind::kUnits>(table, to);
      Kind::order(to);
      if (new_scales) take_scales<kScaling>(i, pair + 4 * i * Block::kScaleBytes);
#pragma unroll
      for (int j = 0; j < 8; ++j) to[j / 4][j % 4] = kept(weights<kScaling>(to[j / 4][j % 4], i, j % 2));
    }
  }

  template <Scaling kScaling>
  __device__ __forceinline__ void take_scales(int i, uint32_t pair) {
    const RawPair raw = load_pair(pair, kScaling == kAsStored ? kOwn : p.weight.scale_dtype);
    if constexpr (kScaling == kAsStored) {
      factors[i][0] = permute_bytes(raw.first, 0, 0x1010), factors[i][1] = permute_bytes(raw.first, 0, 0x3232);
    } else if constexpr (kScaling == kInTwoParts) {
      const Pair scale = to_floats(raw, p.weight.scale_dtype);
      const uint32_t both = from_floats(T{}, scale.low, scale.high);
      const float low = to_float(T{}, static_cast<uint16_t>(both)), high = to_float(T{}, static_cast<uint16_t>(both >> 16));
      const uint32_t rest = from_floats(T{}, scale.low - low, scale.high - high);
      factors[i][0] = permute_bytes(both, 0, 0x1010), factors[i][1] = permute_bytes(both, 0, 0x3232);
      rests[i][0] = permute_bytes(rest, 0, 0x1010), rests[i][1] = permute_bytes(rest, 0, 0x3232);
    } else {
      scales[i] = to_floats(raw, p.weight.scale_dtype);
      if (p.weight.zeros) zeros[i] = load_floats(pair + Block::kZerosAt - Block::kScalesAt, p.weight.scale_dtype);
    }
  }

  // Two numbers of a row, times its scale. (The middle, added to a code that it was taken from, is exact.)
  template <Scaling kScaling>
  __device__ __forceinline__ uint32_t weights(uint32_t numbers, int i, int high) const {
    if constexpr (kScaling == kAsStored) return fma2(T{}, numbers, factors[i][high], kNothing);
    if constexpr (kScaling == kInTwoParts) return fma2(T{}, numbers, factors[i][high], fma2(T{}, numbers, rests[i][high], kNothing));
    float first = to_float(T{}, static_cast<uint16_t>(numbers)), second = to_float(T{}, static_cast<uint16_t>(numbers >> 16));
    if (Kind::kMayHaveZeros && p.weight.zeros) {
      const float zero = high ? zeros[i].high : zeros[i].low;
      first = add(add(first, kMiddle), -zero), second = add(add(second, kMiddle), -zero);
    }
    const float scale = high ? scales[i].high : scales[i].low;
    return from_floats(T{}, first * scale, second * scale);
  }

  // Units u and later of the stage `turn`, of which `x` describes the activations. `first`: no other one is behind; `more`: another one follows.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void multiply(uint64_t x, const Turn<Block::kStages>& turn, uint32_t unit, bool first, bool more) {
    constexpr int kFrom = (u / 2 * Block::kHalf + u % 2 * 64) / 16;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) wgmma(T{}, sums[i], a[u % 2][i][j], x + kFrom + 2 * j, true);
    wgmma_commit();
    wgmma_wait<1>();
    if (u == 0 && !first) {  // nothing reads the stage behind any more
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.empty(turn.at ? turn.at - 1 : Block::kStages - 1));
    }
    if constexpr (u + 1 < kUnits) {
      unpack<kScaling, kWhole, u + 1>(block.stage(turn.at), unit);
      multiply<kScaling, kWhole, u + 1>(x, turn, unit, first, more);
    } else if (more) {
      Turn<Block::kStages> next = turn;
      next.next();
      mbarrier_wait(block.full(next.at), next.round % 2);
      unpack<kScaling, kWhole, 0>(block.stage(next.at), unit + kUnits);
    }
  }

  template <Scaling kScaling, bool kWhole>
  __device__ __forceinline__ void run_chunks() {
    const uint64_t x = x_descriptor(block.ring);
    Turn<Block::kStages> turn;
    if (block.chunks) {
      mbarrier_wait(block.full(0), 0);
      unpack<kScaling, kWhole, 0>(block.ring, block.chunk * kUnits);
    }
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next())
      multiply<kScaling, kWhole, 0>(x + turn.at * (Block::kStage / 16), turn, (block.chunk + i) * kUnits, i == 0, i + 1 < block.chunks);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) wgmma_wait<0>(sums[i]);
  }

  template <Scaling kScaling>
  __device__ __forceinline__ void run_groups() {
    if (p.flush_mask == kUnits - 1)
      run_chunks<kScaling, true>();
    else
      run_chunks<kScaling, false>();
  }

  __device__ __forceinline__ void run() {
    if (p.weight.zeros)
      run_groups<kInFloats>();
    else if (p.weight.scale_dtype == kOwn)
      run_groups<kAsStored>();
    else
      run_groups<kIsBFloat16 ? kInTwoParts : kInFloats>();
  }

  __device__ __forceinline__ void store_sums(float* partial) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) store_tile<Block>(partial, first_tile + 4 * i, sums[i]);
  }
};

}  // namespace
}  // namespace hfq
