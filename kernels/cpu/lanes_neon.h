// 16 lanes in four NEON registers. Included inside an anonymous namespace: see rows16_parts.h for the list of primitives.

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};
struct Line {
  uint32x4_t v[4];
};
typedef uint8x16_t Table;
typedef uint8x16x4_t FloatTable;  // 16 floats as bytes
// 32 registers: four per accumulator, eight for a line and its codes.
constexpr int kMaxTokens = 4;
constexpr int kSpqrTokens = 4;
constexpr int kRowBlocks = 1;

// A result whose register i is body(i).
template <class R, class Body>
inline __attribute__((always_inline)) R each_register(const Body& body) {
  R r;
  for (int i = 0; i < 4; ++i) r.v[i] = body(i);
  return r;
}

inline F f_set1(float x) {
  return each_register<F>([&](int) { return vdupq_n_f32(x); });
}
inline F f_zero() { return f_set1(0.0f); }
inline F f_load(const float* p) {
  return each_register<F>([&](int i) { return vld1q_f32(p + 4 * i); });
}
inline void f_store(float* p, F f) {
  for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, f.v[i]);
}
inline F f_mul(F a, F b) {
  return each_register<F>([&](int i) { return vmulq_f32(a.v[i], b.v[i]); });
}
inline F f_add(F a, F b) {
  return each_register<F>([&](int i) { return vaddq_f32(a.v[i], b.v[i]); });
}
inline F f_fma(F a, F b, F c) {
  return each_register<F>([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); });
}
inline F f_from_i(I a) {
  return each_register<F>([&](int i) { return vcvtq_f32_s32(a.v[i]); });
}
inline I i_set1(int32_t x) {
  return each_register<I>([&](int) { return vdupq_n_s32(x); });
}
inline I i_add(I a, I b) {
  return each_register<I>([&](int i) { return vaddq_s32(a.v[i], b.v[i]); });
}
inline I i_max(I a, I b) {
  return each_register<I>([&](int i) { return vmaxq_s32(a.v[i], b.v[i]); });
}
inline void i_store(int32_t* p, I a) {
  for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
}
inline I i_magnitude(F f) {
  return each_register<I>([&](int i) { return vandq_s32(vreinterpretq_s32_f32(f.v[i]), vdupq_n_s32(0x7fffffff)); });
}
inline I i_round_code(F f) {
  return each_register<I>([&](int i) { return vcvtnq_s32_f32(vmaxq_f32(vminq_f32(f.v[i], vdupq_n_f32(127.0f)), vdupq_n_f32(-127.0f))); });
}

inline float half_to_float(uint16_t bits) {
  __fp16 half;
  __builtin_memcpy(&half, &bits, 2);
  return static_cast<float>(half);
}

inline F f_load_as(const void* p, int64_t at, DType dtype) {
  if (dtype == kFloat32) return f_load(static_cast<const float*>(p) + at);
  const uint16_t* raw = static_cast<const uint16_t*>(p) + at;
  return each_register<F>([&](int i) {
    const uint16x4_t bits = vld1_u16(raw + 4 * i);
    return dtype == kFloat16 ? vcvt_f32_f16(vreinterpret_f16_u16(bits)) : vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  });
}

// To bfloat16, nearest even. NaN is handled apart: the rounding increment could carry its mantissa into zero.
inline uint16x4_t to_bfloat16(float32x4_t v) {
  const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
  const uint32x4_t rounded = vshrq_n_u32(vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff))), 16);
  return vmovn_u32(vbslq_u32(vceqq_f32(v, v), rounded, vdupq_n_u32(0x7fc0)));
}

inline void f_store_as(void* p, int64_t at, DType dtype, F f) {
  if (dtype == kFloat32) return f_store(static_cast<float*>(p) + at, f);
  uint16_t* out = static_cast<uint16_t*>(p) + at;
  for (int i = 0; i < 4; ++i) vst1_u16(out + 4 * i, dtype == kFloat16 ? vreinterpret_u16_f16(vcvt_f16_f32(f.v[i])) : to_bfloat16(f.v[i]));
}

