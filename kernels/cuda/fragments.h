// Layout "fragments": the codes of a weight in the order in which tensor cores take them.
//
// W is the A operand of mma.m16n8k16, 16 rows by 16 columns, x the B operand, up to 8 tokens. A sum over k may be taken in any order, so
// the columns of W stand where they are convenient, and those of x with them. A tile has 16 rows of W, a unit 32 columns, two instructions:
//
//   lane 4g + t of a unit holds rows g and g + 8 of the columns 8t .. 8t+7 of the unit, so its part of x is one 16-byte load
//     instruction j, columns 8t + 4j + {0, 1} of row g: a[0], of row g + 8: a[1]; columns 8t + 4j + {2, 3}: a[2], a[3]
//
// (Format "spqr" has groups of 16 columns and another order of columns in the same registers: spqr_linear_kernel.h.)
//
// Groups are multiples of a unit; the scale of each multiplies the float32 sums of its units. A block has as many units as fill one
// 16-byte load of each lane (3 bits: 24 bytes); a lane's registers are numbered r = 8 unit + 4 j + 2 (row >= 8) + (column % 4 >= 2):
//
//   bits  block      words of a lane
//   2     16 x 128   word r / 8  has register r at bits 2 (r % 8) of either half: its first column in the lower half
//   3     16 x 128   word r / 5  has register r at bits 3 (r % 5), r < 30; register 30 + i has bit b of its codes in bit 15 of word 3i + b
//   4     16 x 64    word r / 4  has register r at bits 4 (r % 4)
//   8     16 x 32    word r / 2  has register r in the bytes 2 (r % 2) and 2 (r % 2) + 1: also the A operand of the int8 mma.m16n8k32
//
//   memory  words 0 .. 3 of lane 0, of lane 1, ... (512 bytes); 3 bits: then words 4, 5 of lane 0, of lane 1, ... (256 bytes)
//
// A shift, a mask and an addition of an exponent make numbers out of the codes of a register; most need no shift of their own. Numbers are
// code - 2^(bits-1), which is exact in 16 bits, or the values of E4M3, which are, too. 3 bits in five fields and a spare bit take 86 instructions
// for 64 codes of a lane; planes of 2 + 1 bits took more than 110.
//
// Or codes are bfloat16 numbers where they lie ("plain"): one whose upper bits are zeros is the integer of its 8 lower bits, in units of 2^-133, the
// smallest subnormal number, through exponents 0 and 1. So a mask, which leaves a field of that byte, makes code 2^place units, and 64 codes of 4
// bits take 40 instructions in place of 56 and 32 more. What is left to do is a factor for each operand, which goes into scales, and 2^(bits-1) for
// each activation. Tensor cores take subnormal numbers as they are (A100: Fasi, Higham, Mikaitis, Pranesh, Numerical behavior of NVIDIA tensor
// cores, 2021, section 3.2), but do not normalize them (MMA-Sim, arXiv 2511.10909, of Hopper): an instruction cuts all products, and what they are
// added to, at 2^-25 of the largest exponent, that of 128 units. It is as if codes were 128 + code. (Of float16 it would be 1024 units.)
#pragma once

#include <type_traits>

#include "e4m3.h"
#include "target.h"
#include "weight.h"

namespace hfq {

// ---- 16-bit floats at compile time ----

template <class T>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kMantissa = 7, kBias = 127;
};
template <>
struct Format<Float16> {
  static constexpr int kMantissa = 10, kBias = 15;
};

template <class T>
constexpr uint32_t bits_of(double number) {
  const uint32_t sign = number < 0 ? 0x8000u : 0u;
  double fraction = number < 0 ? -number : number;
  int exponent = 0;
  while (fraction >= 2) fraction /= 2, ++exponent;
  while (fraction < 1) fraction *= 2, --exponent;
  const uint32_t mantissa = static_cast<uint32_t>((fraction - 1) * (1 << Format<T>::kMantissa));
  return sign | static_cast<uint32_t>(exponent + Format<T>::kBias) << Format<T>::kMantissa | mantissa;
}

// The bits of kNumber / 2^kShift, which the format has exactly, in both halves.
template <class T, int kNumber, int kShift = 0>
constexpr uint32_t kBoth = bits_of<T>(1.0 * kNumber / (1 << kShift)) * 0x10001u;

constexpr float two_to(int exponent) { return exponent == 0 ? 1 : exponent < 0 ? two_to(exponent + 1) / 2 : two_to(exponent - 1) * 2; }

