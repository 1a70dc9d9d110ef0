// 16 lanes in one AVX-512 register. Included inside an anonymous namespace: see rows16_body.h for the list of primitives.

typedef __m512 F;
typedef __m512i I;
typedef __m512i Line;
typedef __m512i Table;
typedef __m512 FloatTable;
constexpr int kMaxTokens = 8;
constexpr int kSpqrTokens = 4;
constexpr int kRowBlocks = 2;

inline F f_zero() { return _mm512_setzero_ps(); }
inline F f_set1(float v) { return _mm512_set1_ps(v); }
inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
inline void f_store(float* p, F v) { _mm512_storeu_ps(p, v); }
inline F f_mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F f_add(F a, F b) { return _mm512_add_ps(a, b); }
inline F f_fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
inline F f_from_i(I v) { return _mm512_cvtepi32_ps(v); }
inline I i_set1(int32_t v) { return _mm512_set1_epi32(v); }
inline I i_add(I a, I b) { return _mm512_add_epi32(a, b); }
inline I i_max(I a, I b) { return _mm512_max_epi32(a, b); }
inline void i_store(int32_t* p, I v) { _mm512_storeu_si512(p, v); }
inline I i_magnitude(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
inline I i_round_code(F v) { return _mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, f_set1(127.0f)), f_set1(-127.0f))); }

inline float half_to_float(uint16_t bits) { return _cvtsh_ss(bits); }

inline F f_load_as(const void* p, int64_t i, DType dtype) {
  if (dtype == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(p) + i);
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + i));
  if (dtype == kFloat16) return _mm512_cvtph_ps(raw);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
}

// To bfloat16, nearest even. NaN is handled apart: the rounding increment could carry its mantissa into zero.
inline __m256i to_bfloat16(F v) {
  const I bits = _mm512_castps_si512(v);
  const I odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0)));
}

inline __m256i to_16_bits(F v, DType dtype) {
  return dtype == kFloat16 ? _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC) : to_bfloat16(v);
}

inline void f_store_as(void* p, int64_t i, DType dtype, F v) {
  if (dtype == kFloat32) return _mm512_storeu_ps(static_cast<float*>(p) + i, v);
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
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_loadu_si512(codes + 16 * i));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + 16 * i), bits == 8 ? bytes : _mm_shuffle_epi8(bytes, order_of_columns<bits>()));
  }
}

inline Line line_load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Line low_nibbles(Line v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline Line high_nibbles(Line v) { return _mm512_and_si512(_mm512_srli_epi32(v, 4), _mm512_set1_epi8(15)); }

inline Table table_load(const uint8_t* codebook) {
  if (!codebook) return _mm512_setzero_si512();
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codebook)));
}
inline Line table_lookup(Table table, Line codes) { return _mm512_shuffle_epi8(table, codes); }

inline FloatTable float_table_load(const float* codebook) { return codebook ? _mm512_loadu_ps(codebook) : _mm512_setzero_ps(); }
template <int i>
inline F table_value(Line words, FloatTable table) {
  return _mm512_permutexvar_ps(i ? _mm512_srli_epi32(words, 4 * i) : words, table);
}
// vpermps reads the lower 4 bits of each lane: a table of period 2^bits masks the others away, cheaper than mask and convert.
template <int shift, int bits>
inline F field_value(Line words) {
  constexpr int n = (1 << bits) - 1;
  const F table = _mm512_setr_ps(0, 1 & n, 2 & n, 3 & n, 4 & n, 5 & n, 6 & n, 7 & n, 8 & n, 9 & n, 10 & n, 11 & n, 12 & n, 13 & n, 14 & n, 15 & n);
  return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(words, shift) : words, table);
}
template <int i>
inline F byte_value(Line words) {
  const Line shifted = i ? _mm512_srli_epi32(words, 8 * i) : words;
  return _mm512_cvtepi32_ps(i == 3 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi32(255)));
}

// ---- words ----

