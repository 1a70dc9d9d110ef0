// What kernels are written against: single instructions, and the launch. Compiled for a GPU that is ptx.h and launch.h; the tests compile
// the same kernels for the CPU, where tests/kernels/cuda_on_cpu has the same functions.
#pragma once

#include "dtype.h"

#ifdef HFQ_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "launch.h"
#include "ptx.h"
#endif
