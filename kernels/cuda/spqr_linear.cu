// Which kernel multiplies, and which columns share a scale.
#include "spqr_gemm.h"
#include "target.h"

namespace hfq {

namespace {

void set_groups(SpqrLinearParams& p) {
  const SpqrWeight& w = p.weight;
  p.short_groups = w.groups > 1 && w.group_size % kUnitColumns != 0;
  p.group_magic = group_magic(w, p.short_groups ? kHalfColumns : kUnitColumns);
}

// A matrix instruction takes 8 tokens.
constexpr int64_t kFewTokens = 8;

// Whether experts have so many tokens that scaling their weights once for several matrix instructions pays. Pieces of 16 bytes of x are counted with
// 32 bits.
bool takes_gemm(const SpqrExpertsParams& p) {
  const SpqrLinearParams& l = p.linear;
  return l.weight.out_features > 0 && l.tokens > kFewTokens * p.routing.experts && l.tokens * l.weight.in_features / 8 < int64_t{1} << 32;
}

}  // namespace

int64_t spqr_workspace(const SpqrLinearParams& p) { return p.tokens <= kFewTokens || p.weight.out_features == 0 ? 0 : spqr_gemm_workspace(p); }

int64_t spqr_workspace(const SpqrExpertsParams& p) { return takes_gemm(p) ? spqr_gemm_workspace(p) : 0; }

const char* launch_spqr_linear(const SpqrLinearParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.weight.out_features == 0) return nullptr;
  if (params.tokens > kFewTokens) return launch_spqr_gemm(params, stream);
  SpqrLinearParams p = params;
  set_groups(p);
  if (p.weight.bits == 2) return launch_spqr_linear2(p, stream);
  if (p.weight.bits == 3) return launch_spqr_linear3(p, stream);
  return launch_spqr_linear4(p, stream);
}

const char* launch_spqr_experts(const SpqrExpertsParams& params, cudaStream_t stream) {
  if (params.linear.tokens == 0 || params.linear.weight.out_features == 0) return nullptr;
  if (takes_gemm(params)) return launch_spqr_gemm(params, stream);
  SpqrExpertsParams p = params;
  p.routing.slots = static_cast<uint32_t>(expert_slots(p.linear.tokens, p.routing.experts, 8));
  set_groups(p.linear);
  if (p.linear.weight.bits == 2) return launch_spqr_experts2(p, stream);
  if (p.linear.weight.bits == 3) return launch_spqr_experts3(p, stream);
  return launch_spqr_experts4(p, stream);
}

}  // namespace hfq
