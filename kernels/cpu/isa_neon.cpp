// NEON with dot products (ARMv8.2 and later: Neoverse N1, Apple M1).
#ifdef __aarch64__
#include <arm_neon.h>

#include "decode.h"
#include "rounding.h"
#include "rows16.h"
#include "spqr.h"

namespace hfq {
namespace {

#include "lanes_neon.h"
#include "rows16_parts.h"
#include "rows16_body.h"
#include "e4m3_body.h"
#include "int8_body.h"
#include "spqr_body.h"
#include "rounding_body.h"
#include "decode_body.h"

}  // namespace

const Kernels kNeonKernels = {"neon", kMaxTokens, kSpqrTokens, prepare, linear, linear_int8, dequantize, quantize, quantize_e4m3, int8_linear, spqr_prepare, spqr_linear, spqr_dequantize, round_columns, search_grid,
    rms_norm, rotate, gate, attend};

}  // namespace hfq
#endif
