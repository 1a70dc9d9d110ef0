// One token times 4-bit codes, in integers: cuda_linear for groups of a multiple of 128 columns, or one for each row; with a codebook of 64.
//
// 4-bit codes become bytes in 3 instructions for 8 of them, and 16-bit floats in 15 (fragments.h), and it is those that one token waits for: a
// chain of kernels that only reads takes 7.3 us for 4096 x 14336 on an H200, linear_kernel.h 11.6. So activations become integers too. A matrix
// instruction takes 8 tokens; one token has the room to be there in digits. Of each 128 columns
//
//   x = 2^-k (d0 + 2^8 d1 + 2^16 d2), d0 and d1 in -128 .. 127, d2 in -64 .. 64, k such that the largest |x| 2^k is at least 2^21, less than 2^22
//
// which rounds each x to a multiple of 2^-21 of the largest one or finer: 16-bit floats of a thousandth of it are exact. (An activation 30 000 times
// the others of its columns whose weights happen to be zero leaves an error of 0.3 % of an output's spread, the rounding of bfloat16.) Sums of 128
// products of a code and a digit are below 2^22 and exact. They begin with the bits of the float 2^23 + 2^22, in whose mantissa they count, so they
// are floats when they end. Scales times 2^-k multiply them.
//
// Layout "fragments" has rows g and g + 8 in neighbouring bytes: a byte of a word has columns 0 and 2 of four of row g, the next one those of row
// g + 8, then columns 1 and 3 of both. So the A operand has one tile in place of rows g, another one in place of rows g + 8, and the B operand
// activations at every second k, zeros between: column 2 d + h has digit d, for rows g (h = 0) or g + 8 (h = 1).
//
// Counted with beginnings and ends, 1 KB of codes takes 130 instructions (linear_kernel.h: 194), of which fewer take two clocks. A NaN or an
// infinity gives NaN in all outputs.
//
// A codebook's 16 numbers are two digits each, too: 1 / 8191 of the largest magnitude times 128 (h - 64) + l, h and l in 0 .. 127, an error of
// 2^-14 of it (bfloat16: up to 2^-9). A permutation takes four codes as its selectors: what it finds in 8 bytes, or for codes from 8 on the sign
// of one of them, 0. A second one with those codes' bytes, and all codes + 8, finds the others. Both are operands, whose products add up. So 8 codes
// take 11 instructions, and no look-up in shared memory, of whose cycles they would take two thirds.
#pragma once

#include "linear_step.h"
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kDigits = 3, kMostDigitWarps = 16;
constexpr uint32_t kDigitBytes = kDigits * kStepColumns;  // of a step of x

// `kGroups`: of scales, in a step.
template <bool kTable_, int kTiles_, int kGroups_, bool kZeros_>
struct DigitsBlock {
  static constexpr bool kTable = kTable_, kZeros = kZeros_;
  static constexpr int kTiles = kTiles_, kGroups = kGroups_, kRows = kTiles * kTileRows;
  static constexpr int kKinds = kZeros ? 2 : 1, kPairs = kKinds * kTiles;  // scales and zero points; of a group
  // Of a warp, and in one of them: codes, activations, pairs [group][kind][tile] as they are stored, in places of 64 bytes.
  static constexpr int kStages = 8 / kTiles;
  static constexpr int kCodeBytes = 1024, kXBytes = 2 * kStepColumns, kXAt = kTiles * kCodeBytes, kPairsAt = kXAt + kXBytes, kPairsStride = 64;
  static constexpr uint32_t kStageBytes = kPairsAt + kGroups * kPairs * kPairsStride;
  static constexpr size_t kWarpBytes = kTiles / 2 * 32 * sizeof(float4) + kStages * kStageBytes + kDigitBytes;  // with its sums
};

// The bits of 2^23 + 2^22, and what makes an integer of those of 2^23 + 2^22 + n: bytes d + 128.
constexpr uint32_t kInMantissa = 0x4b400000, kToBytes = 0x00808080u - kInMantissa;
constexpr float kMantissaOffset = 12582912.0f;

