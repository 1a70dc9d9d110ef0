// One token times a 4-bit codebook, in integers: what a warp of wide_kernel.h is then.
//
// Activations are digits (digits.h), and so are the codebook's 16 numbers: 1 / 8191 of the largest magnitude times 128 (h - 64) + l, h and l in 0 ..
// 127, with an error of 2^-14 of it (bfloat16: up to 2^-9). A permutation of bytes takes four codes as its selectors. It finds the digits of those
// below 8 in two registers, and for the others the sign of a byte there, 0; a second one with all codes + 8 finds theirs. Both are operands, whose
// products add up. So 8 codes take 9 instructions of the pipe for bits and 2 of the one that multiplies, and nothing of shared memory, of whose
// cycles a table of pairs takes two thirds.
//
// Operands have two tiles: linear_digits_kernel.h says how. Sums of 64 or 128 products of digits are below 2^21 and exact, and begin in the mantissa
// of 2^23 + 2^22. 7 KB of codes in groups of 64, a step of 7 tiles, take 1220 instructions; a table's 960.
#pragma once

#include "digits.h"
#include "wide_kernel.h"

namespace hfq {
namespace {

template <class Block>
struct WideDigitsWarp;

constexpr int kWideDigitTiles = 8;

// `kFlush`: scales are applied after so many units.
template <class T_, int kFlush_>
struct WideDigitsBlock : StepCodes<TableCodes>, WideSums<1, kTileRows * kWideDigitTiles> {
  using Warp = WideDigitsWarp<WideDigitsBlock>;
  using T = T_;
  static constexpr bool kZeros = false;
  static constexpr int kTiles = kWideDigitTiles, kFlush = kFlush_, kGroups = kStepUnits / kFlush, kKinds = 1, kNumbers = kTiles;
  static constexpr int kMostWarps = 16, kThreads = 32 * kMostWarps;

  // Memory of a warp: codes [kTiles][kBytes]; x of a step; scales [kGroups][kTiles][8] as they are stored and as floats; digits; and each lane's
  // sums, of two tiles, [kTiles / 2][32] of four floats. Then sums of rows.
  static constexpr int kRowBytes = 2 * kStepColumns, kPairsStride = 64, kPairsBytes = kGroups * kNumbers * kPairsStride;
  static constexpr int kXAt = kTiles * kBytes, kPairsAt = kXAt + kRowBytes, kFloatsAt = kPairsAt + kPairsBytes, kDigitsAt = kFloatsAt + kPairsBytes;
  static constexpr int kSumsAt = kDigitsAt + kDigitBytes, kWarpBytes = kSumsAt + kTiles / 2 * 512;
  static_assert(kWarpBytes % 128 == 0 && kSumsStride * 4 <= kXAt);
  static constexpr int kTableBytes = 0;
  static constexpr float kXCost = 1.0f;  // of a step, in tiles
};

template <class Block>
struct WideDigitsWarp : WideCopies<Block> {
  using Copies = WideCopies<Block>;
  using T = typename Block::T;
  using Copies::codes_at;
  using Copies::kBytes;
  using Copies::kGroups;
  using Copies::kTiles;
  using Copies::lane;
  using Copies::p;
  using Copies::step;
  using Copies::tiles;
  static constexpr int kTwos = kTiles / 2;

  uint32_t x_at, digits_to, digits_at, sums_at;
  uint32_t even, odd;    // selectors: of a digit's four columns 0 and 2, 1 and 3, and zeros
  uint32_t table[2][4];  // upper and lower digits of each code
  float unit;            // of the table

  __device__ __forceinline__ WideDigitsWarp(const WideParams& params, uint32_t, uint32_t memory) : Copies(params, memory) {
    x_at = kept(memory + Block::kXAt + 8u * lane), digits_to = kept(memory + Block::kDigitsAt + place_of_digits(lane));
    digits_at = kept(memory + Block::kDigitsAt + place_of_own_digit(lane));
    sums_at = kept(memory + Block::kSumsAt + 16u * lane);
    const bool lower = lane / 4 % 2;  // rows g + 8
    even = kept(lower ? 0x2044u : 0x4420u), odd = kept(lower ? 0x3144u : 0x4431u);
  }

