// CUDA on the CPU, for tests: what kernels/cuda/ptx.h and launch.h declare, computed as NVIDIA documents it (PTX ISA 8). Kernels are compiled
// by a C++ compiler with -DHFQ_CUDA_ON_CPU -I of this folder.
//
// A thread of a block is a fiber (fibers.h). Threads run one after the other until they wait for others, in an order that changes from
// block to block, and shared memory starts as NaN: what is read before a barrier made it visible is wrong, or differs between runs. Global
// memory is what the test has named (`allow`); all else is an error, as are misaligned accesses and threads that wait forever. Blocks of a
// cluster run together. What goes on beside the threads, copies and wgmma, ends as late as waits allow, and wgmma may not see a change of what it
// reads after it has begun. What nothing orders is found as well, whatever came of it, where kernels are compiled for it (races.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
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
  cuda_on_cpu::check_global(p, sizeof(V), cuda_on_cpu::Way::kConstantLoad);
  return *p;
}
template <class V>
V load_streaming(const V* p) {
  return load(p);
}
template <class V>
V load_written(const V* p) {
  cuda_on_cpu::check_global(p, sizeof(V), cuda_on_cpu::Way::kLoad);
  return *p;
}
template <class V>
void store(V* p, const V& v) {
  cuda_on_cpu::check_global(p, sizeof(V), cuda_on_cpu::Way::kStore);
  *p = v;
}

inline uint8_t* shared_memory() { return cuda_on_cpu::shared_memory(); }

inline uint8_t* swizzled_memory() { return cuda_on_cpu::shared_memory(); }
inline uint32_t shared_address(const void* shared) { return cuda_on_cpu::shared_address(shared); }
template <class V>
V load_shared(uint32_t at) {
  V v;
  const uint8_t* const from = cuda_on_cpu::at_shared_address(at, sizeof(V));
  cuda_on_cpu::accessed(from, sizeof(V), false);
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V>
void store_shared(uint32_t at, const V& v) {
  cuda_on_cpu::store_shared(at, &v, sizeof(V));
}

template <int kBytes = 16>
void cp_async(uint32_t shared, const void* global) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  cuda_on_cpu::check_global(global, kBytes, cuda_on_cpu::Way::kLoad);
  cuda_on_cpu::copy_later(cuda_on_cpu::at_shared_address(shared, kBytes), global, kBytes);
}
template <int kBytes = 16>
void cp_async_or_zero(uint32_t shared, const void* global, bool exists) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (exists) cuda_on_cpu::check_global(global, kBytes, cuda_on_cpu::Way::kLoad);
  cuda_on_cpu::copy_later(cuda_on_cpu::at_shared_address(shared, kBytes), exists ? global : nullptr, kBytes);
}
inline void cp_async_commit() { cuda_on_cpu::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  cuda_on_cpu::finish_copies(kPending);
}

// Kernels run one after the other, but those that may start early are told where they come too soon.
inline void let_next_kernel_start() {}
inline void wait_for_previous_kernel() { cuda_on_cpu::wait_for_previous_kernel(); }

// ---- threads ----

