// Rows of a weight of format "spqr" as dense numbers: those of the PyTorch reference to the last bit, whose products and sums are rounded one
// by one.
//
// When all weights of a thread block are stored, those with outliers are computed again, added in float32 and stored over the others, while these
// are still in L2. So the dense part needs no search for outliers, and a weight is rounded once.
#include <algorithm>

#include "spqr_parts.h"
#include "unpack_rows.h"

namespace hfq {
namespace {

// ---- primitives ----

// Four numbers side by side.
__device__ __forceinline__ float4 load_line(const void* lines, int64_t at, DType dtype) {
  if (dtype == kFloat32) return load(static_cast<const float4*>(lines) + at);
  const uint2 v = load(static_cast<const uint2*>(lines) + at);
  const float2 first = dtype == kBFloat16 ? unpacked(BFloat16{}, v.x) : unpacked(Float16{}, v.x);
  const float2 second = dtype == kBFloat16 ? unpacked(BFloat16{}, v.y) : unpacked(Float16{}, v.y);
  return make_float4(first.x, first.y, second.x, second.y);
}

template <int kBits_>
struct Row : UnpackedRow<kBits_> {
  static constexpr int kBits = kBits_, kCount = 4;
  const SpqrWeight& w;
  int width;                  // of a code of a scale
  const uint8_t* stat_codes;  // of the first group
  int64_t lines;

  __device__ __forceinline__ Row(const SpqrUnpackParams& p, int64_t number)
      : UnpackedRow<kBits>(p, number),
        w(p.weight),
        width(w.wide_codes ? 8 : 4),
        stat_codes(w.stat_codes + (this->tile * w.stat_groups * 8 + this->row) * (width / 2)),
        lines(static_cast<int64_t>(static_cast<uint32_t>(this->tile) / p.tiles_per_stat) * w.groups) {}

  __device__ __forceinline__ RowGrid grid(uint32_t group) const {
    const uint32_t pair = load_stat_codes(stat_codes + 4 * group * width, w.wide_codes) >> (2 * this->half * width), mask = (1u << width) - 1;
    const float4 line = load_line(w.stats, lines + group, w.stat_dtype);
    const float scale = static_cast<float>(pair & mask), zero = static_cast<float>(pair >> width & mask);
    return {add(line.y, multiply(scale, line.x)), add(line.w, multiply(zero, line.z))};
  }
  __device__ __forceinline__ float number(uint32_t codes, int i, const RowGrid& grid) const {
    return multiply(add(float_of(codes, i), -grid.zero), grid.scale);
  }
};

// ---- kernel ----

// Four blocks of a multiprocessor: ptxas would not take more than 48 registers, and spill.
template <int kBits, class T>
__global__ void __launch_bounds__(kUnpackThreads, 4) spqr_unpack_kernel(const SpqrUnpackParams p) {
  const SpqrWeight& w = p.weight;
  const Slab slab(p);
  unpack_slab<Row<kBits>, T>(p, slab);
  if (!w.outliers) return;
  sync_block();

  constexpr uint32_t kShare = kUnpackThreads / kTileRows;
  const int64_t at = slab.first_row + threadIdx.x / kShare;
  if (at >= p.rows) return;
  const int64_t number = row_of(p, at);
  if (number < 0) return;
  const Row<kBits> row(p, number);
  const Span span = outliers_of(w, number);
  for (uint32_t i = span.begin + threadIdx.x % kShare; i < span.end; i += kShare) {
    const uint32_t column = outlier_column(w, i);
    if (column < slab.first || column >= slab.last) continue;
    const uint8_t* const block = row.codes + column / kBlockColumns<kBits> * kBlockBytes<kBits>;
    const int lane = row.lane + static_cast<int>(column % kHalfColumns / 4);
    const int r = static_cast<int>(column % kBlockColumns<kBits> / kHalfColumns * 4 + column % 4 / 2) + 2 * row.half;
    const auto word = [&](int j) {
      const auto words = [&](int from) { return reinterpret_cast<const uint32_t*>(block + from); };
      return load(j < 4 ? words(0) + 4 * lane + j : words(512) + 2 * lane + j - 4);
    };
    const float dense = row.number(codes_of<kBits>(word, r), column % 2, row.grid(group_of<Row<kBits>>(p, column)));
    store(static_cast<Bits<T>*>(p.y) + at * w.in_features + column, from_float(T{}, add(dense, load_float(w.values, i, w.stat_dtype))));
  }
}

// ---- launcher ----

template <int kBits>
const char* launch_bits(const SpqrUnpackParams& p, cudaStream_t stream) {
  return for_dtype(p.y_dtype, [&](auto number) {
    return launch(spqr_unpack_kernel<kBits, decltype(number)>, slabs_of(p), kUnpackThreads, 0, stream, p);
  });
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
