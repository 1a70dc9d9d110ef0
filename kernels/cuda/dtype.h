// What both compilers need to read their headers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/dtype.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
typedef struct CUstream_st* cudaStream_t;
#endif
