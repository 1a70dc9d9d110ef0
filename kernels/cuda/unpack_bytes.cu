// Rows of 8-bit codes, each of which has one scale, as dense numbers. A byte is read and 2 or 4 are written for each weight. A thread takes 8
// neighbours of each of some rows, whose codes are on the way together; one where rows do not begin at multiples of 8 bytes.
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 4;
constexpr int64_t kEight = 8;

// ---- primitives ----

// Byte i of a word. With the exponent of 2^23 the mantissa counts in ones; without its upper bit two's complement counts from -128.
__device__ __forceinline__ float number_of(Int8, uint32_t word, int i) {
  return add(as_float(permute_bytes(word ^ 0x80808080u, 0x4b000000u, 0x7540u | static_cast<uint32_t>(i))), -8388736.0f);
}
__device__ __forceinline__ float number_of(E4M3, uint32_t word, int i) {
  const uint2 halves = halves_by_shifts(word);
  return to_float(Float16{}, static_cast<uint16_t>((i % 2 ? halves.y : halves.x) >> (i / 2 * 16)));
}

template <int kCount>
__device__ __forceinline__ uint2 load_codes(const uint8_t* codes) {
  if constexpr (kCount == kEight) return load_streaming(reinterpret_cast<const uint2*>(codes));
  return make_uint2(load(codes), 0);
}

// ---- kernel ----

template <class Code, class T, int kCount>
__global__ void __launch_bounds__(kThreads) unpack_bytes_kernel(const UnpackBytesParams p) {
  constexpr int64_t kColumns = kCount * kThreads;
  const uint32_t slabs = static_cast<uint32_t>((p.in_features + kColumns - 1) / kColumns);
  const int64_t first = static_cast<int64_t>(blockIdx.x / slabs) * kRows, column = blockIdx.x % slabs * kColumns + threadIdx.x * kCount;
  if (column >= p.in_features) return;
  const int64_t at = first * p.in_features + column;
  uint2 codes[kRows] = {};
#pragma unroll
  for (int i = 0; i < kRows; ++i)
    if (first + i < p.rows) codes[i] = load_codes<kCount>(p.qweight + at + i * p.in_features);
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (first + i >= p.rows) return;
    const float scale = load_float(p.scales, first + i, p.scale_dtype);
    float v[kCount];
#pragma unroll
    for (int j = 0; j < kCount; ++j) v[j] = multiply(number_of(Code{}, j < 4 ? codes[i].x : codes[i].y, j % 4), scale);
    store_piece(T{}, static_cast<Bits<T>*>(p.y) + at + i * p.in_features, v);
  }
}

// ---- launcher ----

template <class Code, int kCount>
const char* launch_count(const UnpackBytesParams& p, cudaStream_t stream) {
  const int64_t columns = kCount * kThreads, slabs = (p.in_features + columns - 1) / columns, blocks = (p.rows + kRows - 1) / kRows * slabs;
  return for_dtype(p.y_dtype, [&](auto number) {
    return launch(unpack_bytes_kernel<Code, decltype(number), kCount>, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
  });
}

template <class Code>
const char* launch_code(const UnpackBytesParams& p, cudaStream_t stream) {
  const bool in_eights = p.in_features % kEight == 0 && reinterpret_cast<uintptr_t>(p.qweight) % kEight == 0;
  return in_eights ? launch_count<Code, kEight>(p, stream) : launch_count<Code, 1>(p, stream);
}

}  // namespace

const char* launch_unpack_bytes(const UnpackBytesParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.in_features == 0) return nullptr;
  return p.code_type == kInt8Codes ? launch_code<Int8>(p, stream) : launch_code<E4M3>(p, stream);
}

}  // namespace hfq
