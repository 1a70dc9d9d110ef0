#include "isa.h"
#include "launch.h"
#include "launch_parts.h"

namespace hfq {

void launch_round_columns(const RoundParams& params) {
  const Kernels& isa = kernels();
  parallel_for(ceil_div(params.rows, kTileRows), 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    isa.round_columns(params, reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>(round_up(params.columns * kTileRows * 4, 64)))), first, last);
  });
}

void launch_search_grid(const SearchParams& params) {
  const Kernels& isa = kernels();
  parallel_for(ceil_div(params.rows, kRows) * params.groups, 1, [&](int64_t first, int64_t last) {
    static thread_local Scratch scratch;
    isa.search_grid(params, reinterpret_cast<float*>(scratch.reserve(static_cast<size_t>(3 * params.group_size * kRows * 4))), first, last);
  });
}

}  // namespace hfq
