// From stages to sums: a warp for each tile of 16 rows.
//
// It waits for a stage to be full, and says when it is empty, so that none waits for another that is behind. While the instructions of a unit run,
// the next one's numbers are made. Scales multiply float32 sums after a group, or a chunk if that ends first; sums of x for zero points come from mma
// with ones, as in gemm_kernel.h, or with the stage.
#pragma once

#include "wgmma_ranges.h"

namespace hfq {
namespace {

template <class Block>
struct WgmmaConsumer {
  using Kind = typename Block::Kind;
  using T = typename Block::T;
  static constexpr int kUnits = Block::kUnits, kSums = Block::kSums, kTokenTiles = Block::kTokenTiles;
  static constexpr float kMiddle = 1 << (Block::kBits - 1), kLowerFactor = two_to(Kind::template kLowerPlace<T>);
  // Whether codes are operands as they are.
  template <bool kWhole, bool kZeros>
  static constexpr bool kIsPlain = kWhole && !kZeros && Block::kPlain;
  // What scales take back, of rows g and g + 8.
  template <bool kPlain>
  static constexpr float kUp = two_to(kPlain ? kPlainUnit : Kind::template kDown<T>);
  template <bool kPlain>
  static constexpr float kUpLower = kUp<kPlain> / (kPlain ? kLowerFactor : 1);
  static constexpr int kAnyDType = -1;  // of scales: the parameters say which
  static constexpr int kPartialsAtOnce = Block::kAtFirst > 128 ? 2 : 1;  // as registers allow

  const WgmmaParams& p;
  const Block& block;
  int lane;
  uint32_t codes_at, scales_at;  // what the lane reads, from the beginning of a stage
  uint32_t table;                // of the lane
  float sums[kSums] = {}, products[kSums];
  Kind codes;
  uint32_t a[2][2][4];           // of two units, in turns

  __device__ __forceinline__ WgmmaConsumer(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), lane(threadIdx.x % 32) {
    codes_at = kept(static_cast<uint32_t>(Block::kCodesAt + warp * Block::kBytes + 16 * lane));
    scales_at = kept(static_cast<uint32_t>(Block::kScalesAt + warp * Block::kScaleBytes + lane / 4 * pair_bytes(p.weight.scale_dtype)));
    if constexpr (Kind::kTable) table = kept(block.ring + Block::kRing + 4 * lane);
  }

  // Codes of unit `u`, if a block begins with it.
  template <int u>
  __device__ __forceinline__ void take(uint32_t stage) {
    if constexpr (u % Kind::kUnits == 0) codes.take(stage + codes_at + u / Kind::kUnits * kBlockBytes<Block::kBits>, lane);
  }

  // Its numbers, or where codes are plain its codes.
  template <bool kPlain, int u>
  __device__ __forceinline__ void unpack() {
    if constexpr (kPlain) {
      codes.template plain_unit<u % Kind::kUnits>(a[u % 2]);
    } else {
      codes.template unit<T, u % Kind::kUnits, true>(table, a[u % 2]);
      Kind::order(a[u % 2]);
    }
    // Here, and not behind the next fence, where ptxas would add one more.
#pragma unroll
    for (int i = 0; i < 8; ++i) a[u % 2][i / 4][i % 4] = kept(a[u % 2][i / 4][i % 4]);
  }