  // A lane has a code's number, if there is one.
  __device__ __forceinline__ void make_table() {
    const float number = lane < 16 ? hfq::load(p.weight.codebook + lane) : 0.0f;
    const float largest = as_float(largest_of_warp(as_bits(number) & 0x7fffffffu)), share = largest > 0.0f ? number / largest : 0.0f;
    // 8192 + 8191 share, in the mantissa.
    const uint32_t n = as_bits(multiply_add(share, 8191.0f, kMantissaOffset + 8192.0f)) - kInMantissa;
    const uint32_t digits = n >> 7 << 8 | (n & 127), two = digits | shuffle_xor(digits, 1) << 16, next_two = shuffle_xor(two, 2);
    const uint32_t upper = permute_bytes(two, next_two, 0x7531), lower = permute_bytes(two, next_two, 0x6420);
#pragma unroll
    for (int i = 0; i < 4; ++i) table[0][i] = shuffle_from(upper, 4 * i), table[1][i] = shuffle_from(lower, 4 * i);
    unit = largest / 8191.0f * 16.0f;  // to_digits has 16ths
  }

  // ---- to sums

  // What a warp holds of x while it goes through its tiles: operands, and for each group what sums of h have too much: 64 times them, and where they
  // begin. (Those of a tile wait for it last: eight instructions that wait for each other.)
  struct Activations {
    uint32_t b[2][4][2];
    float offsets[kGroups][2];
  };

  __device__ __forceinline__ void take_x(Activations& x) const {
    constexpr uint32_t kSixtyFour = 0x40404040u, middles[4] = {kSixtyFour, kSixtyFour, kSixtyFour, kSixtyFour};
    int32_t all[kGroups][4];
#pragma unroll
    for (int group = 0; group < kGroups; ++group)
#pragma unroll
      for (int c = 0; c < 4; ++c) all[group][c] = static_cast<int32_t>(kInMantissa);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint4 words = load_shared<uint4>(digits_at + 16 * block);
      const uint32_t digits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t(&b)[2] = x.b[block][i];
        b[0] = permute_bytes(digits[i], 0, even), b[1] = permute_bytes(digits[i], 0, odd);
        mma(all[block * kGroups / 2], middles, b[0], b[1]);
      }
    }
#pragma unroll
    for (int group = 0; group < kGroups; ++group)  // (of all rows the same)
#pragma unroll
      for (int h = 0; h < 2; ++h) x.offsets[group][h] = as_float(static_cast<uint32_t>(all[group][h]));
  }

  // Digits of four codes of each of one or two words.
  template <bool kTwo>
  static __device__ __forceinline__ void look_up(uint32_t low, uint32_t high, const uint32_t (&codes)[2], uint32_t (&a)[4]) {
    a[0] = permute_bytes_or_signs(low, high, codes[0]), a[2] = permute_bytes_or_signs(low, high, upper_half(codes[0]));
    a[1] = kTwo ? permute_bytes_or_signs(low, high, codes[1]) : 0, a[3] = kTwo ? permute_bytes_or_signs(low, high, upper_half(codes[1])) : 0;
  }

  // The lane's sums of two tiles.
  __device__ __forceinline__ float4 load_sums(int tile) const {
    const uint4 v = load_shared<uint4>(sums_at + tile * 256);
    return make_float4(as_float(v.x), as_float(v.y), as_float(v.z), as_float(v.w));
  }

