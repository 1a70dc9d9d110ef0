// The range of each group of a weight, the codes of its weights on a grid, and those packed: hfq/core/affine.py and bits.py to the bit.
//
// The first two read a weight once in its own dtype, a warp the numbers of a group, a thread 8 neighbours that are rounded; one at a time where rows
// do not begin at multiples of 16 bytes or groups do not end with eights.
#include "packing.h"
#include "pieces.h"

namespace hfq {
namespace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kEight = 8;

// ---- primitives ----

// NaN stays, whatever it meets.
__device__ __forceinline__ float lower(float a, float b) { return b < a || b != b ? b : a; }
__device__ __forceinline__ float higher(float a, float b) { return b > a || b != b ? b : a; }

// 0 where the reciprocal overflows.
__device__ __forceinline__ float inverse_of(float scale) {
  const float inverse = divide(1.0f, scale);
  return (as_bits(inverse) & 0x7f800000u) == 0x7f800000u ? 0.0f : inverse;
}

template <class T, int kCount>
__device__ __forceinline__ void load_numbers(T, const Bits<T>* from, float (&f)[kCount]) {
  constexpr int kAtOnce = kCount == 1 ? 1 : kPerLoad<T>;
#pragma unroll
  for (int i = 0; i < kCount; i += kAtOnce) {
    float piece[kAtOnce];
    load_piece(T{}, from + i, piece);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) f[i + j] = piece[j];
  }
}

// ---- kernels ----

template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) group_range_kernel(const GroupRangeParams p) {
  const uint32_t lane = threadIdx.x % 32;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (at >= p.rows * p.groups) return;
  const int64_t row = at / p.groups, first = at % p.groups * p.group_size;
  const int64_t size = p.columns - first < p.group_size ? p.columns - first : p.group_size;
  const Bits<T>* const from = static_cast<const Bits<T>*>(p.weight) + row * p.columns + first;
  float low = as_float(0x7f800000u), high = -low;
#pragma unroll 4
  for (int64_t i = kCount * lane; i < size; i += 32 * kCount) {
    float v[kCount];
    load_numbers(T{}, from + i, v);
#pragma unroll
    for (int j = 0; j < kCount; ++j) low = lower(low, v[j]), high = higher(high, v[j]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    low = lower(low, as_float(shuffle_xor(as_bits(low), lanes)));
    high = higher(high, as_float(shuffle_xor(as_bits(high), lanes)));
  }
  if (lane != 0) return;
  store(p.low + at, low);
  store(p.high + at, high);
}

template <class T, bool kTable, int kCount>
__global__ void __launch_bounds__(kThreads) nearest_codes_kernel(const NearestCodesParams p) {
  constexpr int kPoints = 16;
  constexpr int64_t kColumns = kCount * kThreads;
  const uint32_t slabs = static_cast<uint32_t>((p.columns + kColumns - 1) / kColumns);
  const int64_t row = blockIdx.x / slabs, column = blockIdx.x % slabs * kColumns + threadIdx.x * kCount;
  if (column >= p.columns) return;
  const int64_t at = row * p.columns + column, group = row * p.groups + static_cast<uint32_t>(column) / static_cast<uint32_t>(p.group_size);
  float v[kCount];
  load_numbers(T{}, static_cast<const Bits<T>*>(p.weight) + at, v);
  const float inverse = inverse_of(load_written(p.scales + group));
  uint32_t codes[2] = {};
  if constexpr (kTable) {
    float boundaries[kPoints - 1];
#pragma unroll
    for (int i = 0; i < kPoints - 1; ++i) boundaries[i] = multiply(add(load_written(p.codebook + i + 1), load_written(p.codebook + i)), 0.5f);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float scaled = multiply(v[i], inverse);
      uint32_t code = 0;
#pragma unroll
      for (int j = 0; j < kPoints - 1; ++j) code += scaled > boundaries[j];
      codes[i / 4] |= code << (8 * (i % 4));
    }
  } else {
    const float zero = p.zeros ? load_written(p.zeros + group) : static_cast<float>(1 << (p.bits - 1));
    const float most = static_cast<float>((1 << p.bits) - 1);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      // Both ends are whole numbers, so that it is no matter what comes first, they or the rounding: to the next even place of 2^23.
      const float inside = smaller(larger(add(multiply(v[i], inverse), zero), 0.0f), most);
      codes[i / 4] |= (as_bits(add(inside, 8388608.0f)) & 0xffu) << (8 * (i % 4));
    }
  }
  if constexpr (kCount == kEight)
    store(reinterpret_cast<uint2*>(p.codes + at), make_uint2(codes[0], codes[1]));
  else
    store(p.codes + at, static_cast<uint8_t>(codes[0]));
}

__global__ void __launch_bounds__(kThreads) pack_codes_kernel(const PackCodesParams p) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.rows * p.row_bytes) return;
  const int64_t row = at / p.row_bytes, first_bit = at % p.row_bytes * 8;
  uint32_t byte = 0;
  for (int64_t k = first_bit / p.bits; k < p.columns && k * p.bits < first_bit + 8; ++k) {
    const int shift = static_cast<int>(k * p.bits - first_bit);
    const uint32_t code = load_written(p.codes + row * p.columns + k);
    byte |= shift >= 0 ? code << shift : code >> -shift;
  }
  store(p.packed + at, static_cast<uint8_t>(byte));
}

// ---- launchers ----

template <class T, bool kTable, int kCount>
const char* launch_codes(const NearestCodesParams& p, cudaStream_t stream) {
  const int64_t columns = kCount * kThreads, slabs = (p.columns + columns - 1) / columns;
  return launch(nearest_codes_kernel<T, kTable, kCount>, static_cast<unsigned>(p.rows * slabs), kThreads, 0, stream, p);
}

template <class Params>
bool in_eights(const Params& p) {
  const bool whole_groups = p.groups == 1 || p.group_size % kEight == 0;
  return p.columns % kEight == 0 && whole_groups && reinterpret_cast<uintptr_t>(p.weight) % 16 == 0;
}

}  // namespace

const char* launch_group_range(const GroupRangeParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.rows * p.groups + kWarps - 1) / kWarps;
  if (blocks == 0) return nullptr;
  return for_dtype(p.dtype, [&](auto number) {
    using T = decltype(number);
    const auto kernel = in_eights(p) ? group_range_kernel<T, kEight> : group_range_kernel<T, 1>;
    return launch(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  });
}

const char* launch_nearest_codes(const NearestCodesParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  return for_dtype(p.dtype, [&](auto number) {
    using T = decltype(number);
    if (in_eights(p)) return p.codebook ? launch_codes<T, true, kEight>(p, stream) : launch_codes<T, false, kEight>(p, stream);
    return p.codebook ? launch_codes<T, true, 1>(p, stream) : launch_codes<T, false, 1>(p, stream);
  });
}

const char* launch_pack_codes(const PackCodesParams& p, cudaStream_t stream) {
  const int64_t bytes = p.rows * p.row_bytes;
  if (bytes == 0) return nullptr;
  return launch(pack_codes_kernel, static_cast<unsigned>((bytes + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

}  // namespace hfq