// The bits of 2^kExponent, a normal number, in both halves.
template <class T, int kExponent>
constexpr uint32_t kBothPowers = (static_cast<uint32_t>(kExponent + Format<T>::kBias) << Format<T>::kMantissa) * 0x10001u;

// ---- codes to numbers ----

// The codes at bit kAt of either half of a word, as code - 2^(bits-1). With the exponent of 2^mantissa the mantissa counts in ones: a field
// at bit p below its end gives 2^mantissa + code 2^p, and one multiply-add, exact, the number. Fields that lie there together share a shift.
template <class T, int kBits, int kAt>
__device__ __forceinline__ uint32_t field_numbers(uint32_t word) {
  constexpr int kMantissa = Format<T>::kMantissa, kSpan = kMantissa / kBits * kBits;
  constexpr int kShift = kAt / kSpan * kSpan, kPlace = kAt - kShift;
  constexpr uint32_t kMask = 0x00010001u * (((1u << kBits) - 1) << kPlace);
  constexpr int kOffset = (1 << (kMantissa - kPlace)) + (1 << (kBits - 1));
  return fma2(T{}, and_or<kMask>(word >> kShift, kBoth<T, 1 << kMantissa>), kBoth<T, 1, kPlace>, kBoth<T, -kOffset>);
}

// Two 8-bit codes in the lower bytes of the halves, as code - 128.
__device__ __forceinline__ uint32_t byte_numbers(BFloat16, uint32_t bytes) {
  // 7 bits of mantissa: the code without its upper bit is 128 + that; the upper bit chooses between - 128 and - 256.
  const uint32_t lower = and_or<0x007f007fu>(bytes, kBoth<BFloat16, 128>);
  const uint32_t offset = (bytes & 0x00800080u) ^ kBoth<BFloat16, -256>;
  return fma2(BFloat16{}, lower, kBoth<BFloat16, 1>, offset);
}
__device__ __forceinline__ uint32_t byte_numbers(Float16, uint32_t bytes) {
  return fma2(Float16{}, bytes | kBoth<Float16, 1024>, kBoth<Float16, 1>, kBoth<Float16, -1152>);
}

// What a lane holds of a block, as it is loaded. `kE4m3`: codes are those of E4M3 and not of integers.
template <int kBits, bool kE4m3 = false>
struct Codes {
  static constexpr int kCodeBits = kBits, kWords = kBits == 3 ? 6 : 4;
  static constexpr int kUnits = kBlockColumns<kBits> / kUnitColumns;
  uint32_t words[kWords];

  // From shared memory. `first`: where the lane's first words of a block are, 16 lane bytes behind its beginning.
  __device__ __forceinline__ void take(uint32_t first, int lane) {
    const uint4 v = load_shared<uint4>(first);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    if constexpr (kBits == 3) {
      const uint2 u = load_shared<uint2>(first + 512 - 8 * lane);
      words[4] = u.x, words[5] = u.y;
    }
  }

  // 8 bits: the codes of register r in the lower bytes of the halves.
  template <int r>
  __device__ __forceinline__ uint32_t low_bytes() const {
    return permute_bytes(words[r / 2], 0, r % 2 ? 0x4342u : 0x4140u);
  }

  // Register r as two numbers.
  template <class T, int r>
  __device__ __forceinline__ uint32_t numbers() const {
    if constexpr (kE4m3) {
      return e4m3_numbers(T{}, permute_bytes(words[r / 2], 0, r % 2 ? 0x3424u : 0x1404u));
    } else if constexpr (kBits == 8) {
      return byte_numbers(T{}, low_bytes<r>());
    } else if constexpr (kBits == 3) {
      if constexpr (r < 30) {
        return field_numbers<T, 3, 3 * (r % 5)>(words[r / 5]);
      } else {
        constexpr int w = 3 * (r - 30);
        const uint32_t code = ((words[w] >> 15) & 0x00010001u) | ((words[w + 1] >> 14) & 0x00020002u) | ((words[w + 2] >> 13) & 0x00040004u);
        return field_numbers<T, 3, 0>(code);
      }
    } else {
      constexpr int kFields = 16 / kBits;
      return field_numbers<T, kBits, kBits * (r % kFields)>(words[r / kFields]);
    }
  }
};

// ---- from a block to the operands of mma ----

