// The end of a product: float32 sums of four neighbouring rows become outputs.
#pragma once

#include "fragments.h"
#include "linear.h"

namespace hfq {

__device__ __forceinline__ float4 plus(const float4& a, const float4& b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// What `splits` blocks of a cluster have where `own` points to in this one's shared memory, added in their order: four on the way at a time, each
// takes some 200 clocks.
__device__ __forceinline__ float4 sum_of_cluster(const float4* own, uint32_t splits) {
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (uint32_t i = 0; i < splits; i += 4) {
    float4 parts[4];
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) parts[j] = i + j < splits ? load_of_block(own, i + j) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) sum = plus(sum, parts[j]);
  }
  return sum;
}

// Outputs n .. n+3 (those that exist; n is a multiple of 4) of token m.
template <class T>
__device__ __forceinline__ void store_rows(const LinearParams& p, int64_t m, int64_t n, const float4& sum) {
  const int64_t rows = p.weight.out_features;
  uint16_t* y = static_cast<uint16_t*>(p.y) + m * rows + n;
  const float sums[4] = {sum.x, sum.y, sum.z, sum.w};
  uint16_t v[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = from_float(T{}, p.bias && n + i < rows ? sums[i] + load_float(p.bias, n + i, p.bias_dtype) : sums[i]);
  if (rows % 4 == 0 && n < rows) {
    store(reinterpret_cast<uint2*>(y), uint2{v[0] | static_cast<uint32_t>(v[1]) << 16, v[2] | static_cast<uint32_t>(v[3]) << 16});
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (n + i < rows) store(y + i, v[i]);
}

}  // namespace hfq
