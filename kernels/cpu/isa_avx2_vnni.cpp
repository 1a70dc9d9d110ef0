// AVX2 with AVX-VNNI (Alder Lake and later, Zen 5): vpdpbusd on 256 bits, without saturation.
#include <immintrin.h>

#include "rows16.h"

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
#include "int8_body.h"

}  // namespace

void avx2_vnni_linear_int8(const LinearParams& p, int64_t first, int64_t last) { linear_int8(p, first, last); }
void avx2_vnni_int8_linear(const LinearParams& p, int64_t first, int64_t last) { int8_linear(p, first, last); }

}  // namespace hfq