template <class Block>
struct DigitsWarp {
  static constexpr bool kTable = Block::kTable, kZeros = Block::kZeros;
  static constexpr int kTiles = Block::kTiles, kGroups = Block::kGroups, kPairs = Block::kPairs, kStages = Block::kStages;
  static constexpr int kCodeBytes = Block::kCodeBytes, kXBytes = Block::kXBytes, kXAt = Block::kXAt, kPairsAt = Block::kPairsAt;
  static constexpr int kPairsStride = Block::kPairsStride;

  const LinearParams& p;
  int lane;
  uint32_t steps, blocks;  // of the columns; stored ones
  // What the lane copies next: codes of each tile; activations. A pair of group 0.
  const uint8_t *codes_from[kTiles], *x_from, *pairs_from;
  uint32_t next, columns;             // the step of these; columns from the lane's piece of x to the end of it, of step 0
  uint32_t group_bytes;               // from one group's pairs to the next
  // Where these go, from the beginning of a stage, and what the lane reads.
  uint32_t codes_at, pairs_to, pairs_at, x_at;
  uint32_t ring, digits;              // of the warp: stages; digits of a step
  uint32_t digits_to, digits_at;
  uint32_t even, odd;                 // selectors: of a digit's four columns 0 and 1, or 0 and 2 for a table; the others; and zeros
  uint32_t table[2][4] = {};          // upper and lower digits of each code
  float unit = 1.0f;                  // of a table

