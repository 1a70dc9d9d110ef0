// AVX-512 with VNNI and AMX (Sapphire Rapids and later): what the matrix units do; all else is that of isa_avx512_vnni.cpp. tdpbf16ps multiplies
// tiles of 16 x 32 and 32 x 16 bfloat16 numbers and adds to 16 x 16 float32 sums, tdpbssd 16 x 64 and 64 x 16 integers.
#include <immintrin.h>

#include "moments.h"
#include "rows16.h"

namespace hfq {
namespace {

#if defined(__SANITIZE_ADDRESS__) && !defined(__clang__)
// The sanitizer does not see what these instructions read and write. So the ends of every row are read once more, where it looks.
inline void see_tile(const void* base, int64_t stride) {
  const volatile char* bytes = static_cast<const volatile char*>(base);
  for (int64_t row = 0; row < 16; ++row, bytes += stride) static_cast<void>(bytes[0]), static_cast<void>(bytes[63]);
}
#undef _tile_loadd
#undef _tile_stored
#define _tile_loadd(tile, base, stride) see_tile(base, stride); _tile_loadd_internal(tile, base, stride)
#define _tile_stored(tile, base, stride) see_tile(base, stride); _tile_stored_internal(tile, base, stride)
#endif

#include "lanes_avx512.h"
#include "rows16_parts.h"
#include "tiles_body.h"

// ---- second moments ----

constexpr int64_t kRowBytes = 64;

inline bool inside(const MomentParams& p, int64_t strip) { return (strip + 1) * kTileSide <= p.columns; }

// The sums of strips i and j: in place where all of them exist.
inline float* square(const MomentParams& p, int64_t i, int64_t j, float* outside, int64_t& stride) {
  const bool whole = inside(p, i) && inside(p, j);
  stride = whole ? p.columns * 4 : kRowBytes;
  return whole ? p.total + i * kTileSide * p.columns + j * kTileSide : outside;
}

void add_outside(const MomentParams& p, int64_t i, int64_t j, const float* sums) {
  for (int64_t row = i * kTileSide; row < (i + 1) * kTileSide && row < p.columns; ++row)
    for (int64_t column = j * kTileSide; column < (j + 1) * kTileSide && column < p.columns; ++column)
      p.total[row * p.columns + column] += sums[(row - i * kTileSide) * kTileSide + column - j * kTileSide];
}

// Strips i and i + 1 times strips j and j + 1.
void multiply_pairs(const MomentParams& p, int64_t i, int64_t j) {
  alignas(64) float outside[4][kTileSide * kTileSide];
  if (!inside(p, i + 1) || !inside(p, j + 1)) __builtin_memset(outside, 0, sizeof outside);
  const int64_t strip = p.blocks * kTileNumbers;
  const uint16_t* left = p.left + i * strip;
  const uint16_t* right = p.right + j * strip;
  before_tiles();
  int64_t strides[4];
  float* sums[4];
  for (int64_t n = 0; n < 4; ++n) sums[n] = square(p, i + n / 2, j + n % 2, outside[n], strides[n]);
  _tile_loadd(0, sums[0], strides[0]);
  _tile_loadd(1, sums[1], strides[1]);
  _tile_loadd(2, sums[2], strides[2]);
  _tile_loadd(3, sums[3], strides[3]);
  for (int64_t block = 0; block < p.blocks; ++block) {
    const int64_t at = block * kTileNumbers;
    _tile_loadd(4, left + at, kRowBytes);
    _tile_loadd(5, left + strip + at, kRowBytes);
    _tile_loadd(6, right + at, kRowBytes);
    _tile_loadd(7, right + strip + at, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums[0], strides[0]);
  _tile_stored(1, sums[1], strides[1]);
  _tile_stored(2, sums[2], strides[2]);
  _tile_stored(3, sums[3], strides[3]);
  for (int64_t n = 0; n < 4; ++n)
    if (sums[n] == outside[n]) add_outside(p, i + n / 2, j + n % 2, outside[n]);
}

}  // namespace

void amx_pack_moment(const MomentParams& p, int64_t first, int64_t last) {
  for (int64_t strip = first; strip < last; ++strip) {
    const int64_t column = strip * kTileSide;
    const int64_t width = column >= p.columns ? 0 : p.columns - column < kTileSide ? p.columns - column : kTileSide;
    for (int64_t block = 0; block < p.blocks; ++block) {
      alignas(64) uint32_t pairs[kTileSide][kTileSide] = {};  // [pair of tokens][column]
      for (int64_t pair = 0; pair < kTileSide; ++pair) {
        const int64_t token = block * kMomentTokens + 2 * pair;
        const uint16_t* x = p.x + token * p.columns + column;
        if (token + 1 < p.tokens)
          for (int64_t c = 0; c < width; ++c) pairs[pair][c] = x[c] | static_cast<uint32_t>(x[p.columns + c]) << 16;
        else if (token < p.tokens)
          for (int64_t c = 0; c < width; ++c) pairs[pair][c] = x[c];
      }
      const int64_t at = (strip * p.blocks + block) * kTileNumbers;
      __builtin_memcpy(p.right + at, pairs, sizeof pairs);
      alignas(64) uint32_t turned[kTileSide][kTileSide];
      for (int64_t c = 0; c < kTileSide; ++c)
        for (int64_t pair = 0; pair < kTileSide; ++pair) turned[c][pair] = pairs[pair][c];
      __builtin_memcpy(p.left + at, turned, sizeof turned);
    }
  }
}

void amx_multiply_moment(const MomentParams& p, int64_t first, int64_t last) {
  const TileConfig config;
  _tile_loadconfig(&config);
  // Bands of strips, each with all pairs of strips from its first one on: the band stays in the cache.
  int64_t task = 0;
  for (int64_t band = 0; band < p.strips && task < last; band += kBand) {
    for (int64_t j = band; j < p.strips && task < last; j += 2, ++task) {
      if (task < first) continue;
      for (int64_t i = band; i < band + kBand && i <= j; i += 2) multiply_pairs(p, i, j);
    }
  }
  _tile_release();
}

void amx_tiles_linear(const LinearParams& p, uint8_t* scratch, int64_t first, int64_t last) {
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t pair = first; pair < last; ++pair) multiply_int8(p, scratch, 2 * pair);
  _tile_release();
}

void amx_tiles_bfloat16(const LinearParams& p, uint8_t* scratch, int64_t first, int64_t last) {
  const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t pairs = (p.shape.out_features + 2 * kRows - 1) / (2 * kRows);
  for (int64_t pair = first * kTilePairs; pair < last * kTilePairs && pair < pairs; pair += kTilePairs)
    multiply_bfloat16(p, scratch, 2 * pair, smaller(kTilePairs, pairs - pair));
  _tile_release();
}

}  // namespace hfq