// Activations are raised by 2^kRaise before they meet plain codes, so that products are normal float32: those below 2^64 stay finite, and what is
// below 2^-80 vanishes. Scales take back 2^-kPlainUnit, the unit of what is summed up.
constexpr int kRaise = 64, kPlainUnit = 133 - kRaise;

// Codes that are numbers by themselves. `a[j]` is the A operand of instruction j of a unit.
template <int kBits, bool kE4m3 = false>
struct IntCodes : Codes<kBits, kE4m3> {
  static constexpr bool kTable = false, kMayHaveZeros = !kE4m3;
  template <class T>
  static constexpr bool kPlain = kBits != 3 && !kE4m3 && std::is_same<T, BFloat16>::value;

  // Codes as numbers where they lie. Even registers of the unit are instruction 0's and odd ones instruction 1's, so that each has one place: code
  // 2^(j kOddPlace) units, and for rows g + 8 2^kLowerPlace times that. The B operand of instruction j is b[0][j] and b[1][j].
  template <class T>
  static constexpr int kOddPlace = kPlain<T> ? kBits % 8 : 0;
  template <class T>
  static constexpr int kLowerPlace = kPlain<T> && kBits == 2 ? 4 : 0;
  template <int kUnit>
  __device__ __forceinline__ void plain_unit(uint32_t (&a)[2][4]) const {
    constexpr int r = 8 * kUnit;
    a[0][0] = plain<r>(), a[0][1] = plain<r + 2>(), a[0][2] = plain<r + 4>(), a[0][3] = plain<r + 6>();
    a[1][0] = plain<r + 1>(), a[1][1] = plain<r + 3>(), a[1][2] = plain<r + 5>(), a[1][3] = plain<r + 7>();
  }

  // Numbers times 2^-kDown, for who has a place to take that back: plain bfloat16 becomes a number by one multiply-add. (The largest power of two,
  // 2^127, makes 2^-6 of the unit, 2^-133.)
  template <class T>
  static constexpr int kDown = kPlain<T> ? 6 : 0;

  template <class T, int kUnit, bool kIsDown = false>
  __device__ __forceinline__ void unit(uint32_t, uint32_t (&a)[2][4]) const {
    constexpr int r = 8 * kUnit;
    a[0][0] = number<T, r, kIsDown>(), a[0][2] = number<T, r + 1, kIsDown>();
    a[0][1] = number<T, r + 2, kIsDown>(), a[0][3] = number<T, r + 3, kIsDown>();
    a[1][0] = number<T, r + 4, kIsDown>(), a[1][2] = number<T, r + 5, kIsDown>();
    a[1][1] = number<T, r + 6, kIsDown>(), a[1][3] = number<T, r + 7, kIsDown>();
  }

  // From the order of `activations` to that of the columns.
  static __device__ __forceinline__ void order(uint32_t (&)[2][4]) {}

  // The B operands of a unit from the 8 activations of its lane.
  static __device__ __forceinline__ void activations(const uint4& x, uint32_t (&b)[2][2]) {
    b[0][0] = x.x, b[0][1] = x.y, b[1][0] = x.z, b[1][1] = x.w;
  }

 private:
  // Register r.
  template <int r>
  __device__ __forceinline__ uint32_t plain() const {
    static_assert(kPlain<BFloat16>);
    if constexpr (kBits == 8)
      return this->template low_bytes<r>();
    else
      return (this->words[kBits * r / 16] >> kBits * r % 16 / 8 * 8) & (((1u << kBits) - 1) << kBits * r % 8) * 0x10001u;
  }
  template <class T, int r, bool kIsDown>
  __device__ __forceinline__ uint32_t number() const {
    if constexpr (kIsDown && kPlain<T>)
      return fma2(T{}, plain<r>(), kBothPowers<T, 127 - kBits * r % 8>, kBoth<T, -(1 << (kBits - 1)), kDown<T>>);
    else
      return this->template numbers<T, r>();
  }
};

using E4m3Codes = IntCodes<8, true>;

// 4-bit codes of a codebook, looked up two at a time: a byte of a word has two codes of one row, columns 0 and 2 or 1 and 3 of four, whose
// values stand side by side in a table of 256 pairs in shared memory. Each lane has a table of its own bank, so that 32 look-ups take
// one cycle: the place of a byte's pair (a product of bytes: one instruction) and the load for two codes, where permutations of bytes in registers
// would take six.
struct TableCodes : Codes<4> {
  static constexpr bool kTable = true, kMayHaveZeros = false;
  template <class T>
  static constexpr bool kPlain = false;
  template <class T>
  static constexpr int kOddPlace = 0;
  template <class T>
  static constexpr int kLowerPlace = 0;
  template <class T>
  static constexpr int kDown = 0;
  static constexpr int kTableBytes = 256 * 32 * 4;

