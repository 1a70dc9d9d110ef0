// The part of hfq::cuda_spqr_linear and cuda_spqr_experts_linear for more tokens than a matrix instruction takes.
#pragma once

#include "gemm.h"
#include "spqr.h"

namespace hfq {

// `weight` has the sizes of `spqr` and no tensors; `group_magic` is that of parts of 16 columns, `extra` products of
// outliers.
struct SpqrGemmParams : GemmParams {
  SpqrWeight spqr;      // of experts, the first one
  int64_t stat_bytes;   // from one expert's stats to the next
  uint16_t* x_columns;  // [token tiles, K, tokens of a tile]: x as outliers are multiplied with it
};

// Of a warp, for the numbers of a chunk: scale and offset of two rows for each group of 16 columns.
constexpr int64_t kSpqrNumberBytes = kWarpTiles * (kChunkColumns<4> / kHalfColumns) * 8 * 16;

int64_t spqr_gemm_workspace(const SpqrLinearParams& params);
int64_t spqr_gemm_workspace(const SpqrExpertsParams& params);
const char* launch_spqr_gemm(const SpqrLinearParams& params, cudaStream_t stream);
const char* launch_spqr_gemm(const SpqrExpertsParams& params, cudaStream_t stream);

// The dense part, one for each number of bits.
const char* launch_spqr_gemm2(const SpqrGemmParams& params, cudaStream_t stream);
const char* launch_spqr_gemm3(const SpqrGemmParams& params, cudaStream_t stream);
const char* launch_spqr_gemm4(const SpqrGemmParams& params, cudaStream_t stream);

}  // namespace hfq