  __device__ __forceinline__ DigitsWarp(const LinearParams& params, uint32_t memory)
      : p(params), lane(threadIdx.x % 32), next(threadIdx.x / 32), ring(memory), digits(kept(memory + kStages * Block::kStageBytes)) {
    const Weight& w = p.weight;
    const uint32_t in_features = static_cast<uint32_t>(w.in_features), tiles = static_cast<uint32_t>((w.out_features + kTileRows - 1) / kTileRows);
    steps = (in_features + kStepColumns - 1) / kStepColumns, blocks = (in_features + 63) / 64;
    // Where tiles are no multiple, the last one is computed several times and stored once.
    const uint32_t first = kTiles * blockIdx.x;
    const auto of_weight = [&](uint32_t i) { return static_cast<uint64_t>(first + i < tiles ? first + i : tiles - 1); };
    codes_at = kept(16u * lane);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) codes_from[i] = w.qweight + of_weight(i) * blocks * 512 + next * kCodeBytes + codes_at;
    x_from = static_cast<const uint8_t*>(p.x) + next * kXBytes + codes_at;
    columns = in_features > 8u * lane ? in_features - 8 * lane : 0;
    const uint32_t pair = pair_bytes(w.scale_dtype);
    group_bytes = 8 * pair;
    const void* of_lane = kZeros && lane >= 8 * kTiles ? w.zeros : w.scales;
    pairs_from = static_cast<const uint8_t*>(of_lane) + (of_weight(lane / 8 % kTiles) * w.groups * 8 + lane % 8) * pair;
    pairs_to = kept(kPairsAt + lane / 8 * kPairsStride + lane % 8 * pair), pairs_at = kept(kPairsAt + lane / 4 * pair), x_at = kept(kXAt + 8u * lane);
    digits_to = kept(digits + 32 * (lane % 8 / 2) + 8 * (lane / 8) + 4 * (lane % 2));
    // Lanes for which there is no digit take the last one's, and nobody reads their sums.
    digits_at = kept(digits + 128 * (lane / 8 < kDigits ? lane / 8 : kDigits - 1) + 32 * (lane % 4));
    const bool lower = lane / 4 % 2;  // rows g + 8
    if (kTable)
      even = kept(lower ? 0x2044u : 0x4420u), odd = kept(lower ? 0x3144u : 0x4431u);
    else
      even = kept(lower ? 0x1404u : 0x4140u), odd = kept(lower ? 0x3424u : 0x4342u);
  }

  // ---- from global memory to a stage: the next step

  // Codes, scales and zero points. Codes of columns behind K stay what they are: they meet zeros.
  __device__ __forceinline__ void copy_weights(uint32_t stage) {
    const bool whole = 2 * next + 1 < blocks;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint32_t to = stage + codes_at + i * kCodeBytes;
      cp_async(to, codes_from[i]);
      if (whole) cp_async(to + 512, codes_from[i] + 512);
      codes_from[i] += blockDim.x * (kCodeBytes / 32);
    }
    if (lane < 8 * kPairs)
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        uint32_t group = multiply_high(2 * (kStepUnits * next + kStepUnits / kGroups * g), p.group_magic);
        if (g > 0) group = group < static_cast<uint32_t>(p.weight.groups) ? group : static_cast<uint32_t>(p.weight.groups) - 1;  // behind K
        copy_pair(stage + pairs_to + g * kPairs * kPairsStride, pairs_from + static_cast<uint64_t>(group) * group_bytes, p.weight.scale_dtype);
      }
    next += blockDim.x / 32;
  }

  // x of a step, zeros behind K.
  __device__ __forceinline__ void copy_x(uint32_t stage, uint32_t step) {
    if (lane < kXBytes / 16) cp_async_or_zero(stage + kXAt + codes_at, x_from, step * kStepColumns < columns);
    x_from += blockDim.x * (kXBytes / 32);
  }

  // ---- from a stage to sums

  // A lane has a code's number, if there is one.
  __device__ __forceinline__ void make_table() {
    const float number = lane < 16 ? hfq::load(p.weight.codebook + lane) : 0.0f;
    unit = as_float(largest_of_warp(as_bits(number) & 0x7fffffffu)) / 8191.0f;
    // 8192 + number / unit, in the mantissa. (Zeros only: NaN, which becomes 0.)
    const uint32_t n = unit > 0.0f ? as_bits(multiply_add(number, 1.0f / unit, kMantissaOffset + 8192.0f)) - kInMantissa : 8192u;
    const uint32_t digits = n >> 7 << 8 | (n & 127), two = digits | shuffle_xor(digits, 1) << 16, next_two = shuffle_xor(two, 2);
    const uint32_t upper = permute_bytes(two, next_two, 0x7531), lower = permute_bytes(two, next_two, 0x6420);
#pragma unroll
    for (int i = 0; i < 4; ++i) table[0][i] = shuffle_from(upper, 4 * i), table[1][i] = shuffle_from(lower, 4 * i);
    unit *= 16.0f;  // as 4-bit codes are
  }

  // x in digits: [digit][t][unit][half of 8 columns] words of four columns. Returns 2^-k / 16.
  template <class T>
  __device__ __forceinline__ float to_digits(uint32_t stage) const {
    const uint2 both = load_shared<uint2>(stage + x_at);
    const float x[4] = {to_float(T{}, static_cast<uint16_t>(both.x)), to_float(T{}, static_cast<uint16_t>(both.x >> 16)),
                        to_float(T{}, static_cast<uint16_t>(both.y)), to_float(T{}, static_cast<uint16_t>(both.y >> 16))};
    uint32_t most = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) most = larger(most, as_bits(x[i]) << 1);
    const uint32_t exponent = larger(largest_of_warp(most) >> 24, 26u);  // as float32 has it; 2^-k / 16 stays normal
    const float factor = as_float((275 - exponent) << 23);
    uint32_t n[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) n[i] = as_bits(multiply_add(x[i], factor, kMantissaOffset)) + kToBytes;
    const uint32_t low = permute_bytes(n[0], n[1], 0x5140), high = permute_bytes(n[2], n[3], 0x5140);
    const uint32_t words[kDigits] = {permute_bytes(low, high, 0x5410), permute_bytes(low, high, 0x7632),
                                     permute_bytes(permute_bytes(n[0], n[1], 0x0062), permute_bytes(n[2], n[3], 0x0062), 0x5410)};
