// CUDA on the CPU, for tests: what kernels/cuda/ptx.h and launch.h declare, computed as NVIDIA documents it (PTX ISA 8). Kernels are compiled
// by a C++ compiler with -DHFQ_CUDA_ON_CPU -I of this folder.
//
// A thread of a block is a fiber (fibers.h). Threads run one after the other until they wait for others, in an order that changes from
// block to block, and shared memory starts as NaN: what is read before a barrier made it visible is wrong, or differs between runs. Global
// memory is what the test has named (`allow`); all else is an error, as are misaligned accesses and threads that wait forever.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#define threadIdx (cuda_on_cpu::thread_index())
#define blockIdx (cuda_on_cpu::block_index())
#define blockDim (cuda_on_cpu::block_size())

namespace hfq {

struct BFloat16 {};
struct Float16 {};

// ---- memory ----

template <class V>
V load(const V* p) {
  cuda_on_cpu::check_global(p, sizeof(V), false);
  return *p;
}
template <class V>
V load_streaming(const V* p) {
  return load(p);
}
template <class V>
V load_written(const V* p) {
  return load(p);
}
template <class V>
void store(V* p, const V& v) {
  cuda_on_cpu::check_global(p, sizeof(V), true);
  *p = v;
}

inline uint8_t* shared_memory() { return cuda_on_cpu::shared_memory(); }

inline uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(shared) - cuda_on_cpu::shared_memory());
}
template <class V>
V load_shared(uint32_t at) {
  const uint8_t* from = cuda_on_cpu::shared_memory() + at;
  cuda_on_cpu::check_shared(from, sizeof(V));
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <int kBytes = 16>
void cp_async(void* shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_on_cpu::check_global(global, kBytes, false);
  cuda_on_cpu::copy_later(shared, global, kBytes);
}
template <int kBytes = 16>
void cp_async(uint32_t shared, const void* global) {
  cp_async<kBytes>(cuda_on_cpu::shared_memory() + shared, global);
}
template <int kBytes = 16>
void cp_async_or_zero(uint32_t shared, const void* global, bool exists) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (exists) cuda_on_cpu::check_global(global, kBytes, false);
  cuda_on_cpu::copy_later(cuda_on_cpu::shared_memory() + shared, exists ? global : nullptr, kBytes);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  cuda_on_cpu::finish_copies(kPending);
}

inline void prefetch(const void* global, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) cuda_on_cpu::fail("misaligned prefetch");
  cuda_on_cpu::check_range(global, bytes);
}

// Kernels run one after the other.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() {}

// ---- threads ----

inline void sync_block() { cuda_on_cpu::sync_block(); }
inline void sync_warp() {
  int nothing = 0;
  cuda_on_cpu::together("sync_warp", &nothing, [](void**) {});
}
inline uint32_t shuffle_xor(uint32_t v, int lanes) {
  struct Operands {
    uint32_t v, result;
    int lanes;
  } mine = {v, 0, lanes};
  cuda_on_cpu::together("shuffle_xor", &mine, [](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      Operands& own = *static_cast<Operands*>(all[lane]);
      own.result = static_cast<Operands*>(all[lane ^ own.lanes])->v;
    }
  });
  return mine.result;
}
inline uint32_t shuffle_from(uint32_t v, int lane) {
  struct Operands {
    uint32_t v, result;
    int lane;
  } mine = {v, 0, lane};
  cuda_on_cpu::together("shuffle_from", &mine, [](void** all) {
    for (int lane = 0; lane < 32; ++lane) {
      Operands& own = *static_cast<Operands*>(all[lane]);
      own.result = static_cast<Operands*>(all[own.lane])->v;
    }
  });
  return mine.result;
}
inline int first_lane(bool is) {
  struct Operands {
    bool is;
    int result;
  } mine = {is, 0};
  cuda_on_cpu::together("first_lane", &mine, [](void** all) {
    int first = 0;
    while (first < 32 && !static_cast<Operands*>(all[first])->is) ++first;
    if (first == 32) cuda_on_cpu::fail("no lane is the first one");
    for (int lane = 0; lane < 32; ++lane) static_cast<Operands*>(all[lane])->result = first;
  });
  return mine.result;
}

