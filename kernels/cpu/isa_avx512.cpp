// AVX-512 without VNNI (Skylake server): vpmaddubsw adds two products in 16 bits with saturation.
#include <immintrin.h>

#include "decode.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {
namespace {

#include "lanes_avx512.h"

// GCC reorders sums of integers into trees, which keeps all products of a span alive and spills them: to it, this sum is opaque.
inline __m512i in_order(__m512i sum) {
  asm("" : "+v"(sum));
  return sum;
}

// Codes 0..15 stay within 16 bits for a whole span (see kSpan) and are widened once.
typedef __m512i SmallSum;
inline SmallSum small_begin(I) { return _mm512_setzero_si512(); }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) {
  return in_order(_mm512_add_epi16(sum, _mm512_maddubs_epi16(codes, _mm512_set1_epi32(static_cast<int32_t>(x)))));
}
inline I small_end(SmallSum sum, I dot) { return _mm512_add_epi32(dot, _mm512_madd_epi16(sum, _mm512_set1_epi16(1))); }

// Two products of codes up to 255 do not fit 16 bits. The upper bit is multiplied apart: 2 * 127 * 127 and 2 * 128 * 127 do fit.
inline I byte_dot(I sum, Line codes, uint32_t x) {
  const __m512i xs = _mm512_set1_epi32(static_cast<int32_t>(x)), top = _mm512_set1_epi8(-128), ones = _mm512_set1_epi16(1);
  const __m512i low = _mm512_maddubs_epi16(_mm512_andnot_si512(top, codes), xs);
  const __m512i high = _mm512_maddubs_epi16(_mm512_and_si512(top, codes), xs);
  return in_order(_mm512_add_epi32(sum, _mm512_add_epi32(_mm512_madd_epi16(low, ones), _mm512_madd_epi16(high, ones))));
}

#include "rows16_parts.h"
#include "rows16_body.h"
#include "e4m3_body.h"
#include "int8_body.h"
#include "spqr_body.h"
#include "rounding_body.h"
#include "decode_body.h"

}  // namespace

const Kernels kAvx512Kernels = {"avx512", kMaxTokens, kSpqrTokens, prepare, linear, linear_int8, dequantize, quantize, quantize_e4m3, int8_linear, spqr_prepare, spqr_linear, spqr_dequantize, round_columns, search_grid,
    rms_norm, rotate, gate, attend};

}  // namespace hfq