#pragma unroll
    for (int i = 0; i < kDigits; ++i) store_shared(digits_to + 128 * i, words[i] ^ 0x80808080u);
    return exponent == 255 ? as_float(0x7fc00000u) : as_float((exponent - 25) << 23);
  }

  // 16 (code - 8) of the codes in the upper halves of bytes.
  static __device__ __forceinline__ uint32_t bytes_of(uint32_t word) { return and_xor<0xf0f0f0f0u>(word, 0x80808080u); }

  __device__ __forceinline__ void multiply_numbers(uint32_t stage, float factor, float (&sums)[2 * kTiles]) const {
    static_assert(kTiles == 2 && kGroups == 1);
    const uint4 first = load_shared<uint4>(digits_at), second = load_shared<uint4>(digits_at + 16);
    const uint32_t x[8] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
    constexpr uint32_t kSixteens = 0x10101010u, sixteens[4] = {kSixteens, kSixteens, kSixteens, kSixteens};
    int32_t products[2][4] = {}, all[4] = {};
#pragma unroll
    for (int c = 0; c < 4; ++c) products[0][c] = all[c] = static_cast<int32_t>(kInMantissa);
#pragma unroll
    for (int block = 0; block < 2; ++block) {
      const uint32_t at = stage + codes_at + 512 * block;
      const uint4 one = load_shared<uint4>(at), two = load_shared<uint4>(at + kCodeBytes);
      const uint32_t codes[2][4] = {{one.x, one.y, one.z, one.w}, {two.x, two.y, two.z, two.w}};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = x[4 * block + i], b0 = permute_bytes(word, 0, even), b1 = permute_bytes(word, 0, odd);
        const uint32_t a[4] = {bytes_of(codes[0][i] << 4), bytes_of(codes[1][i] << 4), bytes_of(codes[0][i]), bytes_of(codes[1][i])};
        mma(products[i % 2], a, b0, b1);
        if constexpr (kZeros) mma(all, sixteens, b0, b1);
      }
    }
    // Scales of each tile, then zero points of each.
    RawPair raw[kPairs];
    Pair pairs[kPairs];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) raw[i] = load_pair(stage + pairs_at + i * kPairsStride, p.weight.scale_dtype);
    to_floats(raw, p.weight.scale_dtype, pairs);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const float scales[2] = {pairs[i].low * factor, pairs[i].high * factor};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float product = as_float(static_cast<uint32_t>(products[0][2 * i + h] + products[1][2 * i + h])) - kMantissaOffset;
        if constexpr (kZeros) {
          const Pair& zeros = pairs[kTiles + i];
          product += (8.0f - (h ? zeros.high : zeros.low)) * (as_float(static_cast<uint32_t>(all[h])) - kMantissaOffset);
        }
        sums[2 * i + h] += scales[h] * product;
      }
    }
  }

  // Digits of four codes of each of two words: of those below 8, or of the others; of those above zeros.
  static __device__ __forceinline__ void look_up(uint32_t low, uint32_t high, uint32_t one, uint32_t two, uint32_t (&a)[4]) {
    a[0] = permute_bytes_or_signs(low, high, one), a[1] = permute_bytes_or_signs(low, high, two);
    a[2] = permute_bytes_or_signs(low, high, upper_half(one)), a[3] = permute_bytes_or_signs(low, high, upper_half(two));
  }

  __device__ __forceinline__ void multiply_entries(uint32_t stage, float factor, float (&sums)[2 * kTiles]) const {
    constexpr int kBlocks = 2 / kGroups;  // of 64 columns, of a group
    constexpr uint32_t kMiddle = 0xc0c0c0c0u, middles[4] = {kMiddle, kMiddle, kMiddle, kMiddle};  // -64
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      uint32_t b[4 * kBlocks][2];
      int32_t begin[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) begin[c] = static_cast<int32_t>(kInMantissa);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        const uint4 words = load_shared<uint4>(digits_at + 16 * (kBlocks * group + block));
        const uint32_t x[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t(&own)[2] = b[4 * block + i];
          own[0] = permute_bytes(x[i], 0, even), own[1] = permute_bytes(x[i], 0, odd);
          mma(begin, middles, own[0], own[1]);
        }
      }
      RawPair raw[kTiles];
      Pair pairs[kTiles];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) raw[i] = load_pair(stage + pairs_at + (group * kTiles + i) * kPairsStride, p.weight.scale_dtype);
      to_floats(raw, p.weight.scale_dtype, pairs);
