// One thread computes 8 neighbouring weights of a row: 8 codes of `bits` bits are exactly `bits` bytes and begin on a byte boundary, for
// every width from 1 to 8. The kernel is bound by the writes (2 or 4 bytes per weight against at most 1 read).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "dequantize.h"

namespace hfq {
namespace {

constexpr int kPerThread = 8;
constexpr int kThreads = 256;

// ---- primitives ----

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

__device__ inline void convert(float v, float& out) { out = v; }
__device__ inline void convert(float v, __half& out) { out = __float2half_rn(v); }
__device__ inline void convert(float v, __nv_bfloat16& out) { out = __float2bfloat16_rn(v); }

// The 8 codes from byte `at`; bytes beyond the row's end count as zero. One aligned load where the width and the row allow it.
__device__ inline uint64_t load_codes(const uint8_t* row, int64_t at, int64_t row_bytes, int bits) {
  const uint8_t* p = row + at;
  if (bits == 4 && at + 4 <= row_bytes && (reinterpret_cast<uintptr_t>(p) & 3) == 0) return *reinterpret_cast<const uint32_t*>(p);
  if (bits == 8 && at + 8 <= row_bytes && (reinterpret_cast<uintptr_t>(p) & 7) == 0) return *reinterpret_cast<const uint64_t*>(p);
  uint64_t codes = 0;
  for (int i = 0; i < bits; ++i)
    if (at + i < row_bytes) codes |= static_cast<uint64_t>(p[i]) << (8 * i);
  return codes;
}

template <typename Y>
struct alignas(sizeof(Y) * kPerThread > 16 ? 16 : sizeof(Y) * kPerThread) Values {
  Y v[kPerThread];
};

// ---- kernel ----

// grid: x over groups of 8 columns, y over rows (strided)
template <typename S, typename Y>
__global__ void __launch_bounds__(kThreads) dequantize_kernel(const DequantizeParams p) {
  const int64_t k = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kPerThread;
  if (k >= p.in_features) return;
  const uint64_t mask = (1u << p.bits) - 1u;
  const unsigned group_size = static_cast<unsigned>(p.group_size);  // 32 bits: a 64-bit division costs several times more
  const float constant_zero = static_cast<float>(1 << (p.bits - 1));
  for (int64_t n = blockIdx.y; n < p.rows; n += gridDim.y) {
    uint64_t codes = load_codes(p.qweight + n * p.row_bytes, k / kPerThread * p.bits, p.row_bytes, p.bits);
    const S* scales = static_cast<const S*>(p.scales) + n * p.groups;
    const S* zeros = p.zeros ? static_cast<const S*>(p.zeros) + n * p.groups : nullptr;
    Values<Y> out;
    int group = -1;
    bool first = true;
    float scale = 0.0f, zero = constant_zero;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      if (k + i < p.in_features) {
        const int g = p.g_idx ? p.g_idx[k + i] : static_cast<int>((static_cast<unsigned>(k) + i) / group_size);
        if (first || g != group) {
          group = g;
          first = false;
          // A group number outside the weight must not become a wild read: it gives NaN, as a damaged file should.
          const bool valid = g >= 0 && g < p.groups;
          scale = valid ? to_float(scales[g]) : __int_as_float(0x7fc00000);
          if (zeros) zero = valid ? to_float(zeros[g]) : 0.0f;
        }
        const int code = static_cast<int>(codes & mask);
        const float value = p.codebook ? p.codebook[code] : static_cast<float>(code) - zero;
        convert(value * scale, out.v[i]);
      }
      codes >>= p.bits;
    }
    Y* y = static_cast<Y*>(p.y) + n * p.in_features + k;
    if (k + kPerThread <= p.in_features && (reinterpret_cast<uintptr_t>(y) & (alignof(Values<Y>) - 1)) == 0) {
      *reinterpret_cast<Values<Y>*>(y) = out;
    } else {
      for (int i = 0; i < kPerThread && k + i < p.in_features; ++i) y[i] = out.v[i];
    }
  }
}

// ---- launcher ----

template <typename S, typename Y>
void launch(const DequantizeParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t columns = (p.in_features + kPerThread - 1) / kPerThread;
  const dim3 grid(static_cast<unsigned>((columns + kThreads - 1) / kThreads), static_cast<unsigned>(p.rows < kMaxGridY ? p.rows : kMaxGridY));
  dequantize_kernel<S, Y><<<grid, kThreads, 0, stream>>>(p);
}

template <typename S>
void launch_to(const DequantizeParams& p, cudaStream_t stream) {
  if (p.y_dtype == kFloat32)
    launch<S, float>(p, stream);
  else if (p.y_dtype == kFloat16)
    launch<S, __half>(p, stream);
  else
    launch<S, __nv_bfloat16>(p, stream);
}

}  // namespace

const char* launch_dequantize(const DequantizeParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.in_features == 0) return nullptr;
  if (p.scale_dtype == kFloat32)
    launch_to<float>(p, stream);
  else if (p.scale_dtype == kFloat16)
    launch_to<__half>(p, stream);
  else
    launch_to<__nv_bfloat16>(p, stream);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace hfq
