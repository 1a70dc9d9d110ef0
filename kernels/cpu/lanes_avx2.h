// 16 lanes in two AVX2 registers. Included inside an anonymous namespace: see rows16_body.h for the list of primitives.

struct F {
  __m256 a, b;
};
struct I {
  __m256i a, b;
};
typedef I Line;
typedef __m256i Table;
struct FloatTable {
  __m256 low, high;  // entries 0..7, 8..15
};
// 16 registers: two per accumulator, two per line; more tokens would spill.
constexpr int kMaxTokens = 4;
constexpr int kSpqrTokens = 4;
constexpr int kRowBlocks = 1;

inline F f_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline F f_set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void f_store(float* p, F v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline F f_mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F f_add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline F f_from_i(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
inline I i_set1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
inline I i_add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline I i_max(I x, I y) { return {_mm256_max_epi32(x.a, y.a), _mm256_max_epi32(x.b, y.b)}; }
inline void i_store(int32_t* p, I v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.a);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), v.b);
}
inline __m256i i_magnitude(__m256 v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
inline I i_magnitude(F v) { return {i_magnitude(v.a), i_magnitude(v.b)}; }
inline __m256i i_round_code(__m256 v) { return _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(127.0f)), _mm256_set1_ps(-127.0f))); }
inline I i_round_code(F v) { return {i_round_code(v.a), i_round_code(v.b)}; }

inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

inline __m256 load_8(const void* p, int64_t i, DType dtype) {
  if (dtype == kFloat32) return _mm256_loadu_ps(static_cast<const float*>(p) + i);
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + i));
  if (dtype == kFloat16) return _mm256_cvtph_ps(raw);
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}
inline F f_load_as(const void* p, int64_t i, DType dtype) { return {load_8(p, i, dtype), load_8(p, i + 8, dtype)}; }

// To bfloat16, nearest even. NaN is handled apart: the rounding increment could carry its mantissa into zero.
inline __m256i bfloat16_bits(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
}

inline __m256i to_16_bits(F v, DType dtype) {
  if (dtype == kFloat16) {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return _mm256_set_m128i(_mm256_cvtps_ph(v.b, kNearest), _mm256_cvtps_ph(v.a, kNearest));
  }
  // vpackusdw works within 128-bit halves; the permutation restores the order.
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(bfloat16_bits(v.a), bfloat16_bits(v.b)), 0xd8);
}

inline void f_store_as(void* p, int64_t i, DType dtype, F v) {
  if (dtype == kFloat32) return f_store(static_cast<float*>(p) + i, v);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(p) + i), to_16_bits(v, dtype));
}

// Within 16 columns.
template <int bits>
inline __m128i order_of_columns() {
  if (bits == 4) return _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  return _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}

template <int bits>
inline void pack_codes(int8_t* out, const int32_t* codes) {
  for (int i = 0; i < 2; ++i) {
    const __m128i* in = reinterpret_cast<const __m128i*>(codes + 16 * i);
    const __m128i low = _mm_packs_epi32(_mm_loadu_si128(in), _mm_loadu_si128(in + 1));
    const __m128i bytes = _mm_packs_epi16(low, _mm_packs_epi32(_mm_loadu_si128(in + 2), _mm_loadu_si128(in + 3)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), bits == 8 ? bytes : _mm_shuffle_epi8(bytes, order_of_columns<bits>()));
  }
}

inline Line line_load(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
inline __m256i low_nibbles(__m256i v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline Line low_nibbles(Line v) { return {low_nibbles(v.a), low_nibbles(v.b)}; }
inline Line high_nibbles(Line v) { return {low_nibbles(_mm256_srli_epi32(v.a, 4)), low_nibbles(_mm256_srli_epi32(v.b, 4))}; }

inline Table table_load(const uint8_t* codebook) {
  if (!codebook) return _mm256_setzero_si256();
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
}
inline Line table_lookup(Table table, Line codes) { return {_mm256_shuffle_epi8(table, codes.a), _mm256_shuffle_epi8(table, codes.b)}; }

inline FloatTable float_table_load(const float* codebook) {
  if (!codebook) return {_mm256_setzero_ps(), _mm256_setzero_ps()};
  return {_mm256_loadu_ps(codebook), _mm256_loadu_ps(codebook + 8)};
}
// vpermps reads 3 bits of the index; the fourth, moved to the sign, chooses between the halves of the table.
template <int i>
inline __m256 table_value(__m256i words, FloatTable t) {
  const __m256i index = i ? _mm256_srli_epi32(words, 4 * i) : words;
  const __m256 upper = _mm256_castsi256_ps(i == 7 ? words : _mm256_slli_epi32(words, 28 - 4 * i));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
}
template <int i>
inline F table_value(Line words, FloatTable t) {
  return {table_value<i>(words.a, t), table_value<i>(words.b, t)};
}
template <int shift, int bits>
inline __m256 field_value(__m256i words) {
  const __m256i shifted = shift ? _mm256_srli_epi32(words, shift) : words;
  return _mm256_cvtepi32_ps(shift + bits == 32 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi32((1 << bits) - 1)));
}
template <int shift, int bits>
inline F field_value(Line words) {
  return {field_value<shift, bits>(words.a), field_value<shift, bits>(words.b)};
}
template <int i>
inline F byte_value(Line words) {
  return field_value<8 * i, 8>(words);
}

// ---- words ----

inline Line line_zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Line line_or(Line a, Line b) { return {_mm256_or_si256(a.a, b.a), _mm256_or_si256(a.b, b.b)}; }
inline Line line_and(Line v, uint32_t mask) {
  const __m256i wide = _mm256_set1_epi32(static_cast<int32_t>(mask));
  return {_mm256_and_si256(v.a, wide), _mm256_and_si256(v.b, wide)};
}
template <int n>
inline Line line_right(Line v) { return {_mm256_srli_epi32(v.a, n), _mm256_srli_epi32(v.b, n)}; }
template <int n>
inline Line line_left(Line v) { return {_mm256_slli_epi32(v.a, n), _mm256_slli_epi32(v.b, n)}; }
inline Line line_right(Line v, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(v.a, count), _mm256_srl_epi32(v.b, count)};
}
inline Line line_left(Line v, int n) {
  const __m128i count = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(v.a, count), _mm256_sll_epi32(v.b, count)};
}
inline F f_from_line(Line v) { return f_from_i(v); }

