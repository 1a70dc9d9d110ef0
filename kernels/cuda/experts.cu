// Which kernel multiplies the tokens of all experts.
#include "experts.h"

#include "gemm.h"

namespace hfq {

const char* launch_experts(const ExpertsParams& params, cudaStream_t stream) {
  if (params.linear.tokens == 0 || params.linear.weight.out_features == 0) return nullptr;
  if (takes_experts(params)) return launch_gemm_experts(params, stream);
  ExpertsParams p = params;
  p.routing.slots = static_cast<uint32_t>(expert_slots(p.linear.tokens, p.routing.experts, 8));
  p.linear.group_magic = group_magic(p.linear.weight);
  return of_kind(p.linear.weight, launch_experts_int2, launch_experts_int3, launch_experts_int4, launch_experts_int8,
                 launch_experts_table4, launch_experts_e4m3)(p, stream);
}

}  // namespace hfq
