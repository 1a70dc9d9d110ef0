// AVX-512 with VNNI (Ice Lake, Sapphire Rapids, Zen 4 and later): vpdpbusd multiplies 4 unsigned codes by 4 signed activations and adds
// the sum to 32 bits, without saturation.
#include <immintrin.h>

#include "rows16.h"

namespace hfq {
namespace {

#include "lanes_avx512.h"

typedef I SmallSum;
inline I byte_dot(I sum, Line codes, uint32_t x) { return _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(static_cast<int32_t>(x))); }
inline SmallSum small_begin(I dot) { return dot; }
inline SmallSum small_dot(SmallSum sum, Line codes, uint32_t x) { return byte_dot(sum, codes, x); }
inline I small_end(SmallSum sum, I) { return sum; }

#include "rows16_parts.h"
#include "int8_body.h"

}  // namespace

void avx512_vnni_linear_int8(const LinearParams& p, int64_t first, int64_t last) { linear_int8(p, first, last); }
void avx512_vnni_int8_linear(const LinearParams& p, int64_t first, int64_t last) { int8_linear(p, first, last); }

}  // namespace hfq
