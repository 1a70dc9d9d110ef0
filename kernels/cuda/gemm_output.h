// The end of a product: float32 sums of four neighbouring rows become outputs.
#pragma once

#include "fragments.h"
#include "gemm.h"

namespace hfq {

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// And what is added to four rows of a product besides.
__device__ __forceinline__ float4 plus_extra(const GemmParams& p, int64_t at, const float4& sum) {
  return p.extra ? plus(sum, load(reinterpret_cast<const float4*>(p.extra + at))) : sum;
}

// Outputs n .. n+3 (those that exist; n is a multiple of 4) of token m.
template <class T>
__device__ __forceinline__ void store_rows(const LinearParams& p, int64_t m, int64_t n, const float4& sum) {
  const int64_t rows = p.weight.out_features;
  uint16_t* y = static_cast<uint16_t*>(p.y) + m * rows + n;
  float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  if (p.bias) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (n + i < rows) sums[i] += load_float(p.bias, n + i, p.bias_dtype);
  }
  uint16_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = from_float(T{}, sums[i]);
  if (rows % 4 == 0 && n < rows) {
    store(reinterpret_cast<uint2*>(y), uint2{v[0] | static_cast<uint32_t>(v[1]) << 16, v[2] | static_cast<uint32_t>(v[3]) << 16});
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (n + i < rows) store(y + i, v[i]);
}

}  // namespace hfq
