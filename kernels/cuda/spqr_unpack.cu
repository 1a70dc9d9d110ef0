// Rows of a weight of format "spqr" as dense numbers: those of the PyTorch reference to the last bit, whose products and sums are rounded one
// by one.
//
// A thread block has 16 rows and a slab of columns. A lane computes what it has of a block of codes, 4 neighbouring weights at a time; when all
// are stored, those with outliers are computed again, added in float32 and stored over the others, while these are still in L2. So the dense
// part needs no search for outliers, and a weight is rounded once.
#include <algorithm>

#include "pieces.h"
#include "spqr_parts.h"

namespace hfq {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kColumns = 4;    // neighbours that one lane has
constexpr int kSlab = 2048;    // columns of a thread block, of which a warp takes a block of codes at a time

// ---- primitives ----

// Register r of a lane in a block, as two codes in the lower bits of either half; see fragments.h. `word(i)`: the lane's words.
template <int kBits, class Word>
__device__ __forceinline__ uint32_t codes_of(const Word& word, int r) {
  if constexpr (kBits == 3) {
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

struct RowGrid {
  float scale, zero;
};

// Half i of a register, without a conversion: with the exponent of 2^23 the mantissa counts in ones.
__device__ __forceinline__ float value_of(uint32_t codes, int i, const RowGrid& grid) {
  const float code = add(as_float(permute_bytes(codes, 0x4b000000u, i ? 0x7632u : 0x7610u)), -8388608.0f);
  return multiply(add(code, -grid.zero), grid.scale);
}

// Four numbers side by side.
__device__ __forceinline__ float4 load_line(const void* lines, int64_t at, DType dtype) {
  if (dtype == kFloat32) return load(static_cast<const float4*>(lines) + at);
  const uint2 v = load(static_cast<const uint2*>(lines) + at);
  if (dtype == kBFloat16) return make_float4(as_float(v.x << 16), as_float(v.x & 0xffff0000u), as_float(v.y << 16), as_float(v.y & 0xffff0000u));
  const auto number = [](uint32_t half) { return to_float(Float16{}, static_cast<uint16_t>(half)); };
  return make_float4(number(v.x), number(v.x >> 16), number(v.y), number(v.y >> 16));
}

// A row of the weight: where its codes are, the first of the 4 lanes that have them, and which of such a lane's two rows it is.
template <int kBits>
struct Row {
  const SpqrWeight& w;
  const uint8_t *codes, *stat_codes;  // of its tile; of the first group
  int64_t lines;
  int lane, half, width;  // width: of a code of a scale

  __device__ __forceinline__ Row(const SpqrUnpackParams& p, int64_t row)
      : w(p.weight), lane(static_cast<int>(row % 8 * 4)), half(static_cast<int>(row / 8 % 2)), width(w.wide_codes ? 8 : 4) {
    const int64_t tile = row / kTileRows;
    codes = w.qweight + tile * ((w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>) * kBlockBytes<kBits>;
    stat_codes = w.stat_codes + (tile * w.stat_groups * 8 + row % 8) * (width / 2);
    lines = static_cast<int64_t>(static_cast<uint32_t>(tile) / p.tiles_per_stat) * w.groups;
  }

  __device__ __forceinline__ RowGrid grid(uint32_t group) const {
    const uint32_t pair = load_stat_codes(stat_codes + 4 * group * width, w.wide_codes) >> (2 * half * width), mask = (1u << width) - 1;
    const float4 line = load_line(w.stats, lines + group, w.stat_dtype);
    const float scale = static_cast<float>(pair & mask), zero = static_cast<float>(pair >> width & mask);
    return {add(line.y, multiply(scale, line.x)), add(line.w, multiply(zero, line.z))};
  }
};

__device__ __forceinline__ uint32_t group_of(const SpqrUnpackParams& p, uint32_t column) {
  return multiply_high(column / kHalfColumns * 2, p.group_magic);
}

template <class T>
__device__ __forceinline__ void store_numbers(T, Bits<T>* y, const float (&v)[kColumns]) {
  const auto pair = [](float a, float b) { return static_cast<uint32_t>(from_float(T{}, b)) << 16 | from_float(T{}, a); };
  store(reinterpret_cast<uint2*>(y), make_uint2(pair(v[0], v[1]), pair(v[2], v[3])));
}
__device__ __forceinline__ void store_numbers(Float32, Bits<Float32>* y, const float (&v)[kColumns]) {
  store(reinterpret_cast<float4*>(y), make_float4(v[0], v[1], v[2], v[3]));
}

// Which row of the weight is row `at` of y; -1 if there is none.
__device__ __forceinline__ int64_t row_of(const SpqrUnpackParams& p, int64_t at) {
  const int64_t row = p.index ? load(p.index + at) : at;
  return row < 0 || row >= p.weight.out_features ? -1 : row;
}

// What a lane has of its row in a block of codes, from `column` on, to the row `y`.
template <int kBits, class T, int kHalf>
__device__ __forceinline__ void unpack_block(const SpqrUnpackParams& p, const Row<kBits>& row, const Codes<kBits>& codes, Bits<T>* y, uint32_t column,
                                             uint32_t last) {
  const auto word = [&](int i) { return codes.words[i]; };
  RowGrid grid;
  uint32_t group = ~0u;
#pragma unroll
  for (int part = 0; part < kBlockColumns<kBits> / kHalfColumns; ++part, column += kHalfColumns) {
    if (column >= last) return;
    if (const uint32_t here = group_of(p, column); here != group) group = here, grid = row.grid(here);
    float v[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) v[i] = value_of(codes_of<kBits>(word, 4 * part + 2 * kHalf + i / 2), i % 2, grid);
    store_numbers(T{}, y + column, v);
  }
}

// ---- kernel ----

// Four blocks of a multiprocessor: ptxas would not take more than 48 registers, and spill.
template <int kBits, class T>
__global__ void __launch_bounds__(kThreads, 4) spqr_unpack_kernel(const SpqrUnpackParams p) {
  const SpqrWeight& w = p.weight;
  const uint32_t in_features = static_cast<uint32_t>(w.in_features), slabs = (in_features + kSlab - 1) / kSlab;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / slabs) * kTileRows;
  const uint32_t first = blockIdx.x % slabs * kSlab, last = in_features - first < kSlab ? in_features : first + kSlab;
  const uint32_t warp = threadIdx.x / 32, quarter = threadIdx.x % 4;

  for (int64_t at = first_row + threadIdx.x % 32 / 4; at < first_row + kTileRows && at < p.rows; at += 8) {
    Bits<T>* const y = static_cast<Bits<T>*>(p.y) + at * w.in_features;
    const int64_t number = row_of(p, at);
    if (number < 0) {
      // Not to become a wild read.
      const float nan = as_float(0x7fc00000u), v[kColumns] = {nan, nan, nan, nan};
      for (uint32_t i = first + kColumns * (4 * warp + quarter); i < last; i += 4 * kColumns * kWarps) store_numbers(T{}, y + i, v);
      continue;
    }
    const Row<kBits> row(p, number);
    const int lane = row.lane + static_cast<int>(quarter);
    for (uint32_t begin = first + warp * kBlockColumns<kBits>; begin < last; begin += kWarps * kBlockColumns<kBits>) {
      Codes<kBits> codes;
      codes.load(row.codes + begin / kBlockColumns<kBits> * kBlockBytes<kBits> + 16 * lane, lane);
      if (row.half)
        unpack_block<kBits, T, 1>(p, row, codes, y, begin + quarter * kColumns, last);
      else
        unpack_block<kBits, T, 0>(p, row, codes, y, begin + quarter * kColumns, last);
    }
  }
  if (!w.outliers) return;
  sync_block();

  constexpr uint32_t kShare = kThreads / kTileRows;
  const int64_t at = first_row + threadIdx.x / kShare;
  if (at >= p.rows) return;
  const int64_t number = row_of(p, at);
  if (number < 0) return;
  const Row<kBits> row(p, number);
  const Span span = outliers_of(w, number);
  for (uint32_t i = span.begin + threadIdx.x % kShare; i < span.end; i += kShare) {
    const uint32_t column = outlier_column(w, i);
    if (column < first || column >= last) continue;
    const uint8_t* const block = row.codes + column / kBlockColumns<kBits> * kBlockBytes<kBits>;
    const int lane = row.lane + static_cast<int>(column % kHalfColumns / kColumns);
    const int r = static_cast<int>(column % kBlockColumns<kBits> / kHalfColumns * 4 + column % kColumns / 2) + 2 * row.half;
    const auto word = [&](int j) {
      const auto words = [&](int from) { return reinterpret_cast<const uint32_t*>(block + from); };
      return load(j < 4 ? words(0) + 4 * lane + j : words(512) + 2 * lane + j - 4);
    };
    const float dense = value_of(codes_of<kBits>(word, r), column % 2, row.grid(group_of(p, column)));
    store(static_cast<Bits<T>*>(p.y) + at * w.in_features + column, from_float(T{}, add(dense, load_float(w.values, i, w.stat_dtype))));
  }
}

// ---- launcher ----

template <int kBits>
const char* launch_bits(const SpqrUnpackParams& p, cudaStream_t stream) {
  const int64_t slabs = (p.weight.in_features + kSlab - 1) / kSlab, tiles = (p.rows + kTileRows - 1) / kTileRows;
  const auto launch_for = [&](auto number) {
    return launch(spqr_unpack_kernel<kBits, decltype(number)>, static_cast<unsigned>(slabs * tiles), kThreads, 0, stream, p);
  };
  if (p.y_dtype == kFloat32) return launch_for(Float32{});
  return p.y_dtype == kFloat16 ? launch_for(Float16{}) : launch_for(BFloat16{});
}

}  // namespace

const char* launch_spqr_unpack(const SpqrUnpackParams& params, cudaStream_t stream) {
  if (params.rows == 0) return nullptr;
  SpqrUnpackParams p = params;
  p.group_magic = group_magic(p.weight, kHalfColumns);
  p.tiles_per_stat = static_cast<uint32_t>(std::min<int64_t>(p.weight.rows_per_stat / kTileRows, INT32_MAX));
  if (p.weight.bits == 2) return launch_bits<2>(p, stream);
  if (p.weight.bits == 3) return launch_bits<3>(p, stream);
  return launch_bits<4>(p, stream);
}

}  // namespace hfq
