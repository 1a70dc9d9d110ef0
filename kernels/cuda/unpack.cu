// Rows of a weight in layout "fragments" as dense numbers.
#include "linear.h"
#include "unpack.h"
#include "unpack_rows.h"

namespace hfq {
namespace {

enum class Kind { kInteger, kTable, kE4m3 };

template <int kBits_, Kind kKind>
struct Row : UnpackedRow<kBits_> {
  static constexpr int kBits = kBits_, kCount = 8;
  const Weight& w;
  int64_t first;  // of its scales and zero points; those of a group are 16 behind those of the group before

  __device__ __forceinline__ Row(const UnpackParams& p, int64_t number)
      : UnpackedRow<kBits>(p, number), w(p.weight), first(2 * (this->tile * w.groups * 8 + this->row) + this->half) {}

  __device__ __forceinline__ RowGrid grid(uint32_t group) const {
    // Both are asked for before one is waited for.
    const int64_t at = first + 16 * group;
    const bool zeros = kKind == Kind::kInteger && w.zeros;
    const float middle = static_cast<float>(1 << (kBits - 1));
    if (w.scale_dtype == kFloat32) {
      const auto numbers = [at](const void* p) { return load(static_cast<const float*>(p) + at); };
      return {numbers(w.scales), zeros ? numbers(w.zeros) : middle};
    }
    const auto halves = [at](const void* p) { return load(static_cast<const uint16_t*>(p) + at); };
    const uint16_t scale = halves(w.scales), zero = zeros ? halves(w.zeros) : uint16_t{0};
    const auto number = [&](uint16_t half) { return w.scale_dtype == kFloat16 ? to_float(Float16{}, half) : to_float(BFloat16{}, half); };
    return {number(scale), zeros ? number(zero) : middle};
  }
  __device__ __forceinline__ float number(uint32_t codes, int i, const RowGrid& grid) const {
    if constexpr (kKind == Kind::kTable) return load(w.codebook + (i ? codes >> 16 : codes & 0xffffu)) * grid.scale;
    if constexpr (kKind == Kind::kInteger) return (float_of(codes, i) - grid.zero) * grid.scale;
    return to_float(Float16{}, static_cast<uint16_t>(e4m3_numbers(Float16{}, codes << 8) >> (16 * i))) * grid.scale;
  }
};

// ---- kernel ----

template <class Row, class T>
__global__ void __launch_bounds__(kUnpackThreads) unpack_kernel(const UnpackParams p) {
  unpack_slab<Row, T>(p, Slab(p));
}

// ---- launcher ----

template <int kBits, Kind kKind = Kind::kInteger>
const char* launch_kind(const UnpackParams& p, cudaStream_t stream) {
  return for_dtype(p.y_dtype, [&](auto number) {
    return launch(unpack_kernel<Row<kBits, kKind>, decltype(number)>, slabs_of(p), kUnpackThreads, 0, stream, p);
  });
}

}  // namespace

const char* launch_unpack(const UnpackParams& params, cudaStream_t stream) {
  if (params.rows == 0) return nullptr;
  UnpackParams p = params;
  p.group_magic = group_magic(p.weight);
  return of_kind(p.weight, launch_kind<2>, launch_kind<3>, launch_kind<4>, launch_kind<8>, launch_kind<4, Kind::kTable>,
                 launch_kind<8, Kind::kE4m3>)(p, stream);
}

}  // namespace hfq
