// From float weights to packed ones, and to the layout of the kernels: what PyTorch's operators take 66 launches a slice for (hfq/nn/packing.py).
#pragma once

#include "dtype.h"

namespace hfq {

// ---- hfq::cuda_group_range ----

struct GroupRangeParams {
  const void* weight;  // [rows, K]
  float* low;          // [rows, G]  the smallest and the largest of each group; NaN where there is one
  float* high;
  int64_t rows;        // N
  int64_t columns;     // K
  int64_t groups;      // G
  int64_t group_size;  // at most K; the last group may be shorter
  DType dtype;
};

// Enqueues the kernel. Returns null, or CUDA's description of the error; so do the others.
const char* launch_group_range(const GroupRangeParams& params, cudaStream_t stream);

// ---- hfq::cuda_nearest_codes ----

struct NearestCodesParams {
  const void* weight;     // [rows, K]
  const float* scales;    // [rows, G]
  const float* zeros;     // [rows, G] or null: 2^(bits-1)
  const float* codebook;  // [16], rising, or null: integers
  uint8_t* codes;         // [rows, K]
  int64_t rows;
  int64_t columns;
  int64_t groups;
  int64_t group_size;     // at most K
  int32_t bits;           // 1 to 8
  DType dtype;            // of the weight
};

const char* launch_nearest_codes(const NearestCodesParams& params, cudaStream_t stream);

// ---- hfq::cuda_pack_codes ----

struct PackCodesParams {
  const uint8_t* codes;  // [rows, K]
  uint8_t* packed;       // [rows, row_bytes]  code k of a row is bits [bits * k, bits * (k + 1)), what is behind the last one 0
  int64_t rows;          // N
  int64_t columns;       // K
  int64_t row_bytes;     // ceil(K * bits / 8)
  int32_t bits;          // 1 to 8
};

const char* launch_pack_codes(const PackCodesParams& params, cudaStream_t stream);

// ---- hfq::cuda_to_fragments ----

struct ToFragmentsParams {
  const uint8_t* qweight;  // [rows, row_bytes]  code k of a row is bits [bits * k, bits * (k + 1))
  uint8_t* tiles;          // [N16, C, 32 | 48, 16]  see fragments.h; what is behind a row or the last row is 0
  int64_t rows;            // N
  int64_t columns;         // K
  int64_t row_bytes;
  int32_t bits;            // 2, 3, 4 or 8
  int32_t halves;          // the order of columns of format "spqr"
};

const char* launch_to_fragments(const ToFragmentsParams& params, cudaStream_t stream);

}  // namespace hfq
