// hfq::cuda_linear: tokens times a weight in layout "fragments", which is read directly.
#pragma once

#include "weight.h"

namespace hfq {

struct LinearParams {
  Weight weight;
  const void* x;         // [tokens, K]
  const void* bias;      // [N] or null
  void* y;               // [tokens, N]
  int64_t tokens;        // M
  DType x_dtype;         // of x and y: kFloat16 or kBFloat16
  DType bias_dtype;
  float* workspace;      // as many floats as linear_workspace says
  // What follows is set by the launcher.
  uint32_t token_tiles;   // gemm.h, wgmma.h: ceil(M / tokens of a thread block)
  uint32_t group_magic;   // ceil(2^31 / units of a group): unit / units is the upper half of 2 unit * magic
  uint32_t flush_mask;    // units of a step after which scales are applied are those with (unit + 1) & flush_mask == 0
  uint32_t stage_bytes;   // linear_kernel.h, linear_digits_kernel.h: of a stage of a warp's ring
  uint32_t stages;        // linear_kernel.h: of the ring, 3 or 2
  uint32_t stage_tokens;  // for which a stage has room
};

// Floats of memory that the kernels need, for sums or for x in another order, aligned to 16 bytes; on the current device, which is that of the
// launch.
int64_t linear_workspace(const LinearParams& params);

inline uint32_t group_magic(const Weight& w) {
  return part_magic(w.group_size < w.in_features ? w.group_size : w.in_features, kUnitColumns);
}

// Scales are applied where a group or a step of `units` units ends: after 4, 2 or 1 units, whichever fits groups.
inline uint32_t flush_mask(const Weight& w, uint32_t units) {
  uint32_t mask = units - 1;
  while (w.groups > 1 && w.group_size / kUnitColumns & mask) mask >>= 1;
  return mask;
}

constexpr int kStepColumns = 128;  // that a warp has at a time: linear_kernel.h, linear_digits_kernel.h, wide_kernel.h

// Whether one token is multiplied in digits (linear_digits_kernel.h), unless wide.h takes it.
inline bool takes_digits(const LinearParams& p) {
  const Weight& w = p.weight;
  return p.tokens == 1 && !w.codebook && w.bits == 4 && (w.groups == 1 || w.group_size % kStepColumns == 0);
}

// Enqueues the kernels. Returns null, or CUDA's description of the error. K below 2^20.
const char* launch_linear(const LinearParams& params, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_linear.
const char* launch_linear_int2(const LinearParams& params, cudaStream_t stream);
const char* launch_linear_int3(const LinearParams& params, cudaStream_t stream);
const char* launch_linear_int4(const LinearParams& params, cudaStream_t stream);
const char* launch_linear_int8(const LinearParams& params, cudaStream_t stream);
const char* launch_linear_table4(const LinearParams& params, cudaStream_t stream);
const char* launch_linear_e4m3(const LinearParams& params, cudaStream_t stream);

}  // namespace hfq
