// What the CPU's code for the parts of a decode step (common/decode.h) shares.
#pragma once

#include "../common/decode.h"
#include "rows16.h"

namespace hfq {

// Numbers that are computed with at a time, as floats: columns of a unit of gate(), half of the largest head of rotate().
constexpr int64_t kDecodeChunk = 256;
constexpr int64_t kMostHeadsAtOnce = 4;  // query heads that attend() has scratch memory for

}  // namespace hfq