  // `table`: of the lane.
  template <class T, int kUnit, bool kIsDown = false>
  __device__ __forceinline__ void unit(uint32_t table, uint32_t (&a)[2][4]) const {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) a[j][i] = load_shared<uint32_t>(multiply_bytes(words[2 * kUnit + j], 128u << 8 * i, table));
  }

  static __device__ __forceinline__ void order(uint32_t (&a)[2][4]) {
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t even = a[j][i], odd = a[j][i + 2];
        a[j][i] = permute_bytes(even, odd, 0x5410), a[j][i + 2] = permute_bytes(even, odd, 0x7632);
      }
  }

  static __device__ __forceinline__ void activations(const uint4& x, uint32_t (&b)[2][2]) {
    b[0][0] = permute_bytes(x.x, x.y, 0x5410), b[0][1] = permute_bytes(x.x, x.y, 0x7632);
    b[1][0] = permute_bytes(x.z, x.w, 0x5410), b[1][1] = permute_bytes(x.z, x.w, 0x7632);
  }

  // Fills the table, by all threads of the block; to be followed by a barrier.
  template <class T>
  static __device__ __forceinline__ void fill(uint8_t* table, const float* codebook) {
    for (uint32_t byte = threadIdx.x; byte < 256; byte += blockDim.x) {
      const uint32_t low = from_float(T{}, hfq::load(codebook + byte % 16)), high = from_float(T{}, hfq::load(codebook + byte / 16));
      const uint32_t pair = high << 16 | low;
      // Neighbouring threads begin at other banks.
      for (uint32_t i = 0; i < 8; ++i)
        *reinterpret_cast<uint4*>(table + 128 * byte + 16 * ((i + byte) % 8)) = make_uint4(pair, pair, pair, pair);
    }
  }
};

// ---- scales and zero points ----

// Those of rows g and g + 8 in one group, as they are loaded: 16-bit floats are both in `first`.
struct RawPair {
  uint32_t first, second;
};

struct Pair {
  float low, high;  // of rows g, g + 8
};

// Bytes of a pair.
__host__ __device__ __forceinline__ uint32_t pair_bytes(DType dtype) { return dtype == kFloat32 ? 8 : 4; }

// From shared memory.
__device__ __forceinline__ RawPair load_pair(uint32_t pair, DType dtype) {
  if (dtype == kFloat32) {
    const uint2 v = load_shared<uint2>(pair);
    return {v.x, v.y};
  }
  return {load_shared<uint32_t>(pair), 0};
}

// From global memory, for load_pair.
__device__ __forceinline__ void copy_pair(uint32_t shared, const uint8_t* pair, DType dtype) {
  if (dtype == kFloat32)
    cp_async<8>(shared, pair);
  else
    cp_async<4>(shared, pair);
}

template <int kCount>
__device__ __forceinline__ void to_floats(const RawPair (&raw)[kCount], DType dtype, Pair (&pairs)[kCount]) {
  if (dtype == kBFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = {as_float(raw[i].first << 16), as_float(raw[i].first & 0xffff0000u)};
  } else if (dtype == kFloat16) {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      pairs[i] = {to_float(Float16{}, static_cast<uint16_t>(raw[i].first)), to_float(Float16{}, static_cast<uint16_t>(raw[i].first >> 16))};
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) pairs[i] = {as_float(raw[i].first), as_float(raw[i].second)};
  }
}

__device__ __forceinline__ Pair to_floats(RawPair raw, DType dtype) {
  const RawPair one[1] = {raw};
  Pair pair[1];
  to_floats(one, dtype, pair);
  return pair[0];
}

// From shared memory, as floats.
__device__ __forceinline__ Pair load_floats(uint32_t pair, DType dtype) { return to_floats(load_pair(pair, dtype), dtype); }

// One number of a tensor of any dtype.
__device__ __forceinline__ float load_float(const void* numbers, int64_t at, DType dtype) {
  if (dtype == kFloat32) return load(static_cast<const float*>(numbers) + at);
  const uint16_t v = load(static_cast<const uint16_t*>(numbers) + at);
  return dtype == kFloat16 ? to_float(Float16{}, v) : to_float(BFloat16{}, v);
}

}  // namespace hfq
