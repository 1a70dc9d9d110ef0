// Runs of neighbouring numbers of a float dtype: 16 bytes, or one number where rows do not begin at multiples of 16 bytes.
#pragma once

#include <initializer_list>
#include <type_traits>

#include "fragments.h"

namespace hfq {

struct Float32 {};

// Numbers in 16 bytes.
template <class T>
constexpr int kPerLoad = std::is_same_v<T, Float32> ? 4 : 8;

template <class T>
__device__ __forceinline__ void to_floats(T, const uint4& v, float (&f)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    f[2 * i] = to_float(T{}, static_cast<uint16_t>(words[i]));
    f[2 * i + 1] = to_float(T{}, static_cast<uint16_t>(words[i] >> 16));
  }
}
__device__ __forceinline__ void to_floats(Float32, const uint4& v, float (&f)[4]) {
  f[0] = as_float(v.x), f[1] = as_float(v.y), f[2] = as_float(v.z), f[3] = as_float(v.w);
}

__device__ __forceinline__ float to_float(Float32, uint32_t bits) { return as_float(bits); }
__device__ __forceinline__ uint32_t from_float(Float32, float f) { return as_bits(f); }

template <class T>
using Bits = std::conditional_t<std::is_same_v<T, Float32>, uint32_t, uint16_t>;

// As the dtype has it.
template <class T>
__device__ __forceinline__ float rounded(T, float f) {
  return to_float(T{}, from_float(T{}, f));
}

template <class T, int kCount>
__device__ __forceinline__ void load_piece(T, const Bits<T>* from, float (&f)[kCount]) {
  static_assert(kCount == 1 || kCount == kPerLoad<T>);
  if constexpr (kCount == 1)
    f[0] = to_float(T{}, load_written(from));
  else
    to_floats(T{}, load_written(reinterpret_cast<const uint4*>(from)), f);
}

// One number, or 4 or 8 at a multiple of 16 bytes (4 of 16 bits: of 8).
template <class T, int kCount>
__device__ __forceinline__ void store_piece(T, Bits<T>* to, const float (&f)[kCount]) {
  static_assert(kCount == 1 || kCount == 4 || kCount == 8);
  if constexpr (kCount == 1) {
    store(to, from_float(T{}, f[0]));
  } else if constexpr (std::is_same_v<T, Float32>) {
#pragma unroll
    for (int i = 0; i < kCount; i += 4) store(reinterpret_cast<float4*>(to + i), make_float4(f[i], f[i + 1], f[i + 2], f[i + 3]));
  } else {
    uint32_t words[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) words[i] = from_float(T{}, f[2 * i]) | static_cast<uint32_t>(from_float(T{}, f[2 * i + 1])) << 16;
    if constexpr (kCount == 8)
      store(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
    else
      store(reinterpret_cast<uint2*>(to), make_uint2(words[0], words[1]));
  }
}

// Whether rows of `columns` numbers that begin at these addresses, and are these strides apart, fall into pieces of 16 bytes.
template <class T>
bool in_pieces(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> counts) {
  for (const void* address : addresses)
    if (reinterpret_cast<uintptr_t>(address) % 16) return false;
  for (const int64_t count : counts)
    if (count % kPerLoad<T>) return false;
  return true;
}

// `launch_for(T{})`.
template <class Launch>
const char* for_dtype(DType dtype, const Launch& launch_for) {
  if (dtype == kFloat32) return launch_for(Float32{});
  return dtype == kFloat16 ? launch_for(Float16{}) : launch_for(BFloat16{});
}

}  // namespace hfq