inline Line line_zero() { return _mm512_setzero_si512(); }
inline Line line_or(Line a, Line b) { return _mm512_or_si512(a, b); }
inline Line line_and(Line v, uint32_t mask) { return _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int32_t>(mask))); }
template <int n>
inline Line line_right(Line v) { return _mm512_srli_epi32(v, n); }
template <int n>
inline Line line_left(Line v) { return _mm512_slli_epi32(v, n); }
inline Line line_right(Line v, int n) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(n)); }
inline Line line_left(Line v, int n) { return _mm512_sll_epi32(v, _mm_cvtsi32_si128(n)); }
inline F f_from_line(Line v) { return _mm512_cvtepi32_ps(v); }

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
inline Lanes l_pair(const float* p) {
  double pair;
  __builtin_memcpy(&pair, p, 8);
  return _mm512_castpd_ps(_mm512_set1_pd(pair));
}
inline Lanes l_join(Pairs v) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return _mm512_add_ps(_mm512_permutex2var_ps(v.low, even, v.high), _mm512_permutex2var_ps(v.low, odd, v.high));
}
inline Part part_zero() { return line_zero(); }
inline Part part_load(const uint8_t* p) { return line_load(p); }
inline Part part_larger(Part a, Part codes) { return _mm512_max_epu8(a, _mm512_or_si512(codes, _mm512_set1_epi8(-128))); }
inline Pairs e4m3_odd(Part words) {
  const __m512i halves = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(kE4m3Half));
  return {_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1))};
}
inline Pairs e4m3_even(Part words) { return e4m3_odd(_mm512_slli_epi16(words, 8)); }
inline Lanes l_nan_where_full(Part bytes) {
  const __m512i full = _mm512_movm_epi8(_mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(-1)));
  return _mm512_maskz_mov_ps(_mm512_test_epi32_mask(full, full), f_set1(__builtin_nanf("")));
}
inline F f_from_e4m3(const uint8_t* p) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7), _mm256_set1_epi16(kE4m3Half));
  const __mmask16 nan = _mm_cmpeq_epi8_mask(_mm_or_si128(codes, _mm_set1_epi8(-128)), _mm_set1_epi8(-1));
  return _mm512_mask_mov_ps(_mm512_cvtph_ps(halves), nan, f_set1(__builtin_nanf("")));
}
inline F f_to_e4m3(F v) {
  v = _mm512_max_ps(_mm512_min_ps(v, f_set1(kE4m3Most)), f_set1(-kE4m3Most));
  const F power = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7f800000)));
  const F shift = f_mul(_mm512_max_ps(power, f_set1(kE4m3Normal)), f_set1(kE4m3Shift));
  return _mm512_sub_ps(f_add(v, shift), shift);
}

// ---- dequantization ----

inline F f_from_bytes(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }

// out[16 * r + w] = word r of line w: a 16 x 16 transposition in registers, by pairs, by fours, then by 128-bit lanes.
inline void transpose_words(uint32_t* out, const uint8_t* lines, int64_t words) {
  I line[16], a[16], b[16];
  for (int w = 0; w < 16; ++w) line[w] = w < words ? line_load(lines + 64 * w) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_epi32(line[i], line[i + 1]);
    a[i + 1] = _mm512_unpackhi_epi32(line[i], line[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  }
  // Lane L of b[i + j] now holds word 4 * L + j of lines i .. i + 3.
  for (int j = 0; j < 4; ++j) {
    const I even0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), even1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
    const I odd0 = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd), odd1 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
    _mm512_storeu_si512(out + 16 * j, _mm512_shuffle_i32x4(even0, even1, 0x88));
    _mm512_storeu_si512(out + 16 * (4 + j), _mm512_shuffle_i32x4(odd0, odd1, 0x88));
    _mm512_storeu_si512(out + 16 * (8 + j), _mm512_shuffle_i32x4(even0, even1, 0xdd));
    _mm512_storeu_si512(out + 16 * (12 + j), _mm512_shuffle_i32x4(odd0, odd1, 0xdd));
  }
}

// 8 values of each of `count` words: y[8*w + i] = values[code i of word w].
inline void lookup_words(uint8_t* y, const uint32_t* words, int64_t count, F values, DType dtype) {
  const __m512i wide = dtype == kFloat32 ? _mm512_setzero_si512() : _mm512_castsi256_si512(to_16_bits(values, dtype));
  for (int64_t w = 0; w < count; w += 4) {
    const int64_t here = count - w < 4 ? count - w : 4;  // 4 words are 32 codes
    const __m128i raw = _mm_maskz_loadu_epi32(static_cast<__mmask8>((1u << here) - 1), words + w);
    const __m256i pairs = _mm256_cvtepu8_epi16(raw);
    const __m256i nibbles = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16(pairs, 4)), _mm256_set1_epi8(15));
    if (dtype != kFloat32) {
      const __m512i out = _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(nibbles), wide);
      _mm512_mask_storeu_epi32(y + 16 * w, static_cast<__mmask16>((1u << (4 * here)) - 1), out);
    } else {
      const __mmask16 low = static_cast<__mmask16>(here >= 2 ? 0xffff : 0xff);
      const __mmask16 high = static_cast<__mmask16>(here == 4 ? 0xffff : here == 3 ? 0xff : 0);
      const __m512i a = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(nibbles)), c = _mm512_cvtepu8_epi32(_mm256_extracti128_si256(nibbles, 1));
      _mm512_mask_storeu_ps(y + 32 * w, low, _mm512_permutexvar_ps(a, values));
      _mm512_mask_storeu_ps(y + 32 * w + 64, high, _mm512_permutexvar_ps(c, values));
    }
  }
}