template <int bits>
inline void pack_codes(int8_t* out, const int32_t* codes) {
  static const uint8_t kOrders[3][16] = {{0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15},
                                         {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15},
                                         {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}};
  const uint8x16_t order = vld1q_u8(kOrders[bits == 4 ? 0 : bits == 8 ? 2 : 1]);  // within 16 columns
  for (int i = 0; i < 2; ++i, codes += 16) {
    const int16x8_t low = vcombine_s16(vmovn_s32(vld1q_s32(codes)), vmovn_s32(vld1q_s32(codes + 4)));
    const int16x8_t high = vcombine_s16(vmovn_s32(vld1q_s32(codes + 8)), vmovn_s32(vld1q_s32(codes + 12)));
    vst1q_s8(out + 16 * i, vqtbl1q_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), order));
  }
}

inline Line line_load(const uint8_t* p) {
  return each_register<Line>([&](int i) { return vreinterpretq_u32_u8(vld1q_u8(p + 16 * i)); });
}
inline Line low_nibbles(Line a) {
  return each_register<Line>([&](int i) { return vandq_u32(a.v[i], vdupq_n_u32(0x0f0f0f0fu)); });
}
inline Line high_nibbles(Line a) {
  return each_register<Line>([&](int i) { return vreinterpretq_u32_u8(vshrq_n_u8(vreinterpretq_u8_u32(a.v[i]), 4)); });
}

inline Table table_load(const uint8_t* codebook) { return codebook ? vld1q_u8(codebook) : vdupq_n_u8(0); }
inline Line table_lookup(Table table, Line codes) {
  return each_register<Line>([&](int i) { return vreinterpretq_u32_u8(vqtbl1q_u8(table, vreinterpretq_u8_u32(codes.v[i]))); });
}

inline FloatTable float_table_load(const float* codebook) {
  FloatTable table;
  for (int i = 0; i < 4; ++i) table.val[i] = codebook ? vreinterpretq_u8_f32(vld1q_f32(codebook + 4 * i)) : vdupq_n_u8(0);
  return table;
}
// Values of codes 0..15, one in each 32-bit lane.
inline float32x4_t table_values(FloatTable table, uint32x4_t codes) {
  const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100u), codes, 0x04040404u);
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, vreinterpretq_u8_u32(bytes)));
}
template <int n>
inline uint32x4_t shifted_right(uint32x4_t v) {
  if constexpr (n > 0) return vshrq_n_u32(v, n);
  else return v;
}
template <int i>
inline F table_value(Line words, FloatTable table) {
  return each_register<F>([&](int j) { return table_values(table, vandq_u32(shifted_right<4 * i>(words.v[j]), vdupq_n_u32(15))); });
}
template <int shift, int bits>
inline F field_value(Line words) {
  return each_register<F>([&](int i) {
    const uint32x4_t field = shifted_right<shift>(words.v[i]);
    return vcvtq_f32_u32(shift + bits == 32 ? field : vandq_u32(field, vdupq_n_u32((1u << bits) - 1)));
  });
}
template <int i>
inline F byte_value(Line words) {
  return field_value<8 * i, 8>(words);
}

// ---- dot products ----

// Both factors of sdot are signed: fine for codes up to 127.
inline I signed_dot(I sum, Line codes, int8x16_t x) {
  return each_register<I>([&](int i) { return vdotq_s32(sum.v[i], vreinterpretq_s8_u32(codes.v[i]), x); });
}
inline int8x16_t broadcast(uint32_t x) { return vreinterpretq_s8_u32(vdupq_n_u32(x)); }

