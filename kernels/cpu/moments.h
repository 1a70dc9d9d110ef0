// Arguments of the kernel that sums up second moments of activations. As rows16.h: plain data and raw pointers, no functions.
#pragma once

#include <cstdint>

namespace hfq {

constexpr int64_t kTileSide = 16;      // rows of a tile, and 32-bit columns
constexpr int64_t kMomentTokens = 32;  // bfloat16 numbers in a row of a tile
constexpr int64_t kTileNumbers = 512;  // bfloat16 numbers of a tile: 1 KiB
constexpr int64_t kBand = 8;           // strips of 16 columns that are multiplied with all strips behind them, one pair after the other

// total += x^T x on and above the diagonal; what lies below it within 16 x 16 squares may be written to as well.
//
// Operands are packed first, strip by strip of 16 columns, a tile for each 32 tokens:
//   left   [S, T / 32, 16 columns, 32 tokens]
//   right  [S, T / 32, 16 pairs of tokens, 16 columns, 2]
// with zeros for columns and tokens that do not exist.
struct MomentParams {
  int64_t tokens;     // T
  int64_t columns;    // K
  const uint16_t* x;  // bfloat16 [T, K]
  float* total;       // [K, K]
  int64_t strips;     // S: even
  int64_t blocks;     // T / 32, rounded up
  uint16_t* left;
  uint16_t* right;
};

}  // namespace hfq
