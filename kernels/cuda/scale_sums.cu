// What makes outputs of the matrix library's int32: 4 bytes read and 2 written for each, where PyTorch's own operations, a kernel for each step,
// move 30 to 40. A thread takes 4 neighbouring columns.
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;
constexpr int kChunk = kThreads * kColumns;  // columns of a thread block

// ---- kernel ----

__device__ __forceinline__ float output(const ScaleSumsParams& p, int32_t sum, float token_scale, int64_t n) {
  const float y = scaled_sum(sum, token_scale, load_float(p.scales, n, p.scale_dtype));
  return p.bias ? add(y, load_float(p.bias, n, p.bias_dtype)) : y;
}

template <class T>
__device__ __forceinline__ uint32_t two_halves(float low, float high) {
  return static_cast<uint32_t>(from_float(T{}, high)) << 16 | from_float(T{}, low);
}

__global__ void __launch_bounds__(kThreads) scale_sums_kernel(const ScaleSumsParams p) {
  const uint32_t chunks = static_cast<uint32_t>((p.out_features + kChunk - 1) / kChunk);
  const int64_t m = blockIdx.x / chunks, n = static_cast<int64_t>(blockIdx.x % chunks) * kChunk + threadIdx.x * kColumns;
  if (n >= p.out_features) return;
  const int64_t at = m * p.out_features + n;
  const float token_scale = load(p.token_scales + m);
  if (!p.in_fours) {
    for (int i = 0; i < kColumns && n + i < p.out_features; ++i)
      store_float(p.y, at + i, p.y_dtype, output(p, load(p.sums + at + i), token_scale, n + i));
    return;
  }
  const uint4 sums = load_streaming(reinterpret_cast<const uint4*>(p.sums + at));
  const uint32_t words[kColumns] = {sums.x, sums.y, sums.z, sums.w};
  float y[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) y[i] = output(p, static_cast<int32_t>(words[i]), token_scale, n + i);
  if (p.y_dtype == kFloat32)
    store(reinterpret_cast<float4*>(static_cast<float*>(p.y) + at), make_float4(y[0], y[1], y[2], y[3]));
  else if (p.y_dtype == kFloat16)
    store(reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at), uint2{two_halves<Float16>(y[0], y[1]), two_halves<Float16>(y[2], y[3])});
  else
    store(reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.y) + at), uint2{two_halves<BFloat16>(y[0], y[1]), two_halves<BFloat16>(y[2], y[3])});
}

bool aligned(const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

}  // namespace

// ---- launcher ----

const char* launch_scale_sums(const ScaleSumsParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.out_features == 0) return nullptr;
  ScaleSumsParams p = params;
  p.in_fours = p.out_features % kColumns == 0 && aligned(p.sums, 16) && aligned(p.y, p.y_dtype == kFloat32 ? 16 : 8);
  const int64_t chunks = (p.out_features + kChunk - 1) / kChunk;
  return launch(scale_sums_kernel, static_cast<unsigned>(chunks * p.tokens), kThreads, 0, stream, p);
}

}  // namespace hfq