// ---- numbers ----

template <uint32_t kMask>
uint32_t and_or(uint32_t word, uint32_t bits) {
  return (word & kMask) | bits;
}
template <class V>
V kept(V v) {
  return v;
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// The test compiles without contraction.
inline float add(float a, float b) { return a + b; }
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }

inline float reciprocal_root(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float exponential(float a) { return std::exp(a); }
inline float hyperbolic_tangent(float a) { return std::tanh(a); }
inline float smaller(float a, float b) { return std::fmin(a, b); }
inline float larger(float a, float b) { return std::fmax(a, b); }

inline int32_t to_int(float f) {
  if (std::isnan(f)) return 0;
  const double whole = std::nearbyint(static_cast<double>(f));
  return static_cast<int32_t>(std::fmin(std::fmax(whole, -2147483648.0), 2147483647.0));
}
inline float from_int(int32_t i) { return static_cast<float>(i); }

inline float to_float(BFloat16, uint16_t v) { return as_float(static_cast<uint32_t>(v) << 16); }
inline float to_float(Float16, uint16_t v) {
  const int exponent = v >> 10 & 31;
  const float mantissa = static_cast<float>(v & 1023);
  float f = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
  if (exponent == 31) f = mantissa ? NAN : INFINITY;
  return v & 0x8000 ? -f : f;
}

// E4M3 of the Open Compute Project: 4 bits of exponent, counted from 7, and 3 of mantissa; no infinities.
inline float e4m3_to_float(uint8_t v) {
  const int exponent = v >> 3 & 15, mantissa = v & 7;
  float f = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(mantissa + 8), exponent - 10);
  if ((v & 0x7f) == 0x7f) f = NAN;
  return v & 0x80 ? -f : f;
}

// To nearest, ties to even; by the grid on which the result lies.
template <int kMantissa, int kLeast>
float rounded(double f) {
  if (f == 0 || !std::isfinite(f)) return static_cast<float>(f);
  int exponent;
  std::frexp(f, &exponent);
  const int step = (exponent - 1 < kLeast ? kLeast : exponent - 1) - kMantissa;
  return static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(f, -step)), step));
}
inline uint16_t from_double(BFloat16, double f) {
  if (std::isnan(f)) return 0x7fff;
  return static_cast<uint16_t>(as_bits(rounded<7, -126>(f)) >> 16);
}
inline uint16_t from_double(Float16, double f) {
  if (std::isnan(f)) return 0x7fff;
  const float r = rounded<10, -14>(f), magnitude = std::fabs(r);
  const uint16_t sign = std::signbit(f) ? 0x8000 : 0;
  if (magnitude > 65504.0f) return sign | 0x7c00;
  if (magnitude < std::ldexp(1.0f, -14)) return sign | static_cast<uint16_t>(std::ldexp(magnitude, 24));
  int exponent;
  const float fraction = std::frexp(magnitude, &exponent);  // 0.5 .. 1
  return sign | static_cast<uint16_t>((exponent + 14) << 10 | (static_cast<int>(std::ldexp(fraction, 11)) & 1023));
}
template <class T>
uint16_t from_float(T t, float f) {
  return from_double(t, f);
}

constexpr bool kConvertsE4M3 = true;
inline uint2 halves_of_e4m3(uint32_t codes) {
  uint32_t halves[2] = {};
  for (int i = 0; i < 4; ++i)
    halves[i / 2] |= static_cast<uint32_t>(from_double(Float16{}, e4m3_to_float(static_cast<uint8_t>(codes >> 8 * i)))) << 16 * (i % 2);
  return {halves[0], halves[1]};
}

