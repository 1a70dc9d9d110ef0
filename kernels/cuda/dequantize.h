// hfq::cuda_dequantize_neutral: neutral (stored) layout to a dense matrix.
#pragma once

#include "dtype.h"

namespace hfq {

struct DequantizeParams {
  const uint8_t* qweight;  // [rows, row_bytes]  little-endian bit stream per row; code k is bits [k*bits, (k+1)*bits)
  const void* scales;      // [rows, groups]
  const void* zeros;       // [rows, groups] or null: 2^(bits-1)
  const float* codebook;   // [2^bits] or null
  const int32_t* g_idx;    // [in_features] group of each column, or null: k / group_size
  void* y;                 // [rows, in_features]
  int64_t rows;            // N, or E * N for a stack of experts
  int64_t row_bytes;       // ceil(in_features * bits / 8)
  int64_t in_features;     // K
  int64_t group_size;
  int64_t groups;          // G
  int32_t bits;            // 1..8
  DType scale_dtype;       // of scales and zeros
  DType y_dtype;
};

// Enqueues the kernel. Returns null, or CUDA's description of the error.
const char* launch_dequantize(const DequantizeParams& params, cudaStream_t stream);

}  // namespace hfq
