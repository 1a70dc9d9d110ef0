// AVX2 with AVX-VNNI (Alder Lake and later, Zen 5): vpdpbusd on 256 bits, without saturation.
#include <immintrin.h>

#include "decode.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {
namespace {

#include "lanes_avx2.h"

typedef I SmallSum;
inline I byte_dot(I sum, Line codes, uint32_t x) {
  const __m256i xs = _mm256_set1_epi32(static_cast<int32_t>(x));
  return {_mm256_dpbusd_avx_epi32(sum.a, codes.a, xs), _mm256_dpbusd_avx_epi32(sum.b, codes.b, xs)};
}
inline SmallSum small_begin(I dot) { return dot; }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) { return byte_dot(sum, codes, x); }
inline I small_end(SmallSum sum, I) { return sum; }

#include "rows16_parts.h"
#include "rows16_body.h"
#include "int8_body.h"
#include "spqr_body.h"
#include "rounding_body.h"
#include "decode_body.h"

}  // namespace

const Kernels kAvx2VnniKernels = {"avx2_vnni", kMaxTokens, kSpqrTokens, prepare, linear, dequantize, quantize, int8_linear, spqr_prepare, spqr_linear, spqr_dequantize, round_columns, search_grid,
    rms_norm, rotate, gate, attend};

}  // namespace hfq
