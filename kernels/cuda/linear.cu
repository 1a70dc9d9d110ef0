// Which kernel multiplies.
#include "linear.h"

#include "copy.h"
#include "gemm.h"
#include "target.h"
#include "wgmma.h"
#include "wide.h"

namespace hfq {
namespace {

// A matrix instruction takes 8 tokens. More would read the weight again with linear_kernel.h, where columns
// are shared by the warps of one block; gemm_kernel.h reads it once for 16 or more.
constexpr int64_t kFewTokens = 8;

}  // namespace

int64_t linear_workspace(const LinearParams& p) {
  if (p.tokens <= kFewTokens || p.weight.out_features == 0 || takes_wide(p)) return 0;
  return takes_wgmma(p) ? wgmma_workspace(p) : workspace_floats(p, plan_gemm(p));
}

const char* copy_on_device(void* to, const void* from, int64_t bytes, cudaStream_t stream) {
  return launch_copy(to, from, static_cast<size_t>(bytes), stream);
}

const char* launch_linear(const LinearParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.weight.out_features == 0) return nullptr;
  LinearParams p = params;
  p.group_magic = group_magic(p.weight);
  if (takes_wide(p))
    return of_kind(p.weight, launch_wide_int2, launch_wide_int3, launch_wide_int4, launch_wide_int8, launch_wide_table4, launch_wide_e4m3)(p, stream);
  if (p.tokens > kFewTokens) return takes_wgmma(p) ? launch_wgmma(p, stream) : launch_gemm(p, stream);
  return of_kind(p.weight, launch_linear_int2, launch_linear_int3, launch_linear_int4, launch_linear_int8, launch_linear_table4,
                 launch_linear_e4m3)(p, stream);
}

}  // namespace hfq
