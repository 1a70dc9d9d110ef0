// Weights of pairs as operands of wgmma: numbers times their scales, rounded to 16 bits, which leaves accumulators their registers.
//
// That is what dequantizing gives (unpack.cu), and what the matrix library reads with many tokens (Scaling says how, and where a weight can be
// the other one of two neighbours; entries of a table are rounded before).
#pragma once

#include "wgmma_block.h"

namespace hfq {
namespace {

// How a number of 16 bits becomes a weight. What dequantizing gives is the product in float32, rounded.
enum Scaling {
  kAsStored,    // times a scale of the dtype of x: the same
  kInTwoParts,  // times a scale of another dtype, rounded to bfloat16, and times what that lacks, rounded: the same but where the product is within
                // 2^-15 of the middle of two bfloat16s, one of some hundred, which may become the other one
  kInFloats,    // the same: for zero points, and for float16, in which what small scales lack would be subnormal, and large ones infinite
};

// What a consumer has of its tile: operands of all units of a chunk.
template <class Kind, class T, class Block>
struct WgmmaRounded {
  static constexpr int kUnits = Block::kUnits, kSums = Block::kSums;
  // Numbers are 2^-kDown times what they are, and scales 2^kDown times.
  static constexpr int kDown = Kind::template kDown<T>;
  static constexpr float kUp = 1 << kDown, kMiddle = (1 << (Block::kBits - 1)) / kUp;
  static constexpr bool kIsBFloat16 = std::is_same<T, BFloat16>::value;
  static constexpr DType kOwn = kIsBFloat16 ? kBFloat16 : kFloat16;

  const WgmmaParams& p;
  const Block& block;
  int lane, tile;                // of the block
  uint32_t codes_at, scales_at;  // what the lane reads, from the beginning of a stage
  uint32_t table;                // of the lane
  float sums[kSums] = {};
  Kind codes;
  Pair scale, zero;
  uint32_t factors[2];  // the scales of rows g and g + 8, twice each, in 16 bits
  uint32_t rests[2];    // what those lack
  uint32_t a[kUnits][2][4];

  __device__ __forceinline__ WgmmaRounded(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), lane(threadIdx.x % 32), tile(warp) {
    codes_at = kept(static_cast<uint32_t>(Block::kCodesAt + tile * Block::kBytes + 16 * lane));
    const uint32_t pair = lane / 4 * pair_bytes(p.weight.scale_dtype);
    scales_at = kept(static_cast<uint32_t>(Block::kScalesAt + tile * Block::kScaleBytes + pair));
    if constexpr (Kind::kTable) table = kept(block.ring + Block::kRing + 4 * lane);
  }

  // Weights of unit `u` of a stage, of which `unit` is the first one of all columns. `kWhole`: scales change with chunks only.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void unpack(uint32_t stage, uint32_t unit) {
    const bool new_scales = kWhole ? u == 0 : (u & p.flush_mask) == 0;
    const uint32_t pair = stage + scales_at + (!kWhole && new_scales ? scales_of(p, unit, u) : 0);
    if constexpr (u % Kind::kUnits == 0) codes.take(stage + codes_at + u / Kind::kUnits * kBlockBytes<Block::kBits>, lane);
    uint32_t(&to)[2][4] = a[u];
    codes.template unit<T, u % Kind::kUnits, true>(table, to);
    Kind::order(to);
    if (new_scales) take_scales<kScaling>(pair);
#pragma unroll
    for (int j = 0; j < 8; ++j) to[j / 4][j % 4] = kept(weights<kScaling>(to[j / 4][j % 4], j % 2));
  }

  template <Scaling kScaling>
  __device__ __forceinline__ void take_scales(uint32_t pair) {
    const RawPair raw = load_pair(pair, kScaling == kAsStored ? kOwn : p.weight.scale_dtype);
    if constexpr (kScaling == kAsStored) {
      const uint32_t both = kDown > 0 ? fma2(T{}, raw.first, kBothPowers<T, kDown>, kNothing) : raw.first;
      factors[0] = permute_bytes(both, 0, 0x1010), factors[1] = permute_bytes(both, 0, 0x3232);
    } else if constexpr (kScaling == kInTwoParts) {
      const Pair once = to_floats(raw, p.weight.scale_dtype), exact = {once.low * kUp, once.high * kUp};
      const uint32_t both = from_floats(T{}, exact.low, exact.high);
      const float low = to_float(T{}, static_cast<uint16_t>(both)), high = to_float(T{}, static_cast<uint16_t>(both >> 16));
      const uint32_t rest = from_floats(T{}, exact.low - low, exact.high - high);
      factors[0] = permute_bytes(both, 0, 0x1010), factors[1] = permute_bytes(both, 0, 0x3232);
      rests[0] = permute_bytes(rest, 0, 0x1010), rests[1] = permute_bytes(rest, 0, 0x3232);
    } else {
      const Pair once = to_floats(raw, p.weight.scale_dtype);
      scale = {once.low * kUp, once.high * kUp};
      if (p.weight.zeros) {
        const Pair stored = load_floats(pair + Block::kZerosAt - Block::kScalesAt, p.weight.scale_dtype);
        zero = {stored.low / kUp, stored.high / kUp};
      }
    }
  }

  // Two numbers of a row, times its scale. (The middle, added to a code that it was taken from, is exact.)
  template <Scaling kScaling>
  __device__ __forceinline__ uint32_t weights(uint32_t numbers, int high) const {
    if constexpr (kScaling == kAsStored) return fma2(T{}, numbers, factors[high], kNothing);
    if constexpr (kScaling == kInTwoParts) return fma2(T{}, numbers, factors[high], fma2(T{}, numbers, rests[high], kNothing));
    float first = to_float(T{}, static_cast<uint16_t>(numbers)), second = to_float(T{}, static_cast<uint16_t>(numbers >> 16));
    if (Kind::kMayHaveZeros && p.weight.zeros) {
      const float of_row = high ? zero.high : zero.low;
      first = add(add(first, kMiddle), -of_row), second = add(add(second, kMiddle), -of_row);
    }
    const float of_row = high ? scale.high : scale.low;
    return from_floats(T{}, first * of_row, second * of_row);
  }
};

// All chunks of a consumer, with its run_chunks for what groups and scales are.
template <Scaling kScaling, class Consumer>
__device__ __forceinline__ void run_groups(Consumer& consumer) {
  if (consumer.p.flush_mask == Consumer::kUnits - 1)
    consumer.template run_chunks<kScaling, true>();
  else
    consumer.template run_chunks<kScaling, false>();
}
template <class Consumer>
__device__ __forceinline__ void run_rounded(Consumer& consumer) {
  if (consumer.p.weight.zeros)
    run_groups<kInFloats>(consumer);
  else if (consumer.p.weight.scale_dtype == Consumer::kOwn)
    run_groups<kAsStored>(consumer);
  else
    run_groups<Consumer::kIsBFloat16 ? kInTwoParts : kInFloats>(consumer);
}

}  // namespace
}  // namespace hfq
