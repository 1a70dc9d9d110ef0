// Which kernel multiplies the tokens of all experts.
#include "experts.h"

#include "gemm.h"

namespace hfq {

const char* launch_experts(const ExpertsParams& params, cudaStream_t stream) {
  if (params.linear.tokens == 0 || params.linear.weight.out_features == 0) return nullptr;
  if (takes_experts(params)) return launch_gemm_experts(params, stream);
  ExpertsParams p = params;
  const Weight& w = p.linear.weight;
  p.routing.slots = static_cast<uint32_t>(expert_slots(p.linear.tokens, p.routing.experts, 8));
  p.linear.group_magic = group_magic(w);
  if (w.codebook) return launch_experts_table4(p, stream);
  if (w.bits == 2) return launch_experts_int2(p, stream);
  if (w.bits == 3) return launch_experts_int3(p, stream);
  if (w.bits == 4) return launch_experts_int4(p, stream);
  return launch_experts_int8(p, stream);
}

}  // namespace hfq