#pragma unroll
      for (int tile = 0; tile < kTiles; tile += 2) {
        int32_t upper[4], lower[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) upper[c] = begin[c], lower[c] = static_cast<int32_t>(kInMantissa);
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          const uint32_t at = stage + codes_at + tile * kCodeBytes + 512 * (kBlocks * group + block);
          const uint4 one = load_shared<uint4>(at), two = load_shared<uint4>(at + kCodeBytes);
          const uint32_t codes[2][4] = {{one.x, one.y, one.z, one.w}, {two.x, two.y, two.z, two.w}};
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t(&own)[2] = b[4 * block + i], lower_half[2] = {codes[0][i], codes[1][i]};
            const uint32_t upper_half[2] = {lower_half[0] ^ 0x88888888u, lower_half[1] ^ 0x88888888u};
            uint32_t a[4];
            look_up(table[0][0], table[0][1], lower_half[0], lower_half[1], a);
            mma(upper, a, own[0], own[1]);
            look_up(table[0][2], table[0][3], upper_half[0], upper_half[1], a);
            mma(upper, a, own[0], own[1]);
            look_up(table[1][0], table[1][1], lower_half[0], lower_half[1], a);
            mma(lower, a, own[0], own[1]);
            look_up(table[1][2], table[1][3], upper_half[0], upper_half[1], a);
            mma(lower, a, own[0], own[1]);
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float high = as_float(static_cast<uint32_t>(upper[2 * i + h])) - kMantissaOffset;
            const float low = as_float(static_cast<uint32_t>(lower[2 * i + h])) - kMantissaOffset;
            sums[2 * (tile + i) + h] += (h ? pairs[tile + i].high : pairs[tile + i].low) * factor * (128.0f * high + low);
          }
      }
    }
  }

  // All steps of the warp.
  template <class T>
  __device__ __forceinline__ void run(float (&sums)[2 * kTiles]) {
    constexpr uint32_t bytes = Block::kStageBytes;
    const uint32_t warps = blockDim.x / 32, first = next;
    uint32_t copied = first;
    let_next_kernel_start();
    uint32_t at = ring;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i, at += bytes)
      if (next < steps) copy_weights(at);
    if constexpr (kTable) make_table();
    wait_for_previous_kernel();
    at = ring;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i, at += bytes, copied += warps) {
      if (copied < steps) copy_x(at, copied);
      cp_async_commit();
    }
    uint32_t refilled = at;
    at = ring;
#pragma unroll 1
    for (uint32_t step = first; step < steps; step += warps, copied += warps) {
      cp_async_wait<kStages - 2>();
      sync_warp();  // the stage is there for all lanes, and all have read the one that is refilled, and the digits
      const float factor = to_digits<T>(at);
      if (copied < steps) copy_weights(refilled), copy_x(refilled, copied);
      cp_async_commit();
      sync_warp();
      if constexpr (kTable)
        multiply_entries(at, factor * unit, sums);
      else
        multiply_numbers(at, factor, sums);
      refilled = at;
      at = at + bytes == digits ? ring : at + bytes;
    }
  }
};

