// E4M3 in kernels: 8-bit floats (hfq/core/float8.py), their rounding, and what matrix instructions take in place of them.
//
// Products are those of float16, which holds every E4M3. mma.sync has an instruction for E4M3, but only Ada and consumer Blackwell do:
// for sm_90 and sm_100 ptxas makes of it the conversions and float16 instructions that stand here. Where it exists it keeps 13 bits of
// the sums' mantissas (SageAttention2, arXiv:2411.10958); float16's instruction keeps float32's.
#pragma once

#include "target.h"

namespace hfq {

// ---- rounding

// A float that is no NaN as E4M3 without its sign, in the lowest byte: to nearest, ties to even, 448 for what is larger. In float32's own
// rounding, 9 instructions with the product before it: cheap enough that GPUs with an instruction for it need no code of their own.
__device__ __forceinline__ uint32_t e4m3_magnitude(float f) {
  constexpr float kMost = 448.0f, kLeastNormal = 1.0f / 64;
  constexpr uint32_t kExponent = 0x7f800000u;
  const float magnitude = smaller(as_float(as_bits(f) & 0x7fffffffu), kMost);
  // Steps of E4M3 are an eighth of this power of two. In a sum with 2^20 times as much they are the last place of float32.
  const float power = larger(as_float(as_bits(magnitude) & kExponent), kLeastNormal);
  const uint32_t steps = as_bits(multiply_add(power, 1048576.0f, magnitude));
  // Eight codes for each power of two below.
  return steps + (as_bits(power) >> 20) - (121u << 3);
}

// ---- as 16-bit floats

// The codes in the upper bytes of the halves, which no NaN is among, by moving bits: sign, exponent and mantissa in the places of a wider format
// are the value over a power of two, since its exponents are counted from 15 or 127 instead of 7; so are subnormals. Both formats hold every
// E4M3, and the multiplication is exact.
constexpr uint32_t kSigns = 0x80008000u, kNothing = 0x80008000u;  // -0 leaves signs of zeros
__device__ __forceinline__ uint32_t e4m3_numbers(Float16, uint32_t codes) {
  return fma2(Float16{}, and_or<kSigns>(codes, codes >> 1 & 0x3f803f80u), 0x5c005c00u, kNothing);  // 2^8
}
__device__ __forceinline__ uint32_t e4m3_numbers(BFloat16, uint32_t codes) {
  return fma2(BFloat16{}, and_or<kSigns>(codes, codes >> 4 & 0x07f007f0u), 0x7b807b80u, kNothing);  // 2^120
}

// Four codes as float16s: 0 and 2 share a register, and 1 and 3.
__device__ __forceinline__ uint2 halves_by_shifts(uint32_t codes) {
  return {e4m3_numbers(Float16{}, codes << 8), e4m3_numbers(Float16{}, codes)};
}

// Four codes as float16s. Which of them share a register depends on the GPU only: the same ones of weights and tokens.
__device__ __forceinline__ uint2 halves(uint32_t codes) {
  return converts_e4m3() ? halves_of_e4m3(codes) : halves_by_shifts(codes);
}

}  // namespace hfq