inline void sync_block() { cuda_on_cpu::sync_block(); }
inline void sync_warp() {
  int nothing = 0;
  cuda_on_cpu::together("sync_warp", &nothing, [](void**) { cuda_on_cpu::order_warp(); });
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
inline uint32_t largest_of_warp(uint32_t v) {
  struct Operands {
    uint32_t v, result;
  } mine = {v, 0};
  cuda_on_cpu::together("largest_of_warp", &mine, [](void** all) {
    uint32_t largest = 0;
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t v = static_cast<Operands*>(all[lane])->v;
      if (v > largest) largest = v;
    }
    for (int lane = 0; lane < 32; ++lane) static_cast<Operands*>(all[lane])->result = largest;
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

// ---- barriers in shared memory ----

inline void mbarrier_init(uint32_t barrier, uint32_t count) { cuda_on_cpu::mbarrier_init(barrier, count); }
inline void mbarrier_arrive(uint32_t barrier) { cuda_on_cpu::mbarrier_arrive(barrier); }
inline void mbarrier_arrive_after_copies(uint32_t barrier) { cuda_on_cpu::mbarrier_arrive_after_copies(barrier); }
inline void mbarrier_arrive_and_expect(uint32_t barrier, uint32_t bytes) { cuda_on_cpu::mbarrier_arrive_and_expect(barrier, bytes); }
inline void check_bulk(uint32_t shared, const void* global, uint32_t bytes) {
  if (shared % 16 || reinterpret_cast<uintptr_t>(global) % 16 || bytes % 16) cuda_on_cpu::fail("misaligned copy_bulk");
  cuda_on_cpu::check_range(global, bytes);
}
inline void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  check_bulk(shared, global, bytes);
  cuda_on_cpu::copy_bulk(shared, global, bytes, barrier);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t bit) { cuda_on_cpu::mbarrier_wait(barrier, bit); }

// ---- thread blocks of one launch that are no cluster ----

inline void raise_flag(uint64_t* flag, uint64_t tag) {
  cuda_on_cpu::check_global(flag, 8, cuda_on_cpu::Way::kStore);
  cuda_on_cpu::raise_flag(flag, tag);
}
inline void wait_for_flag(const uint64_t* flag, uint64_t tag) {
  cuda_on_cpu::check_global(flag, 8, cuda_on_cpu::Way::kLoad);
  cuda_on_cpu::wait_for_flag(flag, tag);
}
inline void lower_flag(uint64_t* flag) {
  cuda_on_cpu::check_global(flag, 8, cuda_on_cpu::Way::kStore);
  cuda_on_cpu::lower_flag(flag);
}

// ---- numbers ----

template <uint32_t kMask>
uint32_t and_or(uint32_t word, uint32_t bits) {
  return (word & kMask) | bits;
}
template <uint32_t kMask>
uint32_t and_xor(uint32_t word, uint32_t bits) {
  return (word & kMask) ^ bits;
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
  const uint32_t exponent = v >> 10 & 31, mantissa = v & 1023;
  float f = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-24f : as_float((exponent + 112) << 23 | mantissa << 13);
  if (exponent == 31) f = mantissa ? NAN : INFINITY;
  return v & 0x8000 ? -f : f;
}

// E4M3 of the Open Compute Project: 4 bits of exponent, counted from 7, and 3 of mantissa; no infinities.
inline float e4m3_to_float(uint8_t v) {
  const uint32_t exponent = v >> 3 & 15, mantissa = v & 7;
  float f = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f : as_float((exponent + 120) << 23 | mantissa << 20);
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

template <class T>
uint32_t from_floats(T t, float low, float high) {
  return from_float(t, low) | static_cast<uint32_t>(from_float(t, high)) << 16;
}

inline bool converts_e4m3() { return cuda_on_cpu::compute_capability >= 89; }
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

inline uint32_t multiply_bytes(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 0xff) * (b >> i & 0xff);
  return sum;
}
inline uint32_t upper_half(uint32_t word) { return word >> 16; }
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) d |= static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * i & 7)) & 0xff) << 8 * i;
  return d;
}
inline uint32_t permute_bytes_or_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d = permute_bytes(a, b, selector);
  for (int i = 0; i < 4; ++i)
    if (selector >> 4 * i & 8) d = (d & ~(0xffu << 8 * i)) | (d >> (8 * i + 7) & 1) * 0xffu << 8 * i;
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
        if (lane % 4 == 0) cuda_on_cpu::accessed(from, 16, false);
        std::memcpy(&static_cast<Operands*>(all[lane])->v[matrix], static_cast<const uint8_t*>(from) + 4 * (lane % 4), 4);
      }
  });
}

// ---- wgmma ----

inline void fence_proxy_async() { cuda_on_cpu::fence_proxy_async(); }
inline void fence_proxy_async_global() { cuda_on_cpu::fence_proxy_async_global(); }
template <int kRegisters>
void take_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
template <int kRegisters>
void give_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256);
}
inline void wgmma_fence() {
  int nothing = 0;
  cuda_on_cpu::together("wgmma.fence", &nothing, [](void**) { cuda_on_cpu::fence_registers(); });
}
inline void wgmma_commit() {
  int nothing = 0;
  cuda_on_cpu::together("wgmma.commit_group", &nothing, [](void**) { cuda_on_cpu::commit_later(); });
}
template <int kPending>
void wgmma_wait() {
  int nothing = 0;
  cuda_on_cpu::together("wgmma.wait_group", &nothing, [](void**) { cuda_on_cpu::finish_later(kPending); });
}
template <int kPending, int n>
void wgmma_wait(float (&)[n]) {
  wgmma_wait<kPending>();
}

