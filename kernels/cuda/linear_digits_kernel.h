// One token times 4-bit codes, in integers: cuda_linear for groups of a multiple of 128 columns, or one for each row.
//
// 4-bit codes become bytes in 3 instructions for 8 of them, and 16-bit floats in 15 (fragments.h), and it is those that one token waits for: a chain
// of kernels that only reads takes 7.3 us for 4096 x 14336 on an H200, linear_kernel.h 11.6. So activations become integers, too: digits.h. Sums of
// 128 products of a code and a digit are below 2^22 and exact. They begin with the bits of the float 2^23 + 2^22, in whose mantissa they count, so
// they are floats when they end. Scales times 2^-k multiply them.
//
// Layout "fragments" has rows g and g + 8 in neighbouring bytes: a byte of a word has columns 0 and 2 of four of row g, the next one those of row
// g + 8, then columns 1 and 3 of both. So the A operand has one tile in place of rows g, another one in place of rows g + 8, and the B operand
// activations at every second k, zeros between: column 2 d + h has digit d, for rows g (h = 0) or g + 8 (h = 1).
//
// Counted with beginnings and ends, 1 KB of codes takes 130 instructions (linear_kernel.h: 194), of which fewer take two clocks. A NaN or an
// infinity gives NaN in all outputs.
#pragma once

#include "digits.h"

namespace hfq {
namespace {

constexpr int kDigitStages = 4, kMostDigitWarps = 16;
constexpr int kDigitTiles = 2;

template <bool kZeros>
struct DigitsWarp {
  static constexpr int kCodeBytes = 1024, kXBytes = 2 * kStepColumns, kXAt = kDigitTiles * kCodeBytes, kPairsAt = kXAt + kXBytes;  // of a stage
  static constexpr int kPairs = kDigitTiles * (kZeros ? 2 : 1);

  const LinearParams& p;
  int lane;
  uint32_t steps, blocks;  // of the columns; stored ones
  // What the lane copies next: codes of each tile; activations. A pair of group 0.
  const uint8_t *codes_from[kDigitTiles], *x_from, *pairs_from;
  uint32_t next, columns;             // the step of these; columns from the lane's piece of x to the end of it, of step 0
  uint32_t pair, group_bytes;         // of one pair; from one group's pairs to the next
  // Where these go, from the beginning of a stage, and what the lane reads.
  uint32_t codes_at, pairs_to, pairs_at, x_at;
  uint32_t ring, digits;              // of the warp: stages; digits of a step
  uint32_t digits_to, digits_at;
  uint32_t even, odd;                 // selectors: columns 0 and 1 of a digit's four, columns 2 and 3, and zeros

  __device__ __forceinline__ DigitsWarp(const LinearParams& params, uint32_t memory)
      : p(params), lane(threadIdx.x % 32), next(threadIdx.x / 32), ring(memory), digits(kept(memory + kDigitStages * params.stage_bytes)) {
    const Weight& w = p.weight;
    const uint32_t in_features = static_cast<uint32_t>(w.in_features), tiles = static_cast<uint32_t>((w.out_features + kTileRows - 1) / kTileRows);
    steps = (in_features + kStepColumns - 1) / kStepColumns, blocks = (in_features + 63) / 64;
    // An odd number of tiles: the last one is computed twice and stored once.
    const uint32_t first = kDigitTiles * blockIdx.x;
    const auto of_weight = [&](uint32_t i) { return static_cast<uint64_t>(first + i < tiles ? first + i : tiles - 1); };
    codes_at = kept(16u * lane);
#pragma unroll
    for (int i = 0; i < kDigitTiles; ++i) codes_from[i] = w.qweight + of_weight(i) * blocks * 512 + next * kCodeBytes + codes_at;
    x_from = static_cast<const uint8_t*>(p.x) + next * kXBytes + codes_at;
    columns = in_features > 8u * lane ? in_features - 8 * lane : 0;
    pair = pair_bytes(w.scale_dtype), group_bytes = 8 * pair;
    const void* of_lane = kZeros && lane >= 8 * kDigitTiles ? w.zeros : w.scales;
    pairs_from = static_cast<const uint8_t*>(of_lane) + (of_weight(lane / 8 % kDigitTiles) * w.groups * 8 + lane % 8) * pair;
    pairs_to = kept(kPairsAt + lane * pair), pairs_at = kept(kPairsAt + lane / 4 * pair), x_at = kept(kXAt + 8u * lane);
    digits_to = kept(digits + place_of_digits(lane));
    digits_at = kept(digits + place_of_own_digit(lane));
    const bool lower = lane / 4 % 2;  // rows g + 8
    even = kept(lower ? 0x1404u : 0x4140u), odd = kept(lower ? 0x3424u : 0x4342u);
  }

