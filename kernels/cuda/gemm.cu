// Which kernel multiplies, and the sum of splits.
#include "gemm.h"

#include "gemm_output.h"
#include "target.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;

// ---- kernel

// A thread adds what the splits have of four neighbouring rows for one token, in their order.
template <class T>
__global__ void __launch_bounds__(kThreads) add_splits_kernel(const GemmParams p) {
  const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows, count = p.tokens * padded;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 4;
  if (at >= count) return;
  const float4* from = reinterpret_cast<const float4*>(p.workspace + at);
  float4 sum = load(from);
  for (int split = 1; split < p.plan.splits; ++split) sum = plus(sum, load(from + split * (count / 4)));
  store_rows<T>(p, at / padded, at % padded, plus_extra(p, at, sum));
}

// ---- launcher

const char* launch_kind(const GemmParams& p, cudaStream_t stream) {
  return of_kind(p.weight, launch_gemm_int2, launch_gemm_int3, launch_gemm_int4, launch_gemm_int8, launch_gemm_table4, launch_gemm_e4m3)(p, stream);
}

uint32_t chunk_flush_mask(const Weight& w) { return flush_mask(w, (w.bits == 8 ? kChunkColumns<8> : kChunkColumns<4>) / kUnitColumns); }

}  // namespace

const char* launch_gemm(const LinearParams& params, cudaStream_t stream) {
  GemmParams p = {};
  static_cast<LinearParams&>(p) = params;
  p.plan = plan_gemm(params);
  p.token_tiles = static_cast<uint32_t>((p.tokens + p.plan.tokens - 1) / p.plan.tokens);
  p.flush_mask = chunk_flush_mask(p.weight);

  const char* error = launch_kind(p, stream);
  return error || p.plan.splits == 1 ? error : add_splits(p, stream);
}

const char* add_splits(const GemmParams& p, cudaStream_t stream) {
  const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
  const unsigned blocks = static_cast<unsigned>((p.tokens * padded / 4 + kThreads - 1) / kThreads);
  if (p.x_dtype == kBFloat16) return launch(add_splits_kernel<BFloat16>, blocks, kThreads, 0, stream, p);
  return launch(add_splits_kernel<Float16>, blocks, kThreads, 0, stream, p);
}

bool takes_experts(const ExpertsParams& params) {
  constexpr int64_t kMostPieces = int64_t{1} << 32;  // the kernel counts pieces of 16 bytes with 32 bits
  const LinearParams& l = params.linear;
  const Routing& r = params.routing;
  return l.tokens > 8 * r.experts && l.tokens * l.weight.in_features / 8 < kMostPieces && r.experts * r.qweight_bytes / 16 < kMostPieces;
}

const char* launch_gemm_experts(const ExpertsParams& params, cudaStream_t stream) {
  GemmParams p = {};
  static_cast<LinearParams&>(p) = params.linear;
  p.routing = params.routing;
  p.plan = plan_gemm_experts(params);
  p.routing.slots = p.token_tiles = static_cast<uint32_t>(expert_slots(p.tokens, p.routing.experts, p.plan.tokens));
  p.group_magic = group_magic(p.weight);
  p.flush_mask = chunk_flush_mask(p.weight);
  return launch_kind(p, stream);
}

}  // namespace hfq
