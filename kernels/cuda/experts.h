// hfq::cuda_experts_linear: tokens that are sorted by expert times a stack of weights in layout "fragments", in one launch. How many tokens
// each expert has is read on the device: the host never waits for it, and a CUDA graph holds for any routing.
#pragma once

#include "linear.h"

namespace hfq {

constexpr int64_t kMostExperts = 1024, kMostExpertTokens = 1 << 20;  // sums of clamped counts fit 31 bits

// How the tokens of x are shared out.
struct Routing {
  const int64_t* counts;  // [E] tokens of each expert; null: there is one weight
  int64_t experts;        // E
  int64_t qweight_bytes;  // from one expert's qweight to the next; then those of scales (and zeros), and bias
  int64_t scale_bytes;
  int64_t bias_bytes;
  // What follows is set by the launcher.
  uint32_t slots;         // runs of tokens of one expert (runs.h), as many as there can be
};

struct ExpertsParams {
  LinearParams linear;    // weight: that of expert 0; bias [E, N] or null; x and y of all tokens
  Routing routing;
};

// Each expert with tokens, and what is behind the last one, leaves at most one run that is not full.
inline int64_t expert_slots(int64_t tokens, int64_t experts, int64_t run) {
  const int64_t parts = experts + 1 < tokens ? experts + 1 : tokens;
  return (tokens + (run - 1) * parts) / run;
}

// Enqueues a kernel. Rows of y behind the sum of counts become zeros. Counts are data: whatever they are, the kernel stays within x and
// y; if they are negative or add up to more than M, what y holds is not specified. At most kMostExperts and kMostExpertTokens.
// Returns null, or CUDA's description of the error.
const char* launch_experts(const ExpertsParams& params, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_experts.
const char* launch_experts_int2(const ExpertsParams& params, cudaStream_t stream);
const char* launch_experts_int3(const ExpertsParams& params, cudaStream_t stream);
const char* launch_experts_int4(const ExpertsParams& params, cudaStream_t stream);
const char* launch_experts_int8(const ExpertsParams& params, cudaStream_t stream);
const char* launch_experts_table4(const ExpertsParams& params, cudaStream_t stream);
const char* launch_experts_e4m3(const ExpertsParams& params, cudaStream_t stream);

}  // namespace hfq
