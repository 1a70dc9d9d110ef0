// A thread block rounds a token to int8 or E4M3. The token stays in registers between the search for its largest magnitude and the rounding, so it is
// read once: 2 bytes of each number (4 in float32) and 1 to write is all the traffic there is.
#include "tokens.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kHeld = 8;  // loads that a thread keeps: up to 16384 numbers of 16 bits; what is behind is read again, from L2

// ---- kernel ----

template <class Code, class T>
__global__ void __launch_bounds__(kThreads) quantize_kernel(const TokensParams p) {
  using Words = decltype(codes_of(Code{}, T{}, uint4{}, 0.0f));
  uint32_t* largest_of_warps = reinterpret_cast<uint32_t*>(shared_memory());  // [kWarps]
  const int64_t token = blockIdx.x;
  const uint32_t loads = static_cast<uint32_t>(p.in_features / kPerLoad<T>);
  const uint4* x = static_cast<const uint4*>(p.x) + token * loads;
  Words* codes = reinterpret_cast<Words*>(p.codes) + token * loads;

  let_next_kernel_start();
  wait_for_previous_kernel();
  uint4 held[kHeld];
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const uint32_t at = i * kThreads + threadIdx.x;
    held[i] = make_uint4(0, 0, 0, 0);
    if (at < loads) held[i] = load_written(x + at);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) bits = larger(bits, largest(T{}, held[i]));
  for (uint32_t at = kHeld * kThreads + threadIdx.x; at < loads; at += kThreads) bits = larger(bits, largest(T{}, load_written(x + at)));

  bits = largest_of_warp(bits);
  if (threadIdx.x % 32 == 0) largest_of_warps[threadIdx.x / 32] = bits;
  sync_block();
#pragma unroll
  for (int w = 0; w < kWarps; ++w) bits = larger(bits, largest_of_warps[w]);
  const Rounding rounding = rounding_of<Code>(bits, p.input_scale);
  if (threadIdx.x == 0) store(p.scales + token, rounding.scale);

#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const uint32_t at = i * kThreads + threadIdx.x;
    if (at < loads) store(codes + at, codes_of(Code{}, T{}, held[i], rounding.inverse));
  }
  for (uint32_t at = kHeld * kThreads + threadIdx.x; at < loads; at += kThreads)
    store(codes + at, codes_of(Code{}, T{}, load_written(x + at), rounding.inverse));
}

// ---- launcher ----

template <class Code>
const char* launch_kind(const TokensParams& p, cudaStream_t stream) {
  const auto kernel = p.x_dtype == kFloat32   ? quantize_kernel<Code, Float32>
                      : p.x_dtype == kFloat16 ? quantize_kernel<Code, Float16>
                                              : quantize_kernel<Code, BFloat16>;
  return launch_early(kernel, static_cast<unsigned>(p.tokens), kThreads, kWarps * sizeof(uint32_t), stream, p);
}

}  // namespace

const char* launch_quantize_tokens(const TokensParams& p, cudaStream_t stream) {
  if (p.tokens == 0) return nullptr;
  return p.code_type == kE4M3Codes ? launch_kind<E4M3>(p, stream) : launch_kind<Int8>(p, stream);
}

}  // namespace hfq
