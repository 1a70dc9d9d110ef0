// Norms, rotary embeddings and gates of a few tokens: some thousand numbers each, so that the time is that of a launch and of two or three
// dependent loads. Each takes the place of 3 to 10 launches. Roundings are those of hfq/kernels/decode.py.
#include "decode.h"

#include "pieces.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;

// ---- norms: a thread block for each row ----

constexpr int kHeld = 4;           // pieces that a thread keeps between both passes; what is behind is read again
constexpr int kMostNormWarps = 16;

__device__ __forceinline__ float sum_of_warp(float f) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) f += as_float(shuffle_xor(as_bits(f), lanes));
  return f;
}

template <class T, int kPiece>
__global__ void __launch_bounds__(32 * kMostNormWarps, 1) norm_kernel(const NormParams p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  float* of_warps = reinterpret_cast<float*>(shared_memory());
  const Bits<T>* x = static_cast<const Bits<T>*>(p.x) + blockIdx.x * p.columns;
  const Bits<T>* weight = static_cast<const Bits<T>*>(p.weight);
  Bits<T>* y = static_cast<Bits<T>*>(p.y) + blockIdx.x * p.columns;
  const int64_t pieces = p.columns / kPiece;

  float held[kHeld][kPiece], sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = i * blockDim.x + threadIdx.x;
    if (at < pieces) load_piece(T{}, x + at * kPiece, held[i]);
  }
  const auto add = [&](const float (&f)[kPiece]) {
#pragma unroll
    for (int c = 0; c < kPiece; ++c) sum += f[c] * f[c];
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i)
    if (i * blockDim.x + threadIdx.x < pieces) add(held[i]);
  for (int64_t at = kHeld * blockDim.x + threadIdx.x; at < pieces; at += blockDim.x) {
    float f[kPiece];
    load_piece(T{}, x + at * kPiece, f);
    add(f);
  }

  sum = sum_of_warp(sum);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = sum;
  sync_block();
  sum = 0.0f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += of_warps[w];
  const float inverse = reciprocal_root(hfq::add(divide(sum, static_cast<float>(p.columns)), p.eps));

  const auto finish = [&](float (&f)[kPiece], int64_t at) {
    float gain[kPiece];
    load_piece(T{}, weight + at * kPiece, gain);
#pragma unroll
    for (int c = 0; c < kPiece; ++c) {
      const float normed = multiply(f[c], inverse);
      f[c] = multiply(p.round_first ? rounded(T{}, normed) : normed, hfq::add(gain[c], p.offset));
    }
    store_piece(T{}, y + at * kPiece, f);
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = i * blockDim.x + threadIdx.x;
    if (at < pieces) finish(held[i], at);
  }
  for (int64_t at = kHeld * blockDim.x + threadIdx.x; at < pieces; at += blockDim.x) {
    float f[kPiece];
    load_piece(T{}, x + at * kPiece, f);
    finish(f, at);
  }
}

// ---- rotary embeddings: a thread for each pair of numbers ----

struct RotateBoth {
  RotateParams q, k;
};

template <class T>
__global__ void __launch_bounds__(kThreads) rotate_kernel(const RotateBoth both) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t half = both.q.size / 2, heads = both.q.heads + both.k.heads;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= both.q.tokens * heads * half) return;
  const int64_t i = at % half, token = at / half / heads;
  int64_t head = at / half % heads;
  const bool is_q = head < both.q.heads;
  if (!is_q) head -= both.q.heads;
  const RotateParams& p = is_q ? both.q : both.k;

  const Bits<T>* x = static_cast<const Bits<T>*>(p.x) + token * p.x_stride + head * p.size;
  const int64_t angle = p.shared ? 0 : token * p.size;
  const auto number = [](const void* numbers, int64_t n) { return to_float(T{}, load_written(static_cast<const Bits<T>*>(numbers) + n)); };
  const float first = to_float(T{}, load_written(x + i)), second = to_float(T{}, load_written(x + i + half));
  // Each product is rounded, and so is their sum.
  const auto turned = [&](float f, float other, int64_t n) {
    return from_float(T{}, hfq::add(rounded(T{}, multiply(f, number(p.cos, n))), rounded(T{}, multiply(other, number(p.sin, n)))));
  };
  Bits<T>* y = static_cast<Bits<T>*>(p.y) + (token * p.heads + head) * p.size;
  store(y + i, turned(first, -second, angle + i));
  store(y + i + half, turned(second, first, angle + i + half));
}

