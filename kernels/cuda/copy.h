// A copy within the memory of the device: activations have to begin at a multiple of 16 bytes.
#pragma once

#include "dtype.h"

namespace hfq {

// Enqueues it. Returns null, or CUDA's description of the error.
const char* copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t stream);

}  // namespace hfq
