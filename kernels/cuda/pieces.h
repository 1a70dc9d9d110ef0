// Runs of neighbouring numbers of a float dtype: 16 bytes, or one number where rows do not begin at multiples of 16 bytes.
#pragma once

#include "tokens.h"

namespace hfq {

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

template <class T, int kCount>
__device__ __forceinline__ void store_piece(T, Bits<T>* to, const float (&f)[kCount]) {
  if constexpr (kCount == 1) {
    store(to, from_float(T{}, f[0]));
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kCount == 4)
        words[i] = from_float(T{}, f[i]);
      else
        words[i] = from_float(T{}, f[2 * i]) | static_cast<uint32_t>(from_float(T{}, f[2 * i + 1])) << 16;
    }
    store(reinterpret_cast<uint4*>(to), make_uint4(words[0], words[1], words[2], words[3]));
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

}  // namespace hfq
