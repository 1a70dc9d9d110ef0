// Plain C++ for any architecture (including aarch64); the compiler vectorizes the 16-lane loops for its baseline. Little endian only.
#include "decode.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {
namespace {

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};
struct Line {
  uint32_t v[16];
};
struct Table {
  uint8_t v[16];
};
struct FloatTable {
  float v[16];
};
typedef I SmallSum;
constexpr int kMaxTokens = 2;  // code that few will run: less of it to compile
constexpr int kSpqrTokens = 2;
constexpr int kRowBlocks = 1;

inline F f_set1(float x) {
  F f;
  for (int i = 0; i < 16; ++i) f.v[i] = x;
  return f;
}
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) {
  F f;
  __builtin_memcpy(f.v, p, 64);
  return f;
}
inline void f_store(float* p, F f) { __builtin_memcpy(p, f.v, 64); }
inline F f_mul(F a, F b) {
  for (int i = 0; i < 16; ++i) a.v[i] *= b.v[i];
  return a;
}
inline F f_add(F a, F b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline F f_fma(F a, F b, F c) {
  for (int i = 0; i < 16; ++i) c.v[i] += a.v[i] * b.v[i];
  return c;
}
inline F f_from_i(I a) {
  F f;
  for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(a.v[i]);
  return f;
}
inline I i_set1(int32_t x) {
  I a;
  for (int i = 0; i < 16; ++i) a.v[i] = x;
  return a;
}
inline I i_add(I a, I b) {
  for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
  return a;
}
inline I i_max(I a, I b) {
  for (int i = 0; i < 16; ++i) a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
}
inline void i_store(int32_t* p, I a) { __builtin_memcpy(p, a.v, 64); }
inline I i_magnitude(F f) {
  I a;
  __builtin_memcpy(a.v, f.v, 64);
  for (int i = 0; i < 16; ++i) a.v[i] &= 0x7fffffff;
  return a;
}
inline I i_round_code(F f) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round-to-nearest-even in the low mantissa bits
  for (int i = 0; i < 16; ++i) {
    // NaN compares false.
    const float value = f.v[i] < 127.0f ? f.v[i] : 127.0f;
    f.v[i] = (value > -127.0f ? value : -127.0f) + kRound;
  }
  I a;
  __builtin_memcpy(a.v, f.v, 64);
  for (int i = 0; i < 16; ++i) a.v[i] -= 0x4b400000;
  return a;
}

inline uint32_t float_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

