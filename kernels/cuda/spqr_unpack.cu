// Rows of a weight of format "spqr" as dense numbers: those of the PyTorch reference to the last bit, whose products and sums are rounded one
// by one.
//
// A thread block has 16 rows and a slab of columns. A thread computes 8 neighbouring weights at a time; when all are stored, those with
// outliers are computed again, added in float32 and stored over the others, while these are still in L2. So the dense part needs no
// search for outliers, and a weight is rounded once.
#include "spqr_parts.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;             // of a thread
constexpr int kChunk = 32 * kColumns;   // of a warp; 8 warps take rows w and w + 8 of a tile
constexpr int kSlab = 8 * kChunk;       // of a thread block: each reads the columns of all outliers of its rows

// ---- primitives ----

// Register r of a lane in a block, as two codes in the lower bits of either half; see fragments.h.
template <int kBits>
__device__ __forceinline__ uint32_t load_register(const uint8_t* block, int lane, int r) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block) + 4 * lane;
  if constexpr (kBits == 3) {
    const auto word = [&](int i) { return load(i < 4 ? words + i : reinterpret_cast<const uint32_t*>(block + 512) + 2 * lane + i - 4); };
    if (r < 30) return (word(r / 5) >> (3 * (r % 5))) & 0x00070007u;
    uint32_t codes = 0;
#pragma unroll
    for (int bit = 0; bit < 3; ++bit) codes |= ((word(3 * (r - 30) + bit) >> 15) & 0x00010001u) << bit;
    return codes;
  } else {
    constexpr int kFields = 16 / kBits;
    return (load(words + r / kFields) >> (kBits * (r % kFields))) & (0x00010001u * ((1u << kBits) - 1));
  }
}

// A row's scale and zero point in the group of a column.
struct RowGrid {
  float scale, zero;
};
__device__ __forceinline__ RowGrid load_grid(const SpqrWeight& w, int64_t row, uint32_t column) {
  const int64_t group = w.groups == 1 ? 0 : column / static_cast<uint32_t>(w.group_size);
  const int width = w.wide_codes ? 8 : 4;
  const int64_t at = ((row / kTileRows * w.stat_groups + group) * 8 + row % 8) * (width / 2);
  const uint32_t pair = load_stat_codes(w.stat_codes + at, w.wide_codes) >> (row / 8 % 2 * 2 * width);
  const uint32_t mask = (1u << width) - 1;
  const int64_t lines = (row / w.rows_per_stat * w.groups + group) * 4;
  const auto line = [&](int64_t step, uint32_t code) {
    return add(load_float(w.stats, step + 1, w.stat_dtype), multiply(static_cast<float>(code), load_float(w.stats, step, w.stat_dtype)));
  };
  return {line(lines, pair & mask), line(lines + 2, (pair >> width) & mask)};
}

__device__ __forceinline__ float value_of(uint32_t code, const RowGrid& grid) {
  return multiply(add(static_cast<float>(code), -grid.zero), grid.scale);
}

// Where a column stands: lane of g = 0, register of rows 0 .. 7, half of the register.
struct Place {
  int64_t block;
  int lane, r, half;
};
template <int kBits>
__device__ __forceinline__ Place place_of(uint32_t column) {
  const int in_unit = static_cast<int>(column % kUnitColumns), unit = static_cast<int>(column / kUnitColumns % Codes<kBits>::kUnits);
  return {column / kBlockColumns<kBits>, in_unit % 16 / 4, 8 * unit + in_unit / 16 * 4 + in_unit % 4 / 2, in_unit % 2};
}