  // Sums of activations over the units for which scales are applied at once: the warp's share of the tokens.
  __device__ __forceinline__ void add_activations(uint32_t at) const {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    const int warp = own_warp();  // again: a register less through all chunks
    if (warp >= kTokenTiles) return;
    uint8_t* const stage = block.memory + at * Block::kStage;
    float* to = reinterpret_cast<float*>(stage + Block::kXSumsAt);
    for (int tile = warp; tile < kTokenTiles; tile += Block::kTiles) {
      float d[4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t b[4];
        ldmatrix(b, stage + u / 2 * Block::kHalf + (8 * tile + lane % 8) * 128 + 16 * ((u % 2 * 4 + lane / 8) ^ lane % 8));
        mma(T{}, d, ones, b[0], b[1]);
        mma(T{}, d, ones, b[2], b[3]);
        if (((u + 1) & p.flush_mask) == 0) {
          if (lane < 4) *reinterpret_cast<float2*>(to + u * 8 * kTokenTiles + 8 * tile + 2 * lane) = make_float2(d[0], d[1]);
#pragma unroll
          for (int c = 0; c < 4; ++c) d[c] = 0.0f;
        }
      }
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(block.summed(at));
  }

  // Units u and later of the stage `turn`, of which `x` describes the activations and `unit` is the first one, of all columns. `more`: another one
  // follows, whose first unit's numbers are made; `next` is it, or `turn` if not kWhole. `kWhole`: scales, of the dtype kScales, are applied at its
  // end only; zero points, if kZeros, have sums of x in the stage. Then codes are asked for before the wgmma in front is waited for, and a chunk
  // begins with where the next one is, a chain of slow instructions, in place of its last unit. (Scales of units leave no registers for that.)
  template <bool kWhole, int kScales, bool kZeros, int u>
  __device__ __forceinline__ void multiply(uint64_t x, const Turn<Block::kStages>& turn, Turn<Block::kStages> next, uint32_t unit, bool more) {
    constexpr int kFrom = (u / 2 * Block::kHalf + u % 2 * 64) / 16;
    constexpr bool kPlain = kIsPlain<kWhole, kZeros>;
    const uint32_t stage = block.stage(turn.at);
    const bool zeros = kWhole ? kZeros : p.weight.zeros != nullptr;
    const uint32_t mask = kWhole ? kUnits - 1 : p.flush_mask;
    // Nothing is on the way yet: no kernel that we know of has other matrix instructions between a group and its wait.
    if constexpr (!kWhole)
      if (u == 0 && zeros) add_activations(turn.at);
    wgmma_fence();
    wgmma(T{}, products, a[u % 2][0], x + kFrom, (u & mask) != 0);
    wgmma(T{}, products, a[u % 2][1], x + kFrom + 2, true);
    wgmma_commit();
    if constexpr (!kWhole) wgmma_wait<1>();
    if constexpr (u + 1 < kUnits) {
      take<u + 1>(stage);
      if constexpr (kWhole) wgmma_wait<1>();
      unpack<kPlain, u + 1>();
    } else if (more) {
      if constexpr (!kWhole) next.next();
      mbarrier_wait(block.full(next.at), next.round % 2);
      take<0>(block.stage(next.at));
      if constexpr (kWhole) wgmma_wait<1>();
      unpack<kPlain, 0>();
    }
    // (Always so after the last unit. The compiler, which does not know, makes the numbers above before it waits.)
    if (kWhole ? u + 1 == kUnits : ((u + 1) & mask) == 0) {
      const uint32_t pair = stage + scales_at + (kWhole ? 0 : scales_of(p, unit, u));
      const Pair s = load_floats(pair, kScales == kAnyDType ? p.weight.scale_dtype : static_cast<DType>(kScales));
      if constexpr (!kWhole)
        if (u == mask && zeros) mbarrier_wait(block.summed(turn.at), turn.round % 2);
      wgmma_wait<0>(products);
      if (zeros) add_zeros(s, pair, stage + Block::kXSumsAt + (kWhole ? 0 : u * 32 * kTokenTiles));
      if constexpr (kPlain) add_lacks(stage);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? s.low * kUp<kPlain> : s.high * kUpLower<kPlain>) * products[i];
    }
    if constexpr (u + 1 < kUnits)
      multiply<kWhole, kScales, kZeros, u + 1>(x, turn, next, unit, more);
    else
      wgmma_wait<0>();
  }