// IEEE binary16. A subnormal is mantissa * 2^-24, which fp32 represents exactly.
inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, mantissa = half & 0x3ffu;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -magnitude : magnitude;
  }
  return bits_float(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

// Nearest even. Below the normal range, adding 0.5 aligns the mantissa so that the addition itself rounds.
inline uint16_t float_to_half(float f) {
  const uint32_t bits = float_bits(f), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and more round to infinity
  if (magnitude < 0x38800000u) return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

inline uint16_t float_to_bfloat16(float f) {
  if (f != f) return 0x7fc0u;
  const uint32_t bits = float_bits(f);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline F f_load_as(const void* p, int64_t i, DType dtype) {
  if (dtype == kFloat32) return f_load(static_cast<const float*>(p) + i);
  const uint16_t* raw = static_cast<const uint16_t*>(p) + i;
  F f;
  for (int j = 0; j < 16; ++j) f.v[j] = dtype == kFloat16 ? half_to_float(raw[j]) : bits_float(static_cast<uint32_t>(raw[j]) << 16);
  return f;
}

inline void f_store_as(void* p, int64_t i, DType dtype, F f) {
  if (dtype == kFloat32) return f_store(static_cast<float*>(p) + i, f);
  uint16_t* out = static_cast<uint16_t*>(p) + i;
  for (int j = 0; j < 16; ++j) out[j] = dtype == kFloat16 ? float_to_half(f.v[j]) : float_to_bfloat16(f.v[j]);
}

template <int bits>
inline void pack_codes(int8_t* out, const int32_t* codes) {
  // 8 columns are four bytes of two nibbles; 16 are four bytes of four pairs of bits.
  constexpr int kRun = bits == 4 ? 8 : bits == 8 ? 4 : 16, kFields = kRun / 4;
  for (int k = 0; k < kSpan; ++k) {
    const int i = k % kRun;
    out[k - i + i % kFields * 4 + i / kFields] = static_cast<int8_t>(codes[k]);
  }
}

inline Line line_load(const uint8_t* p) {
  Line line;
  __builtin_memcpy(line.v, p, 64);
  return line;
}
inline Line low_nibbles(Line a) {
  for (int i = 0; i < 16; ++i) a.v[i] &= 0x0f0f0f0fu;
  return a;
}
inline Line high_nibbles(Line a) {
  for (int i = 0; i < 16; ++i) a.v[i] = (a.v[i] >> 4) & 0x0f0f0f0fu;
  return a;
}

inline Table table_load(const uint8_t* codebook) {
  Table t = {};
  if (codebook) __builtin_memcpy(t.v, codebook, 16);
  return t;
}
inline Line table_lookup(Table t, Line codes) {
  for (int i = 0; i < 16; ++i) {
    const uint32_t c = codes.v[i];
    codes.v[i] = static_cast<uint32_t>(t.v[c & 15u]) | static_cast<uint32_t>(t.v[(c >> 8) & 15u]) << 8 |
                 static_cast<uint32_t>(t.v[(c >> 16) & 15u]) << 16 | static_cast<uint32_t>(t.v[(c >> 24) & 15u]) << 24;
  }
  return codes;
}

inline FloatTable float_table_load(const float* codebook) {
  FloatTable t = {};
  if (codebook) __builtin_memcpy(t.v, codebook, 64);
  return t;
}
template <int i>
inline F table_value(Line words, FloatTable t) {
  F f;
  for (int j = 0; j < 16; ++j) f.v[j] = t.v[(words.v[j] >> (4 * i)) & 15u];
  return f;
}
template <int shift, int bits>
inline F field_value(Line words) {
  F f;
  for (int j = 0; j < 16; ++j) f.v[j] = static_cast<float>(static_cast<int32_t>((words.v[j] >> shift) & ((1u << bits) - 1)));
  return f;
}
template <int i>
inline F byte_value(Line words) {
  return field_value<8 * i, 8>(words);
}

inline I byte_dot(I sum, Line codes, uint32_t x) {
  for (int j = 0; j < 4; ++j) {
    const int32_t xj = static_cast<int8_t>(x >> (8 * j));
    for (int i = 0; i < 16; ++i) {
      // Unsigned: sums over long rows may wrap on their way to a result that fits.
      const uint32_t product = ((codes.v[i] >> (8 * j)) & 255u) * static_cast<uint32_t>(xj);
      sum.v[i] = static_cast<int32_t>(static_cast<uint32_t>(sum.v[i]) + product);
    }
  }
  return sum;
}
inline SmallSum small_begin(I dot) { return dot; }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) { return byte_dot(sum, codes, x); }
inline I small_end(SmallSum sum, I) { return sum; }

// ---- words ----

inline Line line_zero() { return {}; }
inline Line line_or(Line a, Line b) {
  for (int i = 0; i < 16; ++i) a.v[i] |= b.v[i];
  return a;
}
inline Line line_and(Line a, uint32_t mask) {
  for (int i = 0; i < 16; ++i) a.v[i] &= mask;
  return a;
}
inline Line line_right(Line a, int n) {
  for (int i = 0; i < 16; ++i) a.v[i] >>= n;
  return a;
}
inline Line line_left(Line a, int n) {
  for (int i = 0; i < 16; ++i) a.v[i] <<= n;
  return a;
}
template <int n>
inline Line line_right(Line a) { return line_right(a, n); }
template <int n>
inline Line line_left(Line a) { return line_left(a, n); }
inline F f_from_line(Line a) {
  F f;
  for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(static_cast<int32_t>(a.v[i]));
  return f;
}

// ---- E4M3 ----

typedef F Lanes;
typedef Line Part;
struct Pairs {
  Lanes low, high;
};

inline Lanes l_zero() { return f_zero(); }
inline Lanes l_add(Lanes a, Lanes b) { return f_add(a, b); }
inline Lanes l_fma(Lanes a, Lanes b, Lanes c) { return f_fma(a, b, c); }
inline void l_store(float* p, Lanes v) { f_store(p, v); }

// Exponent and mantissa at their places in a float32, and an exponent more that makes it a normal number. What is subnormal as an E4M3 then
// has an implicit bit in front that it should not have, and half the value of its bits: it alone is less than 2^-14, and lessened here.
inline float e4m3_value(uint32_t code) {
  const float normal = bits_float((code & 127u) << 20 | 0x38000000u), subnormal = 2.0f * normal - 6.103515625e-5f;
  return bits_float(float_bits(normal < subnormal ? normal : subnormal) | (code & 128u) << 24);
}
inline Pairs e4m3_pairs(Part words, int first) {
  Pairs p;
  for (int i = 0; i < 16; ++i) {
    const int shift = 8 * first + 16 * (i % 2);
    p.low.v[i] = e4m3_value(words.v[i / 2] >> shift);
    p.high.v[i] = e4m3_value(words.v[8 + i / 2] >> shift);
  }
  return p;
}
inline Pairs e4m3_even(Part words) { return e4m3_pairs(words, 0); }
inline Pairs e4m3_odd(Part words) { return e4m3_pairs(words, 1); }
inline Lanes l_pair(const float* p) {
  Lanes f;
  for (int i = 0; i < 16; ++i) f.v[i] = p[i % 2];
  return f;
}
inline Lanes l_join(Pairs p) {
  Lanes f;
  for (int i = 0; i < 8; ++i) {
    f.v[i] = p.low.v[2 * i] + p.low.v[2 * i + 1];
    f.v[8 + i] = p.high.v[2 * i] + p.high.v[2 * i + 1];
  }
  return f;
}
inline Part part_zero() { return {}; }
inline Part part_load(const uint8_t* p) { return line_load(p); }
inline Part part_larger(Part a, Part codes) {
  uint8_t left[64], right[64];
  __builtin_memcpy(left, a.v, 64);
  __builtin_memcpy(right, codes.v, 64);
  for (int i = 0; i < 64; ++i) {
    const uint8_t magnitude = right[i] | 128u;
    left[i] = left[i] > magnitude ? left[i] : magnitude;
  }
  __builtin_memcpy(a.v, left, 64);
  return a;
}
inline Lanes l_nan_where_full(Part a) {
  Lanes f;
  for (int i = 0; i < 16; ++i) {
    const uint32_t v = a.v[i];
    const bool full = (v & 255u) == 255u || (v >> 8 & 255u) == 255u || (v >> 16 & 255u) == 255u || v >> 24 == 255u;
    f.v[i] = full ? __builtin_nanf("") : 0.0f;
  }
  return f;
}
inline F f_from_e4m3(const uint8_t* p) {
  F f;
  for (int i = 0; i < 16; ++i) f.v[i] = (p[i] & 127) == 127 ? __builtin_nanf("") : e4m3_value(p[i]);
  return f;
}
inline F f_to_e4m3(F f) {
  for (int i = 0; i < 16; ++i) {
    const float below = f.v[i] < kE4m3Most ? f.v[i] : kE4m3Most, v = below > -kE4m3Most ? below : -kE4m3Most;
    const float power = bits_float(float_bits(v) & 0x7f800000u), shift = (power > kE4m3Normal ? power : kE4m3Normal) * kE4m3Shift;
    f.v[i] = (v + shift) - shift;
  }
  return f;
}

// ---- dequantization ----

inline F f_from_bytes(const uint8_t* p) {
  F f;
  for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(static_cast<int32_t>(p[i]));
  return f;
}

inline void transpose_words(uint32_t* out, const uint8_t* lines, int64_t words) {
  for (int64_t w = 0; w < words; ++w)
    for (int64_t r = 0; r < 16; ++r) __builtin_memcpy(out + 16 * r + w, lines + 64 * w + 4 * r, 4);
}

// 8 values of each of `count` words: y[8*w + i] = values[code i of word w].
inline void lookup_words(uint8_t* y, const uint32_t* words, int64_t count, F values, DType dtype) {
  alignas(64) uint8_t table[64];
  f_store_as(table, 0, dtype, values);
  for (int64_t k = 0; k < 8 * count; ++k) {
    const uint32_t code = (words[k / 8] >> (4 * (k % 8))) & 15u;
    if (dtype == kFloat32)
      __builtin_memcpy(y + 4 * k, table + 4 * code, 4);
    else
      __builtin_memcpy(y + 2 * k, table + 2 * code, 2);
  }
}

#include "rows16_parts.h"
#include "rows16_body.h"
#include "e4m3_body.h"
#include "int8_body.h"
#include "spqr_body.h"
#include "rounding_body.h"
#include "decode_body.h"

}  // namespace

const Kernels kGenericKernels = {"generic", kMaxTokens, kSpqrTokens, prepare, linear, linear_int8, dequantize, quantize, quantize_e4m3, int8_linear, spqr_prepare, spqr_linear, spqr_dequantize, round_columns, search_grid,
    rms_norm, rotate, gate, attend};

}  // namespace hfq
