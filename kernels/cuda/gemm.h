// The part of hfq::cuda_linear for more tokens than a matrix instruction takes: thread blocks, and how a product is cut into them.
#pragma once

#include "experts.h"

namespace hfq {

// What to change when a GPU has been measured stands here, in GemmPlan's choice (gemm_plan.cu), and nowhere else.
constexpr int kGemmWarps = 8;
constexpr int kGemmThreads = 32 * kGemmWarps;
// Tiles of rows of a warp: two for each operand that it reads from shared memory. With one, 8 tokens of 32 columns (4 reads of 128 bytes
// by one of 4 schedulers) would take as long as their two matrix instructions; with four, sums do not fit the registers.
constexpr int kWarpTiles = 2;
constexpr int kMostTokens = 64;  // of a thread block: 128 registers of sums
constexpr int kMostStages = 4;   // of the pipeline from global to shared memory
constexpr int kMostSplits = 16;  // of the columns over thread blocks

// Columns between two barriers. 8-bit codes have half as many, so that two stages fit the 99 KiB of a consumer GPU.
template <int kBits>
constexpr int kChunkColumns = kBits == 8 ? 64 : 128;

// Bytes of each unit and warp in a stage for scales, and as many for zero points: 2 tiles of 16 numbers.
constexpr int kScaleBytes = kWarpTiles * kTileRows * 4;

struct GemmPlan {
  int32_t tokens;         // of a thread block: 16, 32 or 64
  int32_t column_shift;   // 2^column_shift warps take different columns, 8 >> column_shift different rows
  int32_t splits;         // thread blocks that share the columns of one tile of the output
  int32_t split_chunks;   // chunks of columns of each
  int32_t stages;         // 2 to kMostStages
  int32_t stage_bytes;    // of shared memory
  int32_t sums_bytes;     // of shared memory, for sums of activations
  int32_t shared_bytes;   // all of it
};

struct GemmParams : LinearParams {
  GemmPlan plan;
  float* extra;           // [M, 16 * N16] that is added to the product (spqr_gemm.h), or null
  Routing routing;        // runs of `plan.tokens` tokens, where there are several experts
};

// Sums of all splits behind each other, [splits, M, 16 * N16] float32: what LinearParams::workspace needs; 0 if there is one split.
inline int64_t workspace_floats(const LinearParams& p, const GemmPlan& plan) {
  const int64_t rows = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
  return plan.splits > 1 ? plan.splits * p.tokens * rows : 0;
}

// Of a warp whose weights have other statistics than scales and zero points (spqr_gemm.h): bytes of them in a stage, and of what it decodes.
struct GemmStats {
  int64_t stage_bytes, number_bytes;
};

GemmPlan plan_gemm(const LinearParams& params, const GemmStats* stats = nullptr);
// For runs of tokens that `slots` thread blocks take, of the experts' average length.
GemmPlan plan_gemm_experts(const ExpertsParams& params, const GemmStats* stats = nullptr);

// Whether experts have so many tokens that reading their weights once for several matrix instructions pays, and the kernel can count them.
bool takes_experts(const ExpertsParams& params);

// Enqueues the kernel that adds the sums of all splits, `extra` and the bias.
const char* add_splits(const GemmParams& params, cudaStream_t stream);

// Enqueues the kernels; launch_linear has set what is the launcher's to set in LinearParams.
const char* launch_gemm(const LinearParams& params, cudaStream_t stream);
const char* launch_gemm_experts(const ExpertsParams& params, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_gemm.
const char* launch_gemm_int2(const GemmParams& params, cudaStream_t stream);
const char* launch_gemm_int3(const GemmParams& params, cudaStream_t stream);
const char* launch_gemm_int4(const GemmParams& params, cudaStream_t stream);
const char* launch_gemm_int8(const GemmParams& params, cudaStream_t stream);
const char* launch_gemm_table4(const GemmParams& params, cudaStream_t stream);
const char* launch_gemm_e4m3(const GemmParams& params, cudaStream_t stream);

}  // namespace hfq