// ---- E4M3 ----

typedef __m256 Lanes;
typedef __m256i Part;
struct Pairs {
  Lanes low, high;
};

inline Lanes l_zero() { return _mm256_setzero_ps(); }
inline Lanes l_add(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes l_fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline void l_store(float* p, Lanes v) { _mm256_storeu_ps(p, v); }
inline Lanes l_pair(const float* p) {
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm256_castpd_ps(_mm256_set1_pd(pair));
}
// vhaddps works within 128-bit halves; the permutation restores the order.
inline Lanes l_join(Pairs v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(_mm256_hadd_ps(v.low, v.high)), 0xd8)); }
inline Part part_zero() { return _mm256_setzero_si256(); }
inline Part part_load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline Part part_larger(Part a, Part codes) { return _mm256_max_epu8(a, _mm256_or_si256(codes, _mm256_set1_epi8(-128))); }
inline Pairs widen(__m256i halves) { return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))}; }
inline Pairs e4m3_odd(Part words) { return widen(_mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(kE4m3Half))); }
inline Pairs e4m3_even(Part words) { return e4m3_odd(_mm256_slli_epi16(words, 8)); }
// All ones are a NaN.
inline Lanes l_nan_where_full(Part bytes) {
  const __m256i none = _mm256_cmpeq_epi32(_mm256_cmpeq_epi8(bytes, _mm256_set1_epi8(-1)), _mm256_setzero_si256());
  return _mm256_castsi256_ps(_mm256_xor_si256(none, _mm256_set1_epi8(-1)));
}
inline F f_from_e4m3(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const Pairs values = widen(_mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(kE4m3Half)));
  const __m128i nan = _mm_cmpeq_epi8(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  return {_mm256_or_ps(values.low, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(nan))),
          _mm256_or_ps(values.high, _mm256_castsi256_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(nan, 8))))};
}
inline __m256 f_to_e4m3(__m256 v) {
  v = _mm256_max_ps(_mm256_min_ps(v, _mm256_set1_ps(kE4m3Most)), _mm256_set1_ps(-kE4m3Most));
  const __m256 power = _mm256_and_ps(v, _mm256_castsi256_ps(_mm256_set1_epi32(0x7f800000)));
  const __m256 shift = _mm256_mul_ps(_mm256_max_ps(power, _mm256_set1_ps(kE4m3Normal)), _mm256_set1_ps(kE4m3Shift));
  return _mm256_sub_ps(_mm256_add_ps(v, shift), shift);
}
inline F f_to_e4m3(F v) { return {f_to_e4m3(v.a), f_to_e4m3(v.b)}; }

// ---- dequantization ----

inline F f_from_bytes(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

inline void transpose_words(uint32_t* out, const uint8_t* lines, int64_t words) {
  for (int64_t w = 0; w < words; ++w)
    for (int64_t r = 0; r < 16; ++r) __builtin_memcpy(out + 16 * r + w, lines + 64 * w + 4 * r, 4);
}

// 8 values of each of `count` words: y[8*w + i] = values[code i of word w]. 16-bit values are looked up as two halves with vpshufb.
inline void lookup_words(uint8_t* y, const uint32_t* words, int64_t count, F values, DType dtype) {
  if (dtype == kFloat32) {
    for (int64_t w = 0; w < count; ++w) {
      const __m128i raw = _mm_cvtsi32_si128(static_cast<int>(words[w]));
      const __m128i wide = _mm_cvtepu8_epi16(raw);
      const __m256i codes = _mm256_cvtepu8_epi32(_mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15)));
      _mm256_storeu_ps(reinterpret_cast<float*>(y) + 8 * w, table_value<0>(codes, FloatTable{values.a, values.b}));
    }
    return;
  }
  const __m256i split = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15, 0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
  // After the split and the permutation: 16 low bytes, then 16 high bytes.
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(to_16_bits(values, dtype), split), 0xd8);
  const __m128i low_bytes = _mm256_castsi256_si128(bytes), high_bytes = _mm256_extracti128_si256(bytes, 1);
  for (int64_t w = 0; w < count; w += 2) {
    const bool pair = w + 1 < count;
    __m128i raw = _mm_cvtsi32_si128(static_cast<int>(words[w]));
    if (pair) raw = _mm_insert_epi32(raw, static_cast<int>(words[w + 1]), 1);
    const __m128i wide = _mm_cvtepu8_epi16(raw);
    const __m128i codes = _mm_and_si128(_mm_or_si128(wide, _mm_slli_epi16(wide, 4)), _mm_set1_epi8(15));
    const __m128i low = _mm_shuffle_epi8(low_bytes, codes), high = _mm_shuffle_epi8(high_bytes, codes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 16 * w), _mm_unpacklo_epi8(low, high));
    if (pair) _mm_storeu_si128(reinterpret_cast<__m128i*>(y + 16 * w + 16), _mm_unpackhi_epi8(low, high));
  }
}
