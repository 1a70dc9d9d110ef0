// What Intel's manual says that the instructions of AMX and AVX512-BF16 do which kernels use, for processors without them. Included in front of
// isa_avx512_amx.cpp (g++ -include), in whose text the names stand for these functions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated_amx {

struct Tile {
  alignas(64) uint8_t rows[16][64];
};
inline Tile (&tiles())[8] {
  static thread_local Tile all[8];
  return all;
}
inline bool& configured() {
  static thread_local bool yes = false;
  return yes;
}

// 16 rows of 64 bytes each is all that kernels ask for.
inline void load_config(const void* config) {
  const uint8_t* bytes = static_cast<const uint8_t*>(config);
  bool right = bytes[0] == 1;
  for (int i = 0; i < 8; ++i) right = right && bytes[16 + 2 * i] == 64 && bytes[17 + 2 * i] == 0 && bytes[48 + i] == 16;
  if (!right) __builtin_trap();
  std::memset(tiles(), 0, sizeof(Tile[8]));
  configured() = true;
}
inline void release() { configured() = false; }
inline Tile& tile(int i) {
  if (!configured()) __builtin_trap();
  return tiles()[i];
}
inline void zero(int i) { std::memset(&tile(i), 0, sizeof(Tile)); }
inline void load(int i, const void* base, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) std::memcpy(tile(i).rows[row], static_cast<const char*>(base) + row * stride, 64);
}
inline void store(int i, void* base, int64_t stride) {
  for (int64_t row = 0; row < 16; ++row) std::memcpy(static_cast<char*>(base) + row * stride, tile(i).rows[row], 64);
}

template <class T>
inline T element(const Tile& t, int64_t row, int64_t column) {
  T value;
  std::memcpy(&value, t.rows[row] + column * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// Subnormal numbers count as zero, on either side.
inline float flushed(float v) { return v > -1.17549435e-38f && v < 1.17549435e-38f ? 0.0f * v : v; }
inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float v;
  std::memcpy(&v, &wide, 4);
  return flushed(v);
}

template <class Sum, class Factor, int PER_WORD, class Value>
inline void multiply(int c, int a, int b, const Value& value) {
  const Tile left = tile(a), right = tile(b);
  Tile& out = tile(c);
  for (int64_t row = 0; row < 16; ++row)
    for (int64_t column = 0; column < 16; ++column) {
      Sum sum = element<Sum>(out, row, column);
      for (int64_t k = 0; k < 16; ++k)
        for (int64_t i = 0; i < PER_WORD; ++i)
          sum += value(element<Factor>(left, row, PER_WORD * k + i)) * value(element<Factor>(right, k, PER_WORD * column + i));
      std::memcpy(out.rows[row] + 4 * column, &sum, 4);
    }
}
inline void multiply_bfloat16(int c, int a, int b) { multiply<float, uint16_t, 2>(c, a, b, from_bfloat16); }
inline void multiply_int8(int c, int a, int b) {
  multiply<int32_t, int8_t, 4>(c, a, b, [](int8_t v) { return static_cast<int32_t>(v); });
}

// Nearest even; the second operand is the lower half.
inline __m512i to_bfloat16(__m512 high, __m512 low) {
  alignas(64) float values[32];
  alignas(64) uint16_t out[32];
  _mm512_store_ps(values, low);
  _mm512_store_ps(values + 16, high);
  for (int i = 0; i < 32; ++i) {
    const float v = flushed(values[i]);
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    out[i] = static_cast<uint16_t>(v != v ? bits >> 16 | 0x40u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
  return _mm512_load_si512(out);
}

}  // namespace emulated_amx

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_loadd_internal  // what the kernels call under the address sanitizer
#undef _tile_stored_internal
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_amx::load_config
#define _tile_release emulated_amx::release
#define _tile_zero emulated_amx::zero
#define _tile_loadd emulated_amx::load
#define _tile_stored emulated_amx::store
#define _tile_loadd_internal emulated_amx::load
#define _tile_stored_internal emulated_amx::store
#define _tile_dpbf16ps emulated_amx::multiply_bfloat16
#define _tile_dpbssd emulated_amx::multiply_int8
#define _mm512_cvtne2ps_pbh emulated_amx::to_bfloat16
