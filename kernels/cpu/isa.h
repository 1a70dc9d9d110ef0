// Which instruction sets were compiled in, which this processor runs, and which one is in use.
#pragma once

#include "rows16.h"

namespace hfq {

// The kernels in use: the best supported ones unless select_isa() chose others. One atomic load.
const Kernels& kernels();

// "auto" or the name of a supported instruction set. Returns false, changing nothing, for any other name.
bool select_isa(const char* name);

// Comma-separated names that this build and this processor support, best first.
const char* supported_isas();

}  // namespace hfq