// The second operand, [n][16 along k], of a descriptor: PTX ISA, "Shared Memory Matrix Layout" and "Matrix Descriptor Format". Without
// transposition its rows of k lie in 8 x 16 bytes ("core matrices"). With a swizzle, 8 rows of 32, 64 or 128 bytes follow each other, eight of them
// `stride` bytes from the next eight, and bits 4 .. 6 of an address are changed by bits 7 .. 9 of the same. Without one, core matrices
// are `leading` bytes apart along k and `stride` bytes along n.
inline std::vector<uint16_t> second_operand(uint64_t descriptor, unsigned columns, bool starts) {
  const auto bits = [&](int from, int count) { return static_cast<uint32_t>(descriptor >> from & ((1u << count) - 1)); };
  const uint32_t start = bits(0, 14) << 4, leading = bits(16, 14) << 4, stride = bits(32, 14) << 4, base = bits(49, 3), mode = bits(62, 2);
  constexpr uint64_t kFields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (descriptor & ~kFields) cuda_on_cpu::fail("bits between the fields of a descriptor");
  const uint32_t row_bytes = mode == 1 ? 128 : mode == 2 ? 64 : mode == 3 ? 32 : 16;
  // Where the pattern begins at a multiple of 8 rows, as it must for a base of 0, the matrix begins in its first row.
  if (mode && (base || (start & (8 * row_bytes - 1)) >= row_bytes)) cuda_on_cpu::fail("a swizzled matrix that does not begin with its pattern");
  std::vector<uint16_t> b(16 * columns);
  for (unsigned n = 0; n < columns; ++n)
    for (unsigned half = 0; half < 2; ++half) {  // along k, 16 bytes each: what a swizzle leaves together
      uint32_t address = start + n / 8 * stride + n % 8 * row_bytes + half * (mode ? 16 : leading);
      address ^= (address >> 7 & (row_bytes / 16 - 1)) << 4;
      if (starts) cuda_on_cpu::read_by_wgmma(address, 16);
      std::memcpy(&b[16 * n + 8 * half], cuda_on_cpu::at_shared_address(address, 16), 16);
      if (cuda_on_cpu::unfenced(address, 16)) cuda_on_cpu::fail("wgmma reads what no fence.proxy.async covers");
    }
  return b;
}

// What a warp has of d += a b while it goes on. d shows NaN until it is waited for.
struct WgmmaOperands {
  float* d[32];
  const uint32_t* a[32];
  std::vector<float> sums[32];
};
// Those that go on, each to be continued by the next one with the same sums.
inline std::vector<std::shared_ptr<WgmmaOperands>> going_on;

