// Which kernel multiplies, and which columns share a scale.
#include "spqr.h"
#include "target.h"

namespace hfq {

const char* launch_spqr_linear(const SpqrLinearParams& params, cudaStream_t stream) {
  if (params.tokens == 0 || params.weight.out_features == 0) return nullptr;
  SpqrLinearParams p = params;
  const SpqrWeight& w = p.weight;
  p.token_tiles = static_cast<uint32_t>((p.tokens + 7) / 8);
  p.short_groups = w.groups > 1 && w.group_size % kUnitColumns != 0;
  const int64_t columns = p.short_groups ? kHalfColumns : kUnitColumns;
  const int64_t parts = w.groups > 1 ? w.group_size / columns : (w.in_features + columns - 1) / columns;
  p.group_magic = static_cast<uint32_t>(((int64_t{1} << 31) + parts - 1) / parts);
  if (w.bits == 2) return launch_spqr_linear2(p, stream);
  if (w.bits == 3) return launch_spqr_linear3(p, stream);
  return launch_spqr_linear4(p, stream);
}

}  // namespace hfq
