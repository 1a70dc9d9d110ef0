// AVX2 (any x86 since 2013): vpmaddubsw adds two products in 16 bits with saturation.
#include <immintrin.h>

#include "decode.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {
namespace {

#include "lanes_avx2.h"

// GCC reorders sums of integers into trees, which keeps all products of a span alive and spills them: to it, this sum is opaque.
inline __m256i in_order(__m256i sum) {
  asm("" : "+x"(sum));
  return sum;
}
inline __m256i madd_ones(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }

// Codes 0..15 stay within 16 bits for a whole span (see kSpan) and are widened once.
typedef I SmallSum;
inline SmallSum small_begin(I) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) {
  const __m256i xs = _mm256_set1_epi32(static_cast<int32_t>(x));
  return {in_order(_mm256_add_epi16(sum.a, _mm256_maddubs_epi16(codes.a, xs))), in_order(_mm256_add_epi16(sum.b, _mm256_maddubs_epi16(codes.b, xs)))};
}
inline I small_end(SmallSum sum, I dot) { return {_mm256_add_epi32(dot.a, madd_ones(sum.a)), _mm256_add_epi32(dot.b, madd_ones(sum.b))}; }

// Two products of codes up to 255 do not fit 16 bits. The upper bit is multiplied apart: 2 * 127 * 127 and 2 * 128 * 127 do fit.
inline __m256i byte_dot(__m256i sum, __m256i codes, __m256i xs) {
  const __m256i top = _mm256_set1_epi8(-128);
  const __m256i low = _mm256_maddubs_epi16(_mm256_andnot_si256(top, codes), xs);
  const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(top, codes), xs);
  return in_order(_mm256_add_epi32(sum, _mm256_add_epi32(madd_ones(low), madd_ones(high))));
}
inline I byte_dot(I sum, Line codes, uint32_t x) {
  const __m256i xs = _mm256_set1_epi32(static_cast<int32_t>(x));
  return {byte_dot(sum.a, codes.a, xs), byte_dot(sum.b, codes.b, xs)};
}

#include "rows16_parts.h"
#include "rows16_body.h"
#include "e4m3_body.h"
#include "int8_body.h"
#include "spqr_body.h"
#include "rounding_body.h"
#include "decode_body.h"

}  // namespace

const Kernels kAvx2Kernels = {"avx2", kMaxTokens, kSpqrTokens, prepare, linear, linear_int8, dequantize, quantize, quantize_e4m3, int8_linear, spqr_prepare, spqr_linear, spqr_dequantize, round_columns, search_grid,
    rms_norm, rotate, gate, attend};

}  // namespace hfq