// ---- gates: a thread for each piece ----

template <class T>
__device__ __forceinline__ float gated(T, float gate, float up, bool tanh_gelu) {
  float f;
  if (tanh_gelu) {
    constexpr float kRoot = 0.7978845608028654f;  // sqrt(2 / pi)
    f = 0.5f * gate * (1.0f + hyperbolic_tangent(kRoot * (gate + 0.044715f * gate * gate * gate)));
  } else {
    f = divide(gate, 1.0f + exponential(-gate));
  }
  return multiply(rounded(T{}, f), up);
}

template <class T, int kPiece>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateParams p) {
  let_next_kernel_start();
  wait_for_previous_kernel();
  const int64_t pieces = p.columns / kPiece, at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= p.rows * pieces) return;
  const int64_t row = at / pieces, column = at % pieces * kPiece;
  float gate[kPiece], up[kPiece];
  load_piece(T{}, static_cast<const Bits<T>*>(p.gate) + row * p.gate_stride + column, gate);
  load_piece(T{}, static_cast<const Bits<T>*>(p.up) + row * p.up_stride + column, up);
#pragma unroll
  for (int c = 0; c < kPiece; ++c) gate[c] = gated(T{}, gate[c], up[c], p.tanh_gelu);
  store_piece(T{}, static_cast<Bits<T>*>(p.y) + row * p.columns + column, gate);
}

// ---- launchers ----

unsigned blocks_of(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }

template <class T>
const char* launch_norm_of(const NormParams& p, cudaStream_t stream) {
  const bool whole = in_pieces<T>({p.x, p.weight, p.y}, {p.columns});
  const int64_t pieces = whole ? p.columns / kPerLoad<T> : p.columns;
  const int64_t warps = pieces < 32 * kMostNormWarps ? (pieces + 31) / 32 : kMostNormWarps;
  const auto kernel = whole ? norm_kernel<T, kPerLoad<T>> : norm_kernel<T, 1>;
  return launch_early(kernel, static_cast<unsigned>(p.rows), static_cast<unsigned>(32 * warps), kMostNormWarps * sizeof(float), stream, p);
}

template <class T>
const char* launch_gate_of(const GateParams& p, cudaStream_t stream) {
  const bool whole = in_pieces<T>({p.gate, p.up, p.y}, {p.columns, p.gate_stride, p.up_stride});
  const auto kernel = whole ? gate_kernel<T, kPerLoad<T>> : gate_kernel<T, 1>;
  return launch_early(kernel, blocks_of(p.rows * (whole ? p.columns / kPerLoad<T> : p.columns)), kThreads, 0, stream, p);
}

}  // namespace

const char* launch_rms_norm(const NormParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  if (p.dtype == kFloat32) return launch_norm_of<Float32>(p, stream);
  return p.dtype == kFloat16 ? launch_norm_of<Float16>(p, stream) : launch_norm_of<BFloat16>(p, stream);
}

const char* launch_rotate(const RotateParams& q, const RotateParams& k, cudaStream_t stream) {
  const int64_t pairs = q.tokens * (q.heads + k.heads) * (q.size / 2);
  if (pairs == 0) return nullptr;
  const auto kernel = q.dtype == kFloat32 ? rotate_kernel<Float32> : q.dtype == kFloat16 ? rotate_kernel<Float16> : rotate_kernel<BFloat16>;
  return launch_early(kernel, blocks_of(pairs), kThreads, 0, stream, RotateBoth{q, k});
}

const char* launch_gate(const GateParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.columns == 0) return nullptr;
  if (p.dtype == kFloat32) return launch_gate_of<Float32>(p, stream);
  return p.dtype == kFloat16 ? launch_gate_of<Float16>(p, stream) : launch_gate_of<BFloat16>(p, stream);
}

}  // namespace hfq
