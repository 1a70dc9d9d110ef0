// hfq::cuda_dequantize and hfq::cuda_lookup: rows of a weight in layout "fragments" as dense numbers.
#pragma once

#include "weight.h"

namespace hfq {

struct UnpackParams {
  Weight weight;
  const int64_t* index;  // [rows] which rows, or null: all, in order
  void* y;               // [rows, K]
  int64_t rows;          // T, or N
  DType y_dtype;
  uint32_t group_magic;  // linear.h; set by the launcher
};

// Enqueues the kernel. Returns null, or CUDA's description of the error.
const char* launch_unpack(const UnpackParams& params, cudaStream_t stream);

}  // namespace hfq
