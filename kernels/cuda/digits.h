// Activations of one token as integers, for matrix instructions that take bytes. Of 128 columns
//
//   x = 2^-k (d0 + 2^8 d1 + 2^16 d2), d0 and d1 in -128 .. 127, d2 in -64 .. 64, k such that the largest |x| 2^k is at least 2^21, less than 2^22
//
// which rounds each x to a multiple of 2^-21 of the largest one or finer: 16-bit floats of a thousandth of it are exact. (An activation 30 000 times
// the others of its columns whose weights happen to be zero leaves an error of 0.3 % of an output's spread, the rounding of bfloat16.)
//
// A matrix instruction takes 8 tokens; one token has the room to be there in digits.
#pragma once

#include "linear_step.h"
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kDigits = 3;
constexpr uint32_t kDigitBytes = kDigits * kStepColumns;  // of a step of x

// The bits of 2^23 + 2^22, and what makes an integer of those of 2^23 + 2^22 + n: bytes d + 128.
constexpr uint32_t kInMantissa = 0x4b400000, kToBytes = 0x00808080u - kInMantissa;
constexpr float kMantissaOffset = 12582912.0f;

// Digits of a step are [digit][t][unit][half of 8 columns] words of four columns. Where the first digit of the lane's four columns goes.
__device__ __forceinline__ uint32_t place_of_digits(int lane) { return 32 * (lane % 8 / 2) + 8 * (lane / 8) + 4 * (lane % 2); }
// Of the digit that the lane multiplies with, of all columns. Lanes for which there is none take the last one's, and nobody reads their sums.
__device__ __forceinline__ uint32_t place_of_own_digit(int lane) { return 128 * (lane / 8 < kDigits ? lane / 8 : kDigits - 1) + 32 * (lane % 4); }

// The lane's four columns, at `x_at` of shared memory, to `to` and behind; by the whole warp. Returns 2^-k / 16, NaN if an activation is not finite.
template <class T>
__device__ __forceinline__ float to_digits(uint32_t x_at, uint32_t to) {
  const uint2 both = load_shared<uint2>(x_at);
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
  for (int i = 0; i < kDigits; ++i) store_shared(to + 128 * i, words[i] ^ 0x80808080u);
  return exponent == 255 ? as_float(0x7fc00000u) : as_float((exponent - 25) << 23);
}

}  // namespace
}  // namespace hfq