  // A tile, or it and the next one. Both halves of the columns at once: sums that wait for each other are four rows of eight instructions.
  template <bool kTwo>
  __device__ __forceinline__ void multiply(int tile, const Activations& x) const {
    float4 sums = load_sums(tile);
    int32_t upper[2][4], lower[2][4];
    uint32_t words[2][4][2];
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint32_t at = codes_at + tile * kBytes + 512 * block;
      const uint4 one = load_shared<uint4>(at), two = kTwo ? load_shared<uint4>(at + kBytes) : uint4{};
      words[block][0][0] = one.x, words[block][1][0] = one.y, words[block][2][0] = one.z, words[block][3][0] = one.w;
      words[block][0][1] = two.x, words[block][1][1] = two.y, words[block][2][1] = two.z, words[block][3][1] = two.w;
#pragma unroll
      for (int c = 0; c < 4; ++c) upper[block][c] = lower[block][c] = block < kGroups ? static_cast<int32_t>(kInMantissa) : 0;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int block = 0; block < 2; ++block) {
        const uint32_t(&own)[2] = words[block][i], others[2] = {own[0] ^ 0x88888888u, own[1] ^ 0x88888888u};
        const uint32_t(&b)[2] = x.b[block][i];
        uint32_t a[4];
        look_up<kTwo>(table[0][0], table[0][1], own, a);
        mma(upper[block], a, b[0], b[1]);
        look_up<kTwo>(table[1][0], table[1][1], own, a);
        mma(lower[block], a, b[0], b[1]);
        look_up<kTwo>(table[0][2], table[0][3], others, a);
        mma(upper[block], a, b[0], b[1]);
        look_up<kTwo>(table[1][2], table[1][3], others, a);
        mma(lower[block], a, b[0], b[1]);
      }
    if constexpr (kGroups == 1)
#pragma unroll
      for (int c = 0; c < 4; ++c) upper[0][c] += upper[1][c], lower[0][c] += lower[1][c];
    // Products of each group, times its scales.
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      float products[4];
#pragma unroll
      for (int c = 0; c < (kTwo ? 4 : 2); ++c) {
        const float high = as_float(static_cast<uint32_t>(upper[group][c])) - x.offsets[group][c % 2];
        products[c] = multiply_add(high, 128.0f, as_float(static_cast<uint32_t>(lower[group][c])) - kMantissaOffset);
      }
      const Pair one = this->floats_of(group, 0, tile);
      sums.x += one.low * products[0], sums.y += one.high * products[1];
      if constexpr (kTwo) {
        const Pair two = this->floats_of(group, 0, tile + 1);
        sums.z += two.low * products[2], sums.w += two.high * products[3];
      }
    }
    store_shared(sums_at + tile * 256, make_uint4(as_bits(sums.x), as_bits(sums.y), as_bits(sums.z), as_bits(sums.w)));
  }

  // All steps of the warp. (One at least: behind the last one are zeros.) `prepare`: what is to be done once while the first weights are on their
  // way.
  template <class Prepare>
  __device__ __forceinline__ void run(const Prepare& prepare) {
    // A group of copies for two tiles, so that the oldest of kTwos groups is always what comes next.
    this->copy_pairs();
#pragma unroll
    for (int tile = 1; tile < kTiles; ++tile) {
      if (tile < tiles) this->copy_codes(tile);
      if (tile % 2) cp_async_commit();
    }
    prepare();
    make_table();
#pragma unroll
    for (int i = 0; i < kTwos; ++i) store_shared(sums_at + 512 * i, uint4{});
    wait_for_previous_kernel();
    this->store_first_x();
#pragma unroll 1
    do {
      cp_async_wait<kTwos - 1>();
      sync_warp();  // x and scales are there for all lanes
      const float factor = to_digits<T>(x_at, digits_to) * unit;
      this->convert_pairs([&](int, const Pair& pair) -> Pair { return {pair.low * factor, pair.high * factor}; });
      step += p.stride;
      sync_warp();  // all have read x and scales as they are stored, and written them as digits and floats
      this->copy_x();
      this->copy_pairs();
      this->tile_from = this->codes_from += p.stride * kBytes;
      Activations x;
      take_x(x);
#pragma unroll 1
      for (int tile = 0; tile < kTiles; tile += 2) {
        cp_async_wait<kTwos - 1>();
        if (tile + 1 < tiles) {
          multiply<true>(tile, x);
          this->copy_codes(tile);
          this->copy_codes(tile + 1);
        } else if (tile < tiles) {
          multiply<false>(tile, x);
          this->copy_codes(tile);
        }
        cp_async_commit();
      }
    } while (step < p.steps);
    cp_async_wait<0>();
    sync_warp();  // the warp's memory is free
  }

  // To the warp's memory, which `to` points to. Lanes of a row have a digit each.
  __device__ __forceinline__ void store_sums(float* to) const {
    const int digit = lane % 4;
    const float place = digit == 0 ? 1.0f : digit == 1 ? 256.0f : digit == 2 ? 65536.0f : 0.0f;
#pragma unroll
    for (int i = 0; i < kTwos; ++i) {
      const float4 own = load_sums(2 * i);
      float rows[4] = {own.x, own.y, own.z, own.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        rows[c] *= place;
        rows[c] += as_float(shuffle_xor(as_bits(rows[c]), 1));
        rows[c] += as_float(shuffle_xor(as_bits(rows[c]), 2));
        if (digit == 0) to[2 * kTileRows * i + 8 * c + lane / 4] = rows[c];
      }
    }
  }
};

// ---- launcher

template <class T>
const char* launch_wide_digits_of(const LinearParams& p, cudaStream_t stream) {
  const bool whole = flush_mask(p.weight, kStepUnits) == kStepUnits - 1;
  return whole ? launch_wide_block<WideDigitsBlock<T, 4>>(p, stream) : launch_wide_block<WideDigitsBlock<T, 2>>(p, stream);
}

inline const char* launch_wide_digits(const LinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_wide_digits_of<BFloat16>(p, stream) : launch_wide_digits_of<Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