template <class T>
__device__ __forceinline__ void store_halves(uint16_t* y, const float (&v)[kColumns]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = static_cast<uint32_t>(from_float(T{}, v[2 * i + 1])) << 16 | from_float(T{}, v[2 * i]);
  store(reinterpret_cast<uint4*>(y), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}
__device__ __forceinline__ void store_numbers(const SpqrUnpackParams& p, int64_t to, const float (&v)[kColumns]) {
  if (p.y_dtype == kFloat32) {
    store(reinterpret_cast<float4*>(static_cast<float*>(p.y) + to), make_float4(v[0], v[1], v[2], v[3]));
    store(reinterpret_cast<float4*>(static_cast<float*>(p.y) + to) + 1, make_float4(v[4], v[5], v[6], v[7]));
  } else if (p.y_dtype == kFloat16) {
    store_halves<Float16>(static_cast<uint16_t*>(p.y) + to, v);
  } else {
    store_halves<BFloat16>(static_cast<uint16_t*>(p.y) + to, v);
  }
}
__device__ __forceinline__ void store_number(const SpqrUnpackParams& p, int64_t to, float v) {
  if (p.y_dtype == kFloat32)
    store(static_cast<float*>(p.y) + to, v);
  else if (p.y_dtype == kFloat16)
    store(static_cast<uint16_t*>(p.y) + to, from_float(Float16{}, v));
  else
    store(static_cast<uint16_t*>(p.y) + to, from_float(BFloat16{}, v));
}

// Which row of the weight is row `at` of y; -1 if there is none.
__device__ __forceinline__ int64_t row_of(const SpqrUnpackParams& p, int64_t at) {
  const int64_t row = p.index ? load(p.index + at) : at;
  return row < 0 || row >= p.weight.out_features ? -1 : row;
}

// ---- kernel ----

template <int kBits>
__global__ void __launch_bounds__(kThreads) spqr_unpack_kernel(const SpqrUnpackParams p) {
  const SpqrWeight& w = p.weight;
  const uint32_t slabs = static_cast<uint32_t>((w.in_features + kSlab - 1) / kSlab), in_features = static_cast<uint32_t>(w.in_features);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / slabs) * kTileRows;
  const uint32_t first = blockIdx.x % slabs * kSlab, last = in_features - first < kSlab ? in_features : first + kSlab;
  const int64_t tile_bytes = (w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits> * kBlockBytes<kBits>;

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = first_row + threadIdx.x / 32 + 8 * half;
    if (at >= p.rows) break;
    const int64_t row = row_of(p, at);
    for (uint32_t column = first + threadIdx.x % 32 * kColumns; column < last; column += kChunk) {
      float v[kColumns];
      if (row < 0) {
        // Not to become a wild read.
#pragma unroll
        for (int i = 0; i < kColumns; ++i) v[i] = as_float(0x7fc00000u);
      } else {
        const Place place = place_of<kBits>(column);
        const uint8_t* block = w.qweight + row / kTileRows * tile_bytes + place.block * kBlockBytes<kBits>;
        const RowGrid grid = load_grid(w, row, column);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int lane = static_cast<int>(row % 8 * 4) + place.lane + i / 2, r = place.r + static_cast<int>(row / 8 % 2 * 2) + i % 2;
          const uint32_t codes = load_register<kBits>(block, lane, r);
          v[2 * i] = value_of(codes & 0xffffu, grid);
          v[2 * i + 1] = value_of(codes >> 16, grid);
        }
      }
      store_numbers(p, at * w.in_features + column, v);
    }
  }
  if (!w.outliers) return;
  sync_block();

  constexpr uint32_t kShare = kThreads / kTileRows;
  const int64_t at = first_row + threadIdx.x / kShare;
  if (at >= p.rows) return;
  const int64_t row = row_of(p, at);
  if (row < 0) return;
  const Span span = outliers_of(w, row);
  for (uint32_t i = span.begin + threadIdx.x % kShare; i < span.end; i += kShare) {
    const uint32_t column = outlier_column(w, i);
    if (column < first || column >= last) continue;
    const Place place = place_of<kBits>(column);
    const uint8_t* block = w.qweight + row / kTileRows * tile_bytes + place.block * kBlockBytes<kBits>;
    const int lane = static_cast<int>(row % 8 * 4) + place.lane, r = place.r + static_cast<int>(row / 8 % 2 * 2);
    const uint32_t code = (load_register<kBits>(block, lane, r) >> (16 * place.half)) & 0xffffu;
    const float value = add(value_of(code, load_grid(w, row, column)), load_float(w.values, i, w.stat_dtype));
    store_number(p, at * w.in_features + column, value);
  }
}

// ---- launcher ----

template <int kBits>
const char* launch_bits(const SpqrUnpackParams& p, cudaStream_t stream) {
  const int64_t slabs = (p.weight.in_features + kSlab - 1) / kSlab, tiles = (p.rows + kTileRows - 1) / kTileRows;
  return launch(spqr_unpack_kernel<kBits>, static_cast<unsigned>(slabs * tiles), kThreads, 0, stream, p);
}

}  // namespace

const char* launch_spqr_unpack(const SpqrUnpackParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  if (p.weight.bits == 2) return launch_bits<2>(p, stream);
  if (p.weight.bits == 3) return launch_bits<3>(p, stream);
  return launch_bits<4>(p, stream);
}

}  // namespace hfq