template <class T, class Block>
__global__ void __launch_bounds__(32 * kMostDigitWarps, 1) linear_digits_kernel(const LinearParams p) {
  constexpr int kTwos = Block::kTiles / 2;
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  float4* const partial = reinterpret_cast<float4*>(shared_memory());  // [warps][two tiles][32]
  const uint32_t rings = shared_address(partial + 32 * kTwos * warps);
  float sums[2 * Block::kTiles] = {};
  DigitsWarp<Block> mine(p, kept(rings + warp * (Block::kStages * Block::kStageBytes + kDigitBytes)));
  mine.template run<T>(sums);
#pragma unroll
  for (int i = 0; i < kTwos; ++i)
    partial[(warp * kTwos + i) * 32 + lane] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
  sync_block();
  // A thread for each row.
  for (uint32_t i = threadIdx.x; i < Block::kRows; i += blockDim.x) {
    const uint32_t tile = i / kTileRows, row = i % kTileRows;
    const int64_t n = static_cast<int64_t>(blockIdx.x) * Block::kRows + i;
    const float* const own = reinterpret_cast<const float*>(partial + tile / 2 * 32 + row % 8 * 4) + 2 * (tile % 2) + row / 8;
    float digits[kDigits] = {};
    for (uint32_t w = 0; w < warps; ++w)
#pragma unroll
      for (int d = 0; d < kDigits; ++d) digits[d] += own[(w * kTwos * 32 + d) * 4];
    if (n >= p.weight.out_features) return;
    float sum = digits[0] + 256.0f * digits[1] + 65536.0f * digits[2];
    if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
    store(static_cast<uint16_t*>(p.y) + n, from_float(T{}, sum));
  }
}

// ---- launcher

template <class T, class Block>
const char* launch_digits_block(const LinearParams& p, cudaStream_t stream) {
  const int64_t steps = divided(p.weight.in_features, kStepColumns), blocks = divided(p.weight.out_features, Block::kRows);
  // Some 12 warps for each multiprocessor, and up to 8 steps a warp. Measured on an H200 (integers): for 4096 x 14336 4 warps of 8 steps take 8.7 us,
  // 8 of 4 steps 10.7; for 14336 x 4096 16 warps 8.9, 8 warps 11.6; for 8192 x 28672 4, 8 and 16 warps 33.5, 32.1 and 38.9.
  int64_t warps = 4;
  while (warps < kMostDigitWarps && blocks * warps < int64_t{12} * multiprocessors()) warps *= 2;
  if (warps < 8 && steps > 8 * warps) warps = 8;
  while (warps > 1 && warps * Block::kWarpBytes > most_shared_bytes()) warps /= 2;
  const size_t shared_bytes = evenly(warps * Block::kWarpBytes, blocks);
  return launch_early(linear_digits_kernel<T, Block>, static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), shared_bytes, stream, p);
}

template <class Block>
const char* launch_digits_of(const LinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_digits_block<BFloat16, Block>(p, stream) : launch_digits_block<Float16, Block>(p, stream);
}

inline const char* launch_digits(const LinearParams& p, cudaStream_t stream) {
  return p.weight.zeros ? launch_digits_of<DigitsBlock<false, 2, 1, true>>(p, stream) : launch_digits_of<DigitsBlock<false, 2, 1, false>>(p, stream);
}

// With a codebook. Four tiles share what x takes, where there are enough of them for all multiprocessors.
template <int kGroups>
const char* launch_digits_groups(const LinearParams& p, cudaStream_t stream) {
  const bool many = divided(p.weight.out_features, 4 * kTileRows) >= multiprocessors();
  return many ? launch_digits_of<DigitsBlock<true, 4, kGroups, false>>(p, stream) : launch_digits_of<DigitsBlock<true, 2, kGroups, false>>(p, stream);
}
inline const char* launch_digits_of_table(const LinearParams& p, cudaStream_t stream) {
  return flush_mask(p.weight, kStepUnits) == kStepUnits - 1 ? launch_digits_groups<1>(p, stream) : launch_digits_groups<2>(p, stream);
}

}  // namespace
}  // namespace hfq
