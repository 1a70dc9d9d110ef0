// Dtypes as the launchers take them, and what both compilers need to read their headers.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
typedef struct CUstream_st* cudaStream_t;
#endif

namespace hfq {

enum DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2, kUnsupported = -1 };

}  // namespace hfq