// PTX ISA, "Register Fragments for wgmma.mma_async.m64nNk16". What it reads must be the same when it is started and when it is waited for.
template <class T, int n>
void wgmma(T, float (&d)[n], const uint32_t (&a)[4], uint64_t descriptor, bool adds) {
  struct Operands {
    float* d;
    const uint32_t* a;
    uint64_t descriptor;
    bool adds;
  } mine = {d, a, descriptor, adds};
  cuda_on_cpu::together("wgmma", &mine, [](void** all) {
    const Operands first = *static_cast<Operands*>(all[0]);
    const auto own = std::make_shared<WgmmaOperands>();
    std::vector<uint32_t> registers;
    for (int lane = 0; lane < 32; ++lane) {
      const Operands& o = *static_cast<Operands*>(all[lane]);
      if (o.descriptor != first.descriptor || o.adds != first.adds) cuda_on_cpu::fail("lanes have different descriptors");
      own->d[lane] = o.d, own->a[lane] = o.a;
      own->sums[lane].assign(o.d, o.d + n);
      registers.insert(registers.end(), o.a, o.a + 4);
    }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < n; ++i) own->d[lane][i] = NAN;
    const std::vector<uint16_t> b = second_operand(first.descriptor, 2 * n, true);
    going_on.push_back(own);
    cuda_on_cpu::start_later(first.descriptor ^ n << 15 ^ (first.adds ? 1ull << 30 : 0), [=] {
      if (second_operand(first.descriptor, 2 * n, false) != b) cuda_on_cpu::fail("shared memory changes while wgmma reads it");
      for (int lane = 0; lane < 32; ++lane)
        if (std::memcmp(own->a[lane], &registers[4 * lane], 16) != 0) cuda_on_cpu::fail("registers change while wgmma reads them");
      double rows[16][16];
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < 8; ++i) {
          const uint16_t half = static_cast<uint16_t>(own->a[lane][i / 2] >> 16 * (i % 2));
          rows[lane / 4 + i / 2 % 2 * 8][2 * (lane % 4) + i % 2 + i / 4 * 8] = to_float(T{}, half);
        }
      std::vector<double> columns;
      for (const uint16_t half : b) columns.push_back(to_float(T{}, half));
      going_on.erase(std::find(going_on.begin(), going_on.end(), own));
      const auto next = std::find_if(going_on.begin(), going_on.end(), [&](const auto& other) { return other->d[0] == own->d[0]; });
      for (int lane = 0; lane < 32; ++lane)
        for (int i = 0; i < n; ++i) {
          const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + 2 * (lane % 4) + i % 2;
          double sum = first.adds ? own->sums[lane][i] : 0.0f;
          for (int k = 0; k < 16; ++k) sum += rows[row][k] * columns[column * 16 + k];
          (next == going_on.end() ? own->d[lane][i] : (*next)->sums[lane][i]) = static_cast<float>(sum);
        }
    });
  });
}

// ---- clusters ----

inline void sync_cluster_only() { cuda_on_cpu::sync_cluster(); }
inline void push_to_block(uint32_t shared, const float4& v, uint32_t barrier, uint32_t rank) {
  cuda_on_cpu::push_to_block(shared, &v, sizeof v, barrier, rank);
}
inline void mbarrier_wait_for_pushed(uint32_t barrier, uint32_t bit) { cuda_on_cpu::mbarrier_wait(barrier, bit); }
inline void mbarrier_arrive_of_block(uint32_t barrier, uint32_t rank) { cuda_on_cpu::mbarrier_arrive_of_block(barrier, rank); }
inline void copy_bulk_to_blocks(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint32_t blocks) {
  check_bulk(shared, global, bytes);
  cuda_on_cpu::copy_bulk_to_blocks(shared, global, bytes, barrier, blocks);
}
inline void fence_mbarrier_init() { cuda_on_cpu::fence_mbarrier_init(); }

// ---- launch ----

template <class Params>
const char* launch(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t, const Params& params) {
  return cuda_on_cpu::run_blocks(blocks, 1, threads, shared_bytes, false, [&] { kernel(params); });
}

template <class Params>
const char* launch_clusters(void (*kernel)(Params), unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes, cudaStream_t,
                            const Params& params) {
  going_on.clear();
  return cuda_on_cpu::run_blocks(blocks, cluster, threads, shared_bytes, true, [&] { kernel(params); });
}

struct KernelFacts {
  int registers;
};
template <class Params>
KernelFacts facts_of(void (*)(Params)) {
  return {255};
}

template <class Params, void (*kKernel)(Params)>
int active_clusters(int cluster, unsigned, size_t shared_bytes, int) {
  return shared_bytes > cuda_on_cpu::most_shared_bytes ? 0 : cuda_on_cpu::multiprocessors / cluster;
}

template <class Params>
const char* launch_early(void (*kernel)(Params), unsigned blocks, unsigned threads, size_t shared_bytes, cudaStream_t stream, const Params& params) {
  return launch_clusters(kernel, blocks, 1, threads, shared_bytes, stream, params);
}

inline const char* launch_copy(void* to, const void* from, size_t bytes, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return nullptr;
}

inline size_t most_shared_bytes() { return cuda_on_cpu::most_shared_bytes; }
inline int compute_capability() { return cuda_on_cpu::compute_capability; }
inline int multiprocessors() { return cuda_on_cpu::multiprocessors; }

}  // namespace hfq