  // ---- from global memory to a stage: the next step

  // Codes, scales and zero points. Codes of columns behind K stay what they are: they meet zeros.
  __device__ __forceinline__ void copy_weights(uint32_t stage) {
    const bool whole = 2 * next + 1 < blocks;
#pragma unroll
    for (int i = 0; i < kDigitTiles; ++i) {
      const uint32_t to = stage + codes_at + i * kCodeBytes;
      cp_async(to, codes_from[i]);
      if (whole) cp_async(to + 512, codes_from[i] + 512);
      codes_from[i] += blockDim.x * (kCodeBytes / 32);
    }
    if (lane < 8 * kPairs) {
      const uint8_t* const from = pairs_from + static_cast<uint64_t>(multiply_high(2 * kStepUnits * next, p.group_magic)) * group_bytes;
      copy_pair(stage + pairs_to, from, p.weight.scale_dtype);
    }
    next += blockDim.x / 32;
  }

  // x of a step, zeros behind K.
  __device__ __forceinline__ void copy_x(uint32_t stage, uint32_t step) {
    if (lane < kXBytes / 16) cp_async_or_zero(stage + kXAt + codes_at, x_from, step * kStepColumns < columns);
    x_from += blockDim.x * (kXBytes / 32);
  }

  // ---- from a stage to sums

  // 16 (code - 8) of the codes in the upper halves of bytes.
  static __device__ __forceinline__ uint32_t bytes_of(uint32_t word) { return and_xor<0xf0f0f0f0u>(word, 0x80808080u); }

  __device__ __forceinline__ void multiply(uint32_t stage, float factor, float (&sums)[4]) const {
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
    for (int i = 0; i < kPairs; ++i) raw[i] = load_pair(stage + pairs_at + i * group_bytes, p.weight.scale_dtype);
    to_floats(raw, p.weight.scale_dtype, pairs);
#pragma unroll
    for (int i = 0; i < kDigitTiles; ++i) {
      const float scales[2] = {pairs[i].low * factor, pairs[i].high * factor};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float product = as_float(static_cast<uint32_t>(products[0][2 * i + h] + products[1][2 * i + h])) - kMantissaOffset;
        if constexpr (kZeros) {
          const Pair& zeros = pairs[kDigitTiles + i];
          product += (8.0f - (h ? zeros.high : zeros.low)) * (as_float(static_cast<uint32_t>(all[h])) - kMantissaOffset);
        }
        sums[2 * i + h] += scales[h] * product;
      }
    }
  }

