// Which kernel multiplies, and after how many columns it scales its sums.
#include "spqr.h"
#include "target.h"

namespace hfq {

const char* launch_spqr_linear(const SpqrLinearParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.weight.out_features == 0) return nullptr;
  SpqrLinearParams p = params;
  const SpqrWeight& w = p.weight;
  p.token_tiles = static_cast<uint32_t>((p.tokens + 7) / 8);
  const int64_t block = w.bits == 4 ? kBlockColumns<4> : kBlockColumns<3>;
  int64_t step = block, steps = (w.in_features + block - 1) / block;  // one group per row
  if (w.groups > 1) {
    step = w.group_size % block == 0 ? block : w.group_size % kUnitColumns == 0 ? kUnitColumns : kHalfColumns;
    steps = w.group_size / step;
  }
  p.step_columns = static_cast<uint32_t>(step);
  p.group_magic = static_cast<uint32_t>(((int64_t{1} << 31) + steps - 1) / steps);
  if (w.bits == 2) return launch_spqr_linear2(p, stream);
  if (w.bits == 3) return launch_spqr_linear3(p, stream);
  return launch_spqr_linear4(p, stream);
}

}  // namespace hfq
