// How a token is rounded to int8 or E4M3: hfq/core/activations.py to the bit. Divisions and products are rounded once, as PyTorch does it;
// largest magnitudes are compared as the integers of their bits, where NaN is above infinity and thus stays.
#pragma once

#include <type_traits>

#include "e4m3.h"
#include "pieces.h"
#include "w8a8.h"

namespace hfq {

// What an 8-bit code is: of tokens, and of the weights that they meet.
struct Int8 {
  using Sum = int32_t;                    // of products of codes
  static constexpr float kMost = 127.0f;  // the largest code
  static constexpr CodeType kType = kInt8Codes;
};
struct E4M3 {
  using Sum = float;
  static constexpr float kMost = 448.0f;
  static constexpr CodeType kType = kE4M3Codes;
};

// ---- the largest magnitude ----

__device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Of 16 bytes, as bits.
template <class T>
__device__ __forceinline__ uint32_t largest(T, const uint4& v) {
  float f[kPerLoad<T>];
  to_floats(T{}, v, f);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kPerLoad<T>; ++i) bits = larger(bits, as_bits(f[i]) & 0x7fffffffu);
  return bits;
}

// ---- codes ----

struct Rounding {
  float scale, inverse;
};

// `bits`: of the token's largest magnitude.
template <class Code>
__device__ __forceinline__ Rounding rounding_of(uint32_t bits, const float* input_scale) {
  constexpr float kMost = Code::kMost;
  constexpr float kLeast = 1e-35f;   // below, the reciprocal would overflow: counts as zero
  constexpr uint32_t kInfinity = 0x7f800000u, kNaN = 0x7fc00000u;
  Rounding r = {0.0f, 0.0f};
  if (input_scale) {
    const float scale = load(input_scale);
    const bool usable = scale > kLeast && as_bits(scale) < kInfinity;
    r.scale = usable ? scale : as_float(kNaN);
    if (usable) r.inverse = divide(1.0f, scale);
  } else if (as_float(bits) > kLeast) {
    r.scale = divide(as_float(bits), kMost);
    r.inverse = divide(kMost, as_float(bits));
  }
  if (bits >= kInfinity) r.scale = as_float(kNaN);
  return r;
}

// The lowest bytes of four words, the first in the lowest byte.
__device__ __forceinline__ uint32_t lowest_bytes(const uint32_t (&words)[4]) {
  return permute_bytes(permute_bytes(words[0], words[1], 0x40), permute_bytes(words[2], words[3], 0x40), 0x5410);
}

// Four codes, the first in the lowest byte.
__device__ __forceinline__ uint32_t four_codes(Int8, const float* f, float inverse) {
  uint32_t codes[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int32_t steps = to_int(multiply(f[i], inverse));
    codes[i] = static_cast<uint32_t>(steps < -127 ? -127 : steps > 127 ? 127 : steps);
  }
  return lowest_bytes(codes);
}
__device__ __forceinline__ uint32_t four_codes(E4M3, const float* f, float inverse) {
  uint32_t magnitudes[4], bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float steps = multiply(f[i], inverse), number = steps == steps ? steps : 0.0f;
    magnitudes[i] = e4m3_magnitude(number);
    bits[i] = as_bits(number);
  }
  const uint32_t highest = permute_bytes(permute_bytes(bits[0], bits[1], 0x73), permute_bytes(bits[2], bits[3], 0x73), 0x5410);
  return and_or<0x80808080u>(highest, lowest_bytes(magnitudes));
}

// The codes of 16 bytes: a word or two.
template <class Code, class T>
__device__ __forceinline__ uint2 codes_of(Code, T, const uint4& v, float inverse) {
  float f[8];
  to_floats(T{}, v, f);
  return {four_codes(Code{}, f, inverse), four_codes(Code{}, f + 4, inverse)};
}
template <class Code>
__device__ __forceinline__ uint32_t codes_of(Code, Float32, const uint4& v, float inverse) {
  float f[4];
  to_floats(Float32{}, v, f);
  return four_codes(Code{}, f, inverse);
}

// ---- results ----

__device__ __forceinline__ void store_float(void* numbers, int64_t at, DType dtype, float f) {
  if (dtype == kFloat32)
    store(static_cast<float*>(numbers) + at, f);
  else
    store(static_cast<uint16_t*>(numbers) + at, dtype == kFloat16 ? from_float(Float16{}, f) : from_float(BFloat16{}, f));
}

// The sum of a row as an output; each step is rounded, as in hfq/kernels/int8.py and fp8.py.
__device__ __forceinline__ float scaled_sum(float sum, float token_scale, float scale) { return multiply(sum, multiply(token_scale, scale)); }
__device__ __forceinline__ float scaled_sum(int32_t sum, float token_scale, float scale) { return scaled_sum(from_int(sum), token_scale, scale); }

}  // namespace hfq
