// The part of hfq::cuda_linear for 9 and more tokens on compute capability 9.0, with instructions of four warps (wgmma).
#pragma once

#include "linear.h"

namespace hfq {

constexpr int kWgmmaColumns = 128;     // of a stage
constexpr int kMostClusterBlocks = 8;  // that any GPU of compute capability 9.0 takes
constexpr int kLargeTokens = 128;      // of a thread block of wgmma_large.h
constexpr int kPairTokens = 256;       // of wgmma_pair.h
// Of shared memory: all that a thread block may have. 28 KiB are left to the L1 cache, through which x goes, 16 KiB at a time.
constexpr int kMostWgmmaBytes = 227 << 10;

struct WgmmaPlan {
  int32_t splits;        // thread blocks that share the columns of one tile of the output: a cluster; 0 if none runs
  int32_t split_chunks;  // kWgmmaColumns columns each, of each of them
};

struct WgmmaParams : LinearParams {
  WgmmaPlan plan;
};

// What a thread block of a kernel takes, how many blocks of neighbouring rows share x, and how many clusters of those run at a time, each cut into so
// many.
struct WgmmaShape {
  int32_t rows, tokens, neighbours;
  int (*active_clusters)(int splits);
};

WgmmaPlan plan_wgmma(const LinearParams& params, const WgmmaShape& shape);

// Whether launch_linear takes these kernels for more than few tokens: where they are faster than gemm_kernel.h, unless HFQ_CUDA_WGMMA is 0; with 1 or
// "large" elsewhere as well.
bool takes_wgmma(const LinearParams& params);

// Whether a product that takes them takes large blocks: more than 64 tokens with a weight that is not small, or with HFQ_CUDA_WGMMA=large any.
bool takes_large_wgmma(const LinearParams& params);

// Of a thread block, then: kPairTokens of more than kLargeTokens if HFQ_CUDA_TRY has "tokens256".
int32_t large_tokens(const LinearParams& params);

// Floats of the workspace of a product that takes these kernels.
int64_t wgmma_workspace(const LinearParams& params);

// Of x in the order of large blocks; and what enqueues the kernel that writes it to the workspace so (wgmma_tokens.cu). Words and pieces of 16 bytes
// are in the places of wgmma_block.h; numbers of tokens and columns that do not exist are zeros.
int64_t arranged_floats(const LinearParams& params);
const char* launch_arrange(const LinearParams& params, cudaStream_t stream);

// Whether the kernels are there for the current device: those of a build for sm_90 without the "a" are empty.
bool wgmma_was_compiled();

// Enqueues the kernel; launch_linear has set what is the launcher's to set in LinearParams.
const char* launch_wgmma(const LinearParams& params, cudaStream_t stream);

// One for each kind of codes, so that they are compiled side by side; called by launch_wgmma and takes_wgmma.
const char* launch_wgmma_int2(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int2(const LinearParams& params);
const char* launch_wgmma_int3(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int3(const LinearParams& params);
const char* launch_wgmma_int4(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int4(const LinearParams& params);
const char* launch_wgmma_int8(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_int8(const LinearParams& params);
const char* launch_wgmma_table4(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_table4(const LinearParams& params);
const char* launch_wgmma_e4m3(const WgmmaParams& params, cudaStream_t stream);
bool runs_wgmma_e4m3(const LinearParams& params);

}  // namespace hfq