// The upper bit counts 128, which as a signed byte is -128: it is multiplied apart and subtracted.
inline I byte_dot(I sum, Line codes, uint32_t x) {
  const int8x16_t xs = broadcast(x);
  sum = signed_dot(sum, each_register<Line>([&](int i) { return vandq_u32(codes.v[i], vdupq_n_u32(0x7f7f7f7fu)); }), xs);
  const I upper = signed_dot(i_set1(0), each_register<Line>([&](int i) { return vandq_u32(codes.v[i], vdupq_n_u32(0x80808080u)); }), xs);
  return each_register<I>([&](int i) { return vsubq_s32(sum.v[i], upper.v[i]); });
}

typedef I SmallSum;
inline SmallSum small_begin(I dot) { return dot; }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) { return signed_dot(sum, codes, broadcast(x)); }
inline I small_end(SmallSum sum, I) { return sum; }

// ---- words ----

inline Line line_zero() {
  return each_register<Line>([](int) { return vdupq_n_u32(0); });
}
inline Line line_or(Line a, Line b) {
  return each_register<Line>([&](int i) { return vorrq_u32(a.v[i], b.v[i]); });
}
inline Line line_and(Line a, uint32_t mask) {
  return each_register<Line>([&](int i) { return vandq_u32(a.v[i], vdupq_n_u32(mask)); });
}
inline Line line_right(Line a, int n) {
  return each_register<Line>([&](int i) { return vshlq_u32(a.v[i], vdupq_n_s32(-n)); });
}
inline Line line_left(Line a, int n) {
  return each_register<Line>([&](int i) { return vshlq_u32(a.v[i], vdupq_n_s32(n)); });
}
template <int n>
inline Line line_right(Line a) {
  return each_register<Line>([&](int i) { return shifted_right<n>(a.v[i]); });
}
template <int n>
inline Line line_left(Line a) {
  return each_register<Line>([&](int i) { return vshlq_n_u32(a.v[i], n); });
}
inline F f_from_line(Line a) {
  return each_register<F>([&](int i) { return vcvtq_f32_s32(vreinterpretq_s32_u32(a.v[i])); });
}

// ---- E4M3 ----

typedef float32x4_t Lanes;
typedef uint32x4_t Part;
struct Pairs {
  Lanes low, high;
};

inline Lanes l_zero() { return vdupq_n_f32(0.0f); }
inline Lanes l_add(Lanes a, Lanes b) { return vaddq_f32(a, b); }
inline Lanes l_fma(Lanes a, Lanes b, Lanes c) { return vfmaq_f32(c, a, b); }
inline void l_store(float* p, Lanes v) { vst1q_f32(p, v); }
inline Lanes l_pair(const float* p) {
  const float32x2_t pair = vld1_f32(p);
  return vcombine_f32(pair, pair);
}
inline Lanes l_join(Pairs v) { return vpaddq_f32(v.low, v.high); }
inline Part part_zero() { return vdupq_n_u32(0); }
inline Part part_load(const uint8_t* p) { return vreinterpretq_u32_u8(vld1q_u8(p)); }
inline Part part_larger(Part a, Part codes) {
  return vreinterpretq_u32_u8(vmaxq_u8(vreinterpretq_u8_u32(a), vorrq_u8(vreinterpretq_u8_u32(codes), vdupq_n_u8(128))));
}
inline Pairs e4m3_odd(int16x8_t words) {
  const uint16x8_t halves = vandq_u16(vreinterpretq_u16_s16(vshrq_n_s16(words, 1)), vdupq_n_u16(static_cast<uint16_t>(kE4m3Half)));
  return {vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))), vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves)))};
}
inline Pairs e4m3_odd(Part words) { return e4m3_odd(vreinterpretq_s16_u32(words)); }
inline Pairs e4m3_even(Part words) { return e4m3_odd(vshlq_n_s16(vreinterpretq_s16_u32(words), 8)); }
// All ones are a NaN.
inline Lanes l_nan_where_full(Part bytes) {
  const uint32x4_t full = vreinterpretq_u32_u8(vceqq_u8(vreinterpretq_u8_u32(bytes), vdupq_n_u8(255)));
  return vreinterpretq_f32_u32(vtstq_u32(full, full));
}
inline F f_from_e4m3(const uint8_t* p) {
  const uint8x16_t codes = vld1q_u8(p);
  const int8x16_t nan = vreinterpretq_s8_u8(vceqq_u8(vorrq_u8(codes, vdupq_n_u8(128)), vdupq_n_u8(255)));
  const int16x8_t low_nan = vmovl_s8(vget_low_s8(nan)), high_nan = vmovl_s8(vget_high_s8(nan));
  // A code is the upper byte of a word.
  const Pairs low = e4m3_odd(vreinterpretq_s16_u8(vzip1q_u8(vdupq_n_u8(0), codes)));
  const Pairs high = e4m3_odd(vreinterpretq_s16_u8(vzip2q_u8(vdupq_n_u8(0), codes)));
  const auto with = [](Lanes values, int16x4_t mask) { return vreinterpretq_f32_s32(vorrq_s32(vreinterpretq_s32_f32(values), vmovl_s16(mask))); };
  return {{with(low.low, vget_low_s16(low_nan)), with(low.high, vget_high_s16(low_nan)), with(high.low, vget_low_s16(high_nan)),
           with(high.high, vget_high_s16(high_nan))}};
}
inline F f_to_e4m3(F f) {
  return each_register<F>([&](int i) {
    const float32x4_t v = vmaxq_f32(vminq_f32(f.v[i], vdupq_n_f32(kE4m3Most)), vdupq_n_f32(-kE4m3Most));
    const float32x4_t power = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7f800000u)));
    const float32x4_t shift = vmulq_n_f32(vmaxq_f32(power, vdupq_n_f32(kE4m3Normal)), kE4m3Shift);
    return vsubq_f32(vaddq_f32(v, shift), shift);
  });
}