  // All steps of the warp.
  template <class T>
  __device__ __forceinline__ void run(float (&sums)[4]) {
    const uint32_t bytes = kept(p.stage_bytes), warps = blockDim.x / 32, first = next;
    uint32_t copied = first;
    let_next_kernel_start();
    uint32_t at = ring;
#pragma unroll
    for (int i = 0; i < kDigitStages - 1; ++i, at += bytes)
      if (next < steps) copy_weights(at);
    wait_for_previous_kernel();
    at = ring;
#pragma unroll
    for (int i = 0; i < kDigitStages - 1; ++i, at += bytes, copied += warps) {
      if (copied < steps) copy_x(at, copied);
      cp_async_commit();
    }
    uint32_t refilled = at;
    at = ring;
#pragma unroll 1
    for (uint32_t step = first; step < steps; step += warps, copied += warps) {
      cp_async_wait<kDigitStages - 2>();
      sync_warp();  // the stage is there for all lanes, and all have read the one that is refilled, and the digits
      const float factor = to_digits<T>(at + x_at, digits_to);
      if (copied < steps) copy_weights(refilled), copy_x(refilled, copied);
      cp_async_commit();
      sync_warp();
      multiply(at, factor, sums);
      refilled = at;
      at = at + bytes == digits ? ring : at + bytes;
    }
  }
};

template <class T, bool kZeros>
__global__ void __launch_bounds__(32 * kMostDigitWarps, 1) linear_digits_kernel(const LinearParams p) {
  const uint32_t warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  float4* const partial = reinterpret_cast<float4*>(shared_memory());  // [warps][32]
  const uint32_t rings = shared_address(partial + 32 * warps);
  float sums[4] = {};
  DigitsWarp<kZeros> mine(p, kept(rings + warp * (kDigitStages * p.stage_bytes + kDigitBytes)));
  mine.template run<T>(sums);
  partial[threadIdx.x] = make_float4(sums[0], sums[1], sums[2], sums[3]);
  sync_block();
  if (warp > 0) return;
  // A lane for each row.
  const uint32_t tile = lane / kTileRows, row = lane % kTileRows;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * (kDigitTiles * kTileRows) + lane;
  const float* const own = reinterpret_cast<const float*>(partial + row % 8 * 4) + 2 * tile + row / 8;
  float digits[kDigits] = {};
  for (uint32_t w = 0; w < warps; ++w)
#pragma unroll
    for (int i = 0; i < kDigits; ++i) digits[i] += own[(w * 32 + i) * 4];
  if (n >= p.weight.out_features) return;
  float sum = digits[0] + 256.0f * digits[1] + 65536.0f * digits[2];
  if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
  store(static_cast<uint16_t*>(p.y) + n, from_float(T{}, sum));
}

// ---- launcher

template <class T, bool kZeros>
const char* launch_digits_of(const LinearParams& params, cudaStream_t stream) {
  using Warp = DigitsWarp<kZeros>;
  LinearParams p = params;
  p.stage_bytes = Warp::kPairsAt + Warp::kPairs * 8 * pair_bytes(p.weight.scale_dtype);
  const int64_t steps = divided(p.weight.in_features, kStepColumns), blocks = divided(p.weight.out_features, kDigitTiles * kTileRows);
  const auto shared = [&](int64_t warps) { return static_cast<size_t>(warps) * (32 * sizeof(float4) + kDigitStages * p.stage_bytes + kDigitBytes); };
  // Some 12 warps for each multiprocessor, and up to 8 steps a warp. Measured on an H200: for 4096 x 14336 4 warps of 8 steps take 8.7 us, 8 of 4
  // steps 10.7; for 14336 x 4096 16 warps 8.9, 8 warps 11.6; for 8192 x 28672 4, 8 and 16 warps 33.5, 32.1 and 38.9.
  int64_t warps = 4;
  while (warps < kMostDigitWarps && blocks * warps < int64_t{12} * multiprocessors()) warps *= 2;
  if (warps < 8 && steps > 8 * warps) warps = 8;
  while (warps > 1 && shared(warps) > most_shared_bytes()) warps /= 2;
  const auto kernel = linear_digits_kernel<T, kZeros>;
  return launch_early(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(32 * warps), evenly(shared(warps), blocks), stream, p);
}

inline const char* launch_digits(const LinearParams& p, cudaStream_t stream) {
  if (p.x_dtype == kBFloat16) return p.weight.zeros ? launch_digits_of<BFloat16, true>(p, stream) : launch_digits_of<BFloat16, false>(p, stream);
  return p.weight.zeros ? launch_digits_of<Float16, true>(p, stream) : launch_digits_of<Float16, false>(p, stream);
}

}  // namespace
}  // namespace hfq