template <class T>
uint32_t fma2(T t, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d = 0;
  for (int i = 0; i < 32; i += 16) {
    const auto half = [i, t](uint32_t v) -> double { return to_float(t, static_cast<uint16_t>(v >> i)); };
    d |= static_cast<uint32_t>(from_double(t, half(a) * half(b) + half(c))) << i;
  }
  return d;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return d;
}
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32); }

// ---- tensor cores ----

// PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type". Sums are exact until they are rounded to float32 once.
template <class T>
void mma(T, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {d, a, {b0, b1}};
  cuda_on_cpu::together("mma", &mine, [](void** all) {
    double a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *static_cast<Operands*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 8; ++i) {
        const uint16_t half = static_cast<uint16_t>(o.a[i / 2] >> 16 * (i % 2));
        a[g + (i / 2 % 2) * 8][2 * t + i % 2 + (i / 4) * 8] = to_float(T{}, half);
      }
      for (int i = 0; i < 4; ++i) b[2 * t + i % 2 + (i / 2) * 8][g] = to_float(T{}, static_cast<uint16_t>(o.b[i / 2] >> 16 * (i % 2)));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *static_cast<Operands*>(all[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = 2 * (lane % 4) + i % 2;
        double sum = o.d[i];
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        o.d[i] = static_cast<float>(sum);
      }
    }
  });
}

// PTX ISA, "Matrix Fragments for mma.m16n8k32", integers. Sums wrap.
inline void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Operands {
    int32_t* d;
    const uint32_t* a;
    uint32_t b[2];
  } mine = {d, a, {b0, b1}};
  cuda_on_cpu::together("mma of bytes", &mine, [](void** all) {
    int8_t a[16][32], b[32][8];
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *static_cast<Operands*>(all[lane]);
      const int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 16; ++i) {
        const int row = i < 4 || (i >= 8 && i < 12) ? g : g + 8, column = 4 * t + i % 4 + (i < 8 ? 0 : 16);
        a[row][column] = static_cast<int8_t>(o.a[i / 4] >> 8 * (i % 4));
      }
      for (int i = 0; i < 8; ++i) b[4 * t + i % 4 + (i < 4 ? 0 : 16)][g] = static_cast<int8_t>(o.b[i / 4] >> 8 * (i % 4));
    }
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *static_cast<Operands*>(all[lane]);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + (i < 2 ? 0 : 8), column = 2 * (lane % 4) + i % 2;
        uint32_t sum = static_cast<uint32_t>(o.d[i]);
        for (int k = 0; k < 32; ++k) sum += static_cast<uint32_t>(a[row][k] * b[k][column]);
        o.d[i] = static_cast<int32_t>(sum);
      }
    }
  });
}

inline void ldmatrix(uint32_t (&v)[4], const void* row) {
  struct Operands {
    uint32_t* v;
    const void* row;
  } mine = {v, row};
  cuda_on_cpu::together("ldmatrix", &mine, [](void** all) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix) {
        const void* from = static_cast<Operands*>(all[8 * matrix + lane / 4])->row;
        cuda_on_cpu::check_shared(from, 16);
        std::memcpy(&static_cast<Operands*>(all[lane])->v[matrix], static_cast<const uint8_t*>(from) + 4 * (lane % 4), 4);
      }
  });
}

// ---- launch ----

template <class Params>
const char* launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t, const Params& params) {
  return cuda_on_cpu::run_blocks(blocks, threads, shared_bytes, [&] { kernel(params); });
}

template <class Params>
const char* launch_early(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  return launch(kernel, blocks, threads, shared_bytes, stream, params);
}

inline const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

inline size_t most_shared_bytes() { return cuda_on_cpu::most_shared_bytes; }
inline int multiprocessors() { return cuda_on_cpu::multiprocessors; }

}  // namespace hfq
