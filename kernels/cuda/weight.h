// A weight in layout "fragments" as launchers take it. See fragments.h and hfq/kernels/fragments.py.
#pragma once

#include "dtype.h"

namespace hfq {

constexpr int kTileRows = 16;     // rows of W that one matrix instruction takes
constexpr int kUnitColumns = 32;  // columns after which a group may end: two matrix instructions

struct Weight {
  const uint8_t* qweight;  // [N16, C, 32 | 48, 16]  N16 = ceil(N / 16) tiles of rows, C blocks of columns
  const void* scales;      // [N16, G, 8, 2]         rows g and g + 8 side by side
  const void* zeros;       // [N16, G, 8, 2] or null: 2^(bits-1)
  const float* codebook;   // [16], with 8 bits [256]: the values of E4M3; or null: integers
  int64_t out_features;    // N
  int64_t in_features;     // K, a multiple of 8
  int64_t groups;          // G
  int64_t group_size;      // a multiple of 32, or at least K
  int32_t bits;            // 2, 3, 4 or 8
  DType scale_dtype;       // of scales and zeros
};

inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }  // upwards

// Of a group of `columns`, in parts of `part_columns`: ceil(2^31 / parts), so that part / parts is the upper half of 2 part * magic.
inline uint32_t part_magic(int64_t columns, int64_t part_columns) {
  const int64_t parts = divided(columns, part_columns);
  return static_cast<uint32_t>(((int64_t{1} << 31) + parts - 1) / parts);
}

// Of a block; constants, because device code may not call the constexpr functions of the host.
template <int kBits>
constexpr int kBlockColumns = kBits == 3 ? 128 : 256 / kBits;
template <int kBits>
constexpr int kBlockBytes = kBits == 3 ? 768 : 512;

// Which of the launchers for each kind of codes takes this weight.
template <class Launch>
Launch* of_kind(const Weight& w, Launch* int2, Launch* int3, Launch* int4, Launch* int8, Launch* table4, Launch* e4m3) {
  if (w.codebook) return w.bits == 4 ? table4 : e4m3;
  return w.bits == 2 ? int2 : w.bits == 3 ? int3 : w.bits == 4 ? int4 : int8;
}

}  // namespace hfq