  // A number for each token, [kTokens], of the lane's two in a tile of tokens.
  struct Tokens {
    float first, second;
  };
  __device__ __forceinline__ Tokens tokens_of(uint32_t numbers, int tile) const {
    const uint2 both = load_shared<uint2>(numbers + 32 * tile + 8 * (lane % 4));
    return {as_float(both.x), as_float(both.y)};
  }

  // Of plain codes.
  __device__ __forceinline__ void add_lacks(uint32_t stage) {
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const Tokens lack = tokens_of(stage + Block::kXSumsAt, tile);
#pragma unroll
      for (int i = 0; i < 4; ++i) products[4 * tile + i] += (i % 2 ? lack.second : lack.first) * (i < 2 ? 1 : kLowerFactor);
    }
  }

  // Products are with code - middle: what lacks is middle - zero for each activation, times the scales.
  __device__ __forceinline__ void add_zeros(const Pair& s, uint32_t pair, uint32_t x_sums) {
    const Pair zero = load_floats(pair + Block::kZerosAt - Block::kScalesAt, p.weight.scale_dtype);
    const float low = s.low * (kMiddle - zero.low), high = s.high * (kMiddle - zero.high);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const Tokens x = tokens_of(x_sums, tile);
      float* const d = sums + 4 * tile;
      d[0] += low * x.first, d[1] += low * x.second, d[2] += high * x.first, d[3] += high * x.second;
    }
  }

  // Numbers of the first unit of a stage, for which no other chunk's wgmma is waited.
  template <bool kPlain>
  __device__ __forceinline__ void begin(const Turn<Block::kStages>& turn) {
    mbarrier_wait(block.full(turn.at), turn.round % 2);
    take<0>(block.stage(turn.at));
    unpack<kPlain, 0>();
  }

  // So many chunks, which begin at a stage.
  template <bool kWhole, int kScales, bool kZeros>
  __device__ __forceinline__ void multiply_chunks(uint32_t chunk, uint32_t chunks, Turn<Block::kStages>& turn) {
    const uint64_t x = x_descriptor(block.ring);
    if (chunks) begin<kIsPlain<kWhole, kZeros>>(turn);
#pragma unroll 1
    for (uint32_t i = 0; i < chunks; ++i, turn.next()) {
      Turn<Block::kStages> next = turn;
      if constexpr (kWhole) next.next();
      multiply<kWhole, kScales, kZeros, 0>(x + turn.at * (Block::kStage / 16), turn, next, (chunk + i) * kUnits, i + 1 < chunks);
      sync_warp();
      block.release(turn.at, lane);
    }
  }

  template <bool kWhole, int kScales, bool kZeros = false>
  __device__ __forceinline__ void run_segments() {
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      multiply_chunks<kWhole, kScales, kZeros>(segment.chunk, segment.chunks, turn);
      end_segment<T>(p, block, segment, lane, own_warp(), sums, [&](uint32_t others) { add_partials(others); });
    }
  }

  __device__ __forceinline__ void add_partials(uint32_t others) {
    mbarrier_wait(block.gathered(1), 0);
#pragma unroll kPartialsAtOnce
    for (uint32_t other = others - 1; other > 0; --other) add_partial(p, block, other, sums);
    mbarrier_wait(block.gathered(0), 0);
    add_partial(p, block, 0, sums);
  }

  __device__ __forceinline__ void run() {
    if constexpr (Block::kSumsX)
      if (block.sums_x(p)) return run_segments<true, kAnyDType, true>();
    if (p.flush_mask != kUnits - 1 || p.weight.zeros) return run_segments<false, kAnyDType>();
    if (p.weight.scale_dtype == kFloat16) return run_segments<true, kFloat16>();
    if (p.weight.scale_dtype == kBFloat16) return run_segments<true, kBFloat16>();
    run_segments<true, kAnyDType>();
  }
};

}  // namespace
}  // namespace hfq
