// Bilevel scales: codes and lines on their way to shared memory, and from those of a group to a scale and a zero point of each row.
#pragma once

#include "fragments.h"
#include "spqr_parts.h"

namespace hfq {
namespace {

// What a lane copies of the statistics of kTiles tiles, for kParts parts of columns next to each other, to [tiles][codes of scales [parts, 8, 2 | 4],
// lines [parts, 4]]: lanes below 16 have 16 bytes of codes, lanes 16 .. 16 + kParts - 1 the lines of a group.
template <uint32_t kParts, int kTiles>
struct StatCopies {
  const uint8_t* from[kTiles];  // of group 0
  uint32_t group_stride, part;  // bytes from one group to the next, and twice the part whose group it is
  uint32_t bytes;               // 16, 8, or 0 if the lane copies none
  uint32_t to;                  // from the beginning of the first tile's statistics

  // `tile_of(i)`: tile i of the weight's.
  template <class TileOf>
  __device__ __forceinline__ StatCopies(const SpqrWeight& w, uint32_t lane, const TileOf& tile_of) {
    const uint32_t codes = group_code_bytes(w), lines = line_bytes(w);
    const bool of_lines = lane >= 16;
    const uint32_t piece = lane % 2, own = of_lines ? lane - 16 : lane / 2;
    part = kept(2 * own);
    bytes = kept(own >= kParts ? 0 : of_lines ? lines : piece == 0 || w.wide_codes ? 16 : 0);
    group_stride = kept(of_lines ? lines : codes);
    to = of_lines ? kParts * codes + own * lines : own * codes + 16 * piece;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const int64_t tile = tile_of(i);
      const uint32_t row = static_cast<uint32_t>(tile * kTileRows);
      const uint32_t same_lines = w.rows_per_stat < w.out_features ? row / static_cast<uint32_t>(w.rows_per_stat) : 0;
      const uint8_t* first_line = static_cast<const uint8_t*>(w.stats) + same_lines * w.groups * lines;
      const uint8_t* first_codes = w.stat_codes + tile * w.stat_groups * codes + 16 * piece;
      from[i] = kept(of_lines ? first_line : first_codes);
    }
  }

  // Those of the parts from `first_part` on; of parts behind K the last group's. `stage`: `to` in shared memory; `tile_stride`: bytes of a tile.
  __device__ __forceinline__ void copy(uint32_t stage, uint32_t first_part, uint32_t group_magic, uint32_t last_group, uint32_t tile_stride) const {
    uint32_t group = multiply_high(2 * first_part + part, group_magic);
    group = group < last_group ? group : last_group;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint8_t* of_group = from[i] + group * group_stride;  // below 2^20
      if (bytes == 16) cp_async(stage + i * tile_stride, of_group);
      if (bytes == 8) cp_async<8>(stage + i * tile_stride, of_group);
    }
  }
};

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