// ---- dequantization ----

inline F f_from_bytes(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))), vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
           vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}

inline void transpose_words(uint32_t* out, const uint8_t* lines, int64_t words) {
  for (int64_t w = 0; w < words; ++w)
    for (int64_t r = 0; r < 16; ++r) __builtin_memcpy(out + 16 * r + w, lines + 64 * w + 4 * r, 4);
}

// 8 values of each of `count` words: y[8*w + i] = values[code i of word w].
inline void lookup_words(uint8_t* y, const uint32_t* words, int64_t count, F values, DType dtype) {
  if (dtype == kFloat32) {
    alignas(64) float held[16];
    f_store(held, values);
    const FloatTable table = float_table_load(held);
    static const int32_t kShifts[8] = {0, -4, -8, -12, -16, -20, -24, -28};
    for (int64_t w = 0; w < count; ++w)
      for (int half = 0; half < 2; ++half) {
        const uint32x4_t codes = vandq_u32(vshlq_u32(vdupq_n_u32(words[w]), vld1q_s32(kShifts + 4 * half)), vdupq_n_u32(15));
        vst1q_f32(reinterpret_cast<float*>(y) + 8 * w + 4 * half, table_values(table, codes));
      }
    return;
  }
  alignas(64) uint8_t held[32];
  f_store_as(held, 0, dtype, values);
  const uint8x16x2_t table = {{vld1q_u8(held), vld1q_u8(held + 16)}};
  for (int64_t w = 0; w < count; ++w) {
    const uint8x8_t word = vreinterpret_u8_u32(vdup_n_u32(words[w]));
    // Twice each code, and one more: where its two bytes are.
    const uint8x8_t first = vshl_n_u8(vzip1_u8(vand_u8(word, vdup_n_u8(15)), vshr_n_u8(word, 4)), 1);
    const uint8x16_t bytes = vcombine_u8(vzip1_u8(first, vorr_u8(first, vdup_n_u8(1))), vzip2_u8(first, vorr_u8(first, vdup_n_u8(1))));
    vst1q_u8(y + 16 * w, vqtbl2q_u8(table, bytes));
  }
}
