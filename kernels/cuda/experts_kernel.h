// The kernel of cuda_experts_linear, for one kind of codes in each file that includes this.
//
// A thread block takes tiles of 16 rows of one expert and up to 8 of its tokens (runs.h): what a block of linear_kernel.h does, with pointers
// moved to the expert.
#pragma once

#include "experts.h"
#include "linear_kernel.h"
#include "runs.h"

namespace hfq {
namespace {

template <class Kind, class T, bool kZeros, int kTiles>
__global__ void __launch_bounds__(kMostThreads, 2) experts_kernel(const ExpertsParams p) {
  // Neighbouring thread blocks read the same weights if their expert has many tokens: the second finds them in L2.
  const Routing& r = p.routing;
  const int64_t first_tile = static_cast<int64_t>(blockIdx.x / r.slots) * kTiles;
  wait_for_previous_kernel();  // counts
  const Run run = find_run<8>(r, static_cast<uint32_t>(p.linear.tokens), blockIdx.x % r.slots);
  if (run.first >= run.end) return;
  if (run.expert == r.experts) {
    const int64_t all = p.linear.weight.out_features;
    return store_zeros(static_cast<uint16_t*>(p.linear.y), all, run, first_tile * kTileRows, kTiles * kTileRows, kMostThreads);
  }
  LinearParams own = p.linear;
  own.weight.qweight += run.expert * r.qweight_bytes;
  own.weight.scales = static_cast<const uint8_t*>(own.weight.scales) + run.expert * r.scale_bytes;
  if constexpr (kZeros) own.weight.zeros = static_cast<const uint8_t*>(own.weight.zeros) + run.expert * r.scale_bytes;
  if (own.bias) own.bias = static_cast<const uint8_t*>(own.bias) + run.expert * r.bias_bytes;
  own.tokens = run.end;
  linear_block<Kind, T, kZeros, kTiles>(own, first_tile, run.first);
}

// ---- launcher ----

template <class Kind, class T, bool kZeros, int kTiles>
const char* launch_expert_tiles(const ExpertsParams& params, cudaStream_t stream) {
  ExpertsParams p = params;
  const size_t shared = plan_ring<Kind, kZeros, kTiles>(p.linear, p.linear.tokens < 8 ? p.linear.tokens : 8);
  const int64_t tiles = (p.linear.weight.out_features + kTileRows - 1) / kTileRows;
  const unsigned blocks = static_cast<unsigned>((tiles + kTiles - 1) / kTiles * p.routing.slots);
  return launch_early(experts_kernel<Kind, T, kZeros, kTiles>, blocks, kMostThreads, shared, stream, p);
}

template <class Kind, class T>
const char* launch_expert_dtype(const ExpertsParams& p, cudaStream_t stream) {
  if constexpr (Kind::kMayHaveZeros)
    if (p.linear.weight.zeros) return launch_expert_tiles<Kind, T, true, 1>(p, stream);
  // As in linear_kernel.h: two tiles share activations where each expert has several tokens and there are tiles for all multiprocessors.
  const int64_t tiles = (p.linear.weight.out_features + kTileRows - 1) / kTileRows;
  if (p.linear.tokens > 2 * p.routing.experts && tiles * p.routing.slots >= int64_t{4} * multiprocessors()) {
    LinearParams two = p.linear;
    const size_t shared = plan_ring<Kind, false, 2>(two, two.tokens < 8 ? two.tokens : 8);
    if (shared <= most_shared_bytes()) return launch_expert_tiles<Kind, T, false, 2>(p, stream);
  }
  return launch_expert_tiles<Kind, T, false, 1>(p, stream);
}

template <class Kind>
const char* launch_experts_of(const ExpertsParams& p, cudaStream_t stream) {
  return p.linear.x_dtype == kBFloat16 ? launch_expert_dtype<Kind, BFloat16>(p, stream) : launch_expert_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
