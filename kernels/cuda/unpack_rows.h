// Rows of a weight as dense numbers: the loop that unpack.cu and spqr_unpack.cu share, which differ in their scales.
//
// A thread block has 16 rows of y and a slab of columns. A warp takes a block of codes at a time, as it lies in memory; a lane computes what it
// has of a row, some neighbouring weights of each part of the columns, and stores them at once. The writes are most of the bytes: 2 or 4 for each
// weight, against at most 1 read. So that they are what the kernel waits for, a lane's places are counted once for all that it has, and codes
// become floats without conversions.
#pragma once

#include "pieces.h"

namespace hfq {
namespace {

constexpr int kUnpackWarps = 8, kUnpackThreads = 32 * kUnpackWarps;
constexpr uint32_t kSlab = 2048;

// A code without what it counts from, and its step.
struct RowGrid {
  float scale, zero;
};

// Half i of a register of codes as a float: with the exponent of 2^23 the mantissa counts in ones.
__device__ __forceinline__ float float_of(uint32_t codes, int i) {
  return add(as_float(permute_bytes(codes, 0x4b000000u, i ? 0x7632u : 0x7610u)), -8388608.0f);
}

// Register r of a lane in a block, as two codes in the lower bits of either half; see fragments.h. `word(i)`: the lane's words.
template <int kBits, class Word>
__device__ __forceinline__ uint32_t codes_of(const Word& word, int r) {
  if constexpr (kBits == 8) {
    return permute_bytes(word(r / 2), 0, r % 2 ? 0x4342u : 0x4140u);
  } else if constexpr (kBits == 3) {
    if (r < 30) return (word(r / 5) >> (3 * (r % 5))) & 0x00070007u;
    uint32_t codes = 0;
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) codes |= ((word(3 * (r - 30) + bit) >> 15) & 0x00010001u) << bit;
    return codes;
  } else {
    constexpr int kFields = 16 / kBits;
    return (word(r / kFields) >> (kBits * (r % kFields))) & (0x00010001u * ((1u << kBits) - 1));
  }
}

// Which row of the weight is row `at` of y; -1 if there is none.
template <class Params>
__device__ __forceinline__ int64_t row_of(const Params& p, int64_t at) {
  const int64_t row = p.index ? load(p.index + at) : at;
  return row < 0 || row >= p.weight.out_features ? -1 : row;
}

// What a thread block has.
struct Slab {
  int64_t first_row;
  uint32_t first, last;  // columns

  template <class Params>
  __device__ __forceinline__ explicit Slab(const Params& p) {
    const uint32_t columns = static_cast<uint32_t>(p.weight.in_features), slabs = (columns + kSlab - 1) / kSlab;
    first_row = static_cast<int64_t>(blockIdx.x / slabs) * kTileRows;
    first = blockIdx.x % slabs * kSlab;
    last = columns - first < kSlab ? columns : first + kSlab;
  }
};

// A row of the weight: where its codes are, the first of the 4 lanes that have them, and which of such a lane's two rows it is. Kinds of weights
// add how a row's scales and numbers are found:
//
//   kBits, kCount            of a code; neighbours that a lane has of a part, 4 kCount columns
//   grid(group)              scale and zero point of the row
//   number(codes, i, grid)   half i of a register of codes
template <int kBits>
struct UnpackedRow {
  const uint8_t* codes;
  int64_t tile;
  int row, lane, half;

  template <class Params>
  __device__ __forceinline__ UnpackedRow(const Params& p, int64_t number)
      : tile(number / kTileRows), row(static_cast<int>(number % 8)), lane(4 * row), half(static_cast<int>(number / 8 % 2)) {
    codes = p.weight.qweight + tile * ((p.weight.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>) * kBlockBytes<kBits>;
  }
};

template <class Row, class Params>
__device__ __forceinline__ uint32_t group_of(const Params& p, uint32_t column) {
  return multiply_high(column / (4 * Row::kCount) * 2, p.group_magic);
}

// What a lane has of its row in a block of codes, from `column` on, to the row `y`.
template <class Row, class T, int kHalf, class Params>
__device__ __forceinline__ void unpack_block(const Params& p, const Row& row, const uint32_t (&words)[Codes<Row::kBits>::kWords], Bits<T>* y,
                                             uint32_t column, uint32_t last) {
  constexpr int kColumns = 4 * Row::kCount;
  const auto word = [&](int i) { return words[i]; };
  RowGrid grid;
  uint32_t group = ~0u;
#pragma unroll
  for (int part = 0; part < kBlockColumns<Row::kBits> / kColumns; ++part, column += kColumns) {
    if (column >= last) return;
    if (const uint32_t here = group_of<Row>(p, column); here != group) group = here, grid = row.grid(here);
    float v[Row::kCount];
#pragma unroll
    for (int i = 0; i < Row::kCount; ++i) {
      const int r = Row::kCount * part + i / 4 * 4 + 2 * kHalf + i % 4 / 2;
      v[i] = row.number(codes_of<Row::kBits>(word, r), i % 2, grid);
    }
    store_piece(T{}, y + column, v);
  }
}

template <class Row, class T, class Params>
__device__ __forceinline__ void unpack_slab(const Params& p, const Slab& slab) {
  constexpr int kBits = Row::kBits, kColumns = kBlockColumns<kBits>, kBytes = kBlockBytes<kBits>;
  const uint32_t warp = threadIdx.x / 32, quarter = threadIdx.x % 4;
  for (int64_t at = slab.first_row + threadIdx.x % 32 / 4; at < slab.first_row + kTileRows && at < p.rows; at += 8) {
    Bits<T>* const y = static_cast<Bits<T>*>(p.y) + at * p.weight.in_features;
    const int64_t number = row_of(p, at);
    if (number < 0) {
      // Not to become a wild read.
      const float nan = as_float(0x7fc00000u), v[4] = {nan, nan, nan, nan};
      for (uint32_t i = slab.first + 4 * (4 * warp + quarter); i < slab.last; i += 16 * kUnpackWarps) store_piece(T{}, y + i, v);
      continue;
    }
    const Row row(p, number);
    const int lane = row.lane + static_cast<int>(quarter);
    for (uint32_t begin = slab.first + warp * kColumns; begin < slab.last; begin += kUnpackWarps * kColumns) {
      // A lane has two rows, one after the other: the second finds its codes in L1 (8 bits: in L2).
      const uint8_t* const block = row.codes + begin / kColumns * kBytes;
      uint32_t words[Codes<kBits>::kWords];
      const uint4 v = load(reinterpret_cast<const uint4*>(block) + lane);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
      if constexpr (kBits == 3) {
        const uint2 u = load(reinterpret_cast<const uint2*>(block + 512) + lane);
        words[4] = u.x, words[5] = u.y;
      }
      const uint32_t column = begin + quarter * Row::kCount;
      if (row.half)
        unpack_block<Row, T, 1>(p, row, words, y, column, slab.last);
      else
        unpack_block<Row, T, 0>(p, row, words, y, column, slab.last);
    }
  }
}

template <class Params>
unsigned slabs_of(const Params& p) {
  return static_cast<unsigned>((p.weight.in_features + kSlab - 1) / kSlab * ((p.rows + kTileRows - 1) / kTileRows));
}

}  // namespace
}  // namespace hfq
