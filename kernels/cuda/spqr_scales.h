// Bilevel scales: from codes and lines of a group to a scale and a zero point of each row.
#pragma once

#include "fragments.h"
#include "spqr.h"

namespace hfq {
namespace {

// 4 bits of a word at bit 4 i, i < 4: with the exponent of 2^(23 - 4i) the mantissa counts in ones there.
template <int i>
__device__ __forceinline__ float narrow_code(uint32_t word) {
  constexpr uint32_t kExponent = (127u + 23 - 4 * i) << 23;
  return as_float(and_or<0xfu << (4 * i)>(word, kExponent)) - static_cast<float>(1 << (23 - 4 * i));
}

// Byte i of a word.
template <int i>
__device__ __forceinline__ float wide_code(uint32_t word) {
  return as_float(permute_bytes(word, 0x4b000000u, 0x7540u | i)) - 8388608.0f;
}

// Of rows g and g + 8: scale, and what a zero point lacks to the middle of the codes.
template <int kBits>
__device__ __forceinline__ float4 decode(const float (&c)[4], const float (&lines)[4]) {
  const float middle = static_cast<float>(1 << (kBits - 1)) - lines[3];
  return make_float4(multiply_add(c[0], lines[0], lines[1]), multiply_add(-c[1], lines[2], middle), multiply_add(c[2], lines[0], lines[1]),
                     multiply_add(-c[3], lines[2], middle));
}

// The same for kCount groups, one after the other in shared memory: their codes, of the lane's two rows, and their lines.
template <int kBits, int kCount>
__device__ __forceinline__ void decode_groups(const SpqrWeight& w, uint32_t codes_at, uint32_t lines_at, float4 (&numbers)[kCount]) {
  float lines[kCount][4], codes[kCount][4];
  if (w.stat_dtype == kFloat32) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint4 v = load_shared<uint4>(lines_at + 16 * i);
      lines[i][0] = as_float(v.x), lines[i][1] = as_float(v.y), lines[i][2] = as_float(v.z), lines[i][3] = as_float(v.w);
    }
  } else {
    uint32_t raw[2 * kCount];
    if constexpr (kCount == 2) {
      const uint4 v = load_shared<uint4>(lines_at);
      raw[0] = v.x, raw[1] = v.y, raw[2] = v.z, raw[3] = v.w;
    } else {
      const uint2 v = load_shared<uint2>(lines_at);
      raw[0] = v.x, raw[1] = v.y;
    }
    if (w.stat_dtype == kBFloat16) {
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) lines[i / 4][i % 4] = as_float(i % 2 ? raw[i / 2] & 0xffff0000u : raw[i / 2] << 16);
    } else {
#pragma unroll
      for (int i = 0; i < 4 * kCount; ++i) lines[i / 4][i % 4] = to_float(Float16{}, static_cast<uint16_t>(raw[i / 2] >> (16 * (i % 2))));
    }
  }
  if (w.wide_codes) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t v = load_shared<uint32_t>(codes_at + 32 * i);
      codes[i][0] = wide_code<0>(v), codes[i][1] = wide_code<1>(v), codes[i][2] = wide_code<2>(v), codes[i][3] = wide_code<3>(v);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t v = load_shared<uint16_t>(codes_at + 16 * i);
      codes[i][0] = narrow_code<0>(v), codes[i][1] = narrow_code<1>(v), codes[i][2] = narrow_code<2>(v), codes[i][3] = narrow_code<3>(v);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) numbers[i] = decode<kBits>(codes[i], lines[i]);
}

}  // namespace
}  // namespace hfq
