// The kernel of wgmma.h, for one kind of codes in each file that includes this.
//
// Four warps fill a ring of stages (wgmma_block.h), the others multiply (wgmma_consumer.h).
// (More than 64 tokens with large weights: wgmma_large.h, wgmma_pair.h; 17 to 64: wgmma_staged.h.)
//
// x costs as many bytes of L2 as codes do: 64 tokens as many as 256 rows of 4 bits. So 256 rows share it; 128 tokens leave registers for 128 rows
// only, which suits small weights. Few rows leave multiprocessors without work: then the columns are cut, the blocks that share rows are a cluster,
// and each adds up its part of the rows from all blocks' shared memory, in their order. (Staged blocks and pairs have ranges in place of clusters:
// wgmma_ranges.h.)
#pragma once

#include <type_traits>

#include "gemm_output.h"
#include "wgmma_consumer.h"
#include "wgmma_large.h"
#include "wgmma_pair.h"
#include "wgmma_staged.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFQ_WGMMA
#endif

namespace hfq {
namespace {

// ---- from sums to memory: blocks of other columns are added, in their order, and rows are stored side by side

// A warp has a token at a time, a lane four rows: several tokens at once, since a neighbour's memory takes some 1000 clocks.
template <class T, class Block>
__device__ __forceinline__ void store_outputs(const WgmmaParams& p, const Block& block, const float* partial) {
  constexpr uint32_t kFours = Block::kRows / 4, kWarps = Block::kThreads / 32, kAtOnce = 2;
  const uint32_t splits = p.plan.splits, share = (kFours + splits - 1) / splits, warp = threadIdx.x / 32;  // each block of the cluster takes as many
  const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows, left = p.tokens - block.first_token;
  const uint32_t tokens = left < Block::kTokens ? static_cast<uint32_t>(left) : Block::kTokens;
  for (uint32_t at = threadIdx.x % 32; at < share; at += 32) {
    const uint32_t four = block.split * share + at;
    const int64_t n = static_cast<int64_t>(block.first_tile) * kTileRows + 4 * four;
    if (four >= kFours || n >= padded) continue;
    for (uint32_t token = warp; token < tokens; token += kAtOnce * kWarps) {
      const float* const own = partial + token * (Block::kRows + 4) + 4 * four;
      float4 sums[kAtOnce] = {};
#pragma unroll 1
      for (uint32_t split = 0; split < splits; ++split) {
        float4 parts[kAtOnce] = {};
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) {
          const float4* const of_token = reinterpret_cast<const float4*>(own + i * kWarps * (Block::kRows + 4));
          if (token + i * kWarps < tokens) parts[i] = splits == 1 ? *of_token : load_of_block(of_token, split);
        }
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) sums[i] = plus(sums[i], parts[i]);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i)
        if (token + i * kWarps < tokens) store_rows<T>(p, block.first_token + token + i * kWarps, n, sums[i]);
    }
  }
}

// ---- kernel

// What a thread block is made of.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
struct WgmmaParts {
  static_assert(kWay == WgmmaWay::kThroughRegisters);
  using Block = WgmmaBlock<Kind, T, kTokens, kWay>;
  using Producer = WgmmaProducer<Block>;
  using Consumer = WgmmaConsumer<Kind, T, Block>;
};
template <class Kind, class T, int kTokens, int kTiles>
struct WgmmaStagedParts {
  using Block = WgmmaStagedBlock<Kind, T, kTokens, kTiles>;
  using Producer = WgmmaStagedProducer<Block>;
  using Consumer = WgmmaStagedConsumer<Kind, T, Block>;
};
template <class Kind, class T, int kTokens>
struct WgmmaParts<Kind, T, kTokens, WgmmaWay::kStaged> : WgmmaStagedParts<Kind, T, kTokens, 16> {};
template <class Kind, class T, int kTokens>
struct WgmmaParts<Kind, T, kTokens, WgmmaWay::kStagedHalf> : WgmmaStagedParts<Kind, T, kTokens, 8> {};
template <class Kind, class T>
struct WgmmaParts<Kind, T, kLargeTokens, WgmmaWay::kLarge> {
  using Block = WgmmaBlock<Kind, T, kLargeTokens, WgmmaWay::kLarge>;
  using Producer = WgmmaLargeProducer<Block>;
  using Consumer = WgmmaLargeConsumer<Kind, T, Block>;
};
template <class Kind, class T>
struct WgmmaParts<Kind, T, kPairTokens, WgmmaWay::kPair> {
  using Block = WgmmaPairBlock<Kind, T>;
  using Producer = WgmmaPairProducer<Block>;
  using Consumer = WgmmaPairConsumer<Kind, T, Block>;
};
// Those of wgmma_ranges.h, whose warps store outputs by themselves.
template <WgmmaWay kWay>
constexpr bool kHasRanges = kWay == WgmmaWay::kStaged || kWay == WgmmaWay::kStagedHalf || kWay == WgmmaWay::kPair;

template <class Kind, class T, int kTokens, WgmmaWay kWay>
__global__ void __launch_bounds__(WgmmaParts<Kind, T, kTokens, kWay>::Block::kThreads, 1) wgmma_kernel(const WgmmaParams p) {
#ifdef HFQ_WGMMA
  using Parts = WgmmaParts<Kind, T, kTokens, kWay>;
  using Block = typename Parts::Block;
  constexpr bool kRanges = kHasRanges<kWay>;
  const Block block(p);
  let_next_kernel_start();
  if (threadIdx.x == 0) block.init_barriers();
  if constexpr (kWay == WgmmaWay::kPair)
    sync_cluster_only();
  else
    sync_block();
  const int warp = own_warp();
  if (warp >= Block::kConsumers) {
    if constexpr (Block::kOfProducers < Block::kAtFirst) give_registers<Block::kOfProducers>();
    typename Parts::Producer mine(p, block, warp - Block::kConsumers);
    mine.run();
  } else {
    if constexpr (Block::kOfConsumers > Block::kAtFirst) take_registers<Block::kOfConsumers>();
    if constexpr (Kind::kTable) {  // while the first copies are on the way
      TableCodes::fill<T>(block.memory + Block::kRing, p.weight.codebook);
      mbarrier_arrive(block.filled());
      mbarrier_wait(block.filled(), 0);
    }
    wait_for_previous_kernel();  // which may read what will be overwritten
    typename Parts::Consumer mine(p, block, warp);
    mine.run();
    if constexpr (!kRanges) {
      // In place of the stages, once nobody reads them.
      sync_warp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(block.drained());
      mbarrier_wait(block.drained(), 0);
      mine.store_sums(reinterpret_cast<float*>(block.memory));
    }
  }
  if constexpr (!kRanges) {  // whose consumers have stored all
    if (p.plan.splits > 1)
      sync_cluster();
    else
      sync_block();
    store_outputs<T>(p, block, reinterpret_cast<const float*>(block.memory));
    if (p.plan.splits > 1) sync_cluster_only();  // nobody's shared memory goes before all have read it
  }
#endif
}

// ---- launcher

// Clusters of so many blocks that run at a time; none for want of shared memory, or because another compiler has chosen other registers.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
int active_blocks(int cluster) {
  using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
  // With fewer registers than they count on, warps would wait for them forever.
  constexpr int kRegisters = Block::kOfConsumers > Block::kAtFirst ? Block::kAtFirst : 0;
  return active_clusters<WgmmaParams, wgmma_kernel<Kind, T, kTokens, kWay>>(cluster, Block::kThreads, Block::kSharedBytes, kRegisters);
}

// What the kernel takes of a product, in `p`. False: it does not run here.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
bool plan_tokens(WgmmaParams& p) {
  using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
  p.token_tiles = static_cast<uint32_t>(divided(p.tokens, kTokens));
  if constexpr (kHasRanges<kWay>) {
    p.cut = plan_ranges(p, range_shape(p), active_blocks<Kind, T, kTokens, kWay>(Block::kNeighbours));
    return p.cut.ranges > 0;
  } else {
    p.plan = plan_wgmma(p, {Block::kRows, kTokens, active_blocks<Kind, T, kTokens, kWay>});
    return p.plan.splits > 0;
  }
}

template <class Kind, class T, int kTokens, WgmmaWay kWay>
const char* launch_wgmma_tokens(const WgmmaParams& params, cudaStream_t stream) {
  using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
  constexpr auto kKernel = wgmma_kernel<Kind, T, kTokens, kWay>;
  WgmmaParams p = params;
  if (!plan_tokens<Kind, T, kTokens, kWay>(p)) return "the kernel with wgmma does not run here";  // takes_wgmma asks before
  if constexpr (kWay == WgmmaWay::kLarge || kWay == WgmmaWay::kPair)
    if (const char* error = launch_arrange(p, stream)) return error;
  if constexpr (kHasRanges<kWay>) {
    place_ranges(p, range_shape(p));
    return launch_clusters(kKernel, Block::kNeighbours * p.cut.ranges, Block::kNeighbours, Block::kThreads, Block::kSharedBytes, stream, p);
  }
  const unsigned cluster = p.plan.splits;
  const int64_t clusters = divided(p.weight.out_features, Block::kRows) * p.token_tiles;
  return launch_clusters(kKernel, static_cast<unsigned>(clusters * cluster), cluster, Block::kThreads, Block::kSharedBytes, stream, p);
}

// `use` of what a thread block takes of this product, as types: how many tokens, the fewest that hold all, and which way. (Where it does not run,
// because another compiler has chosen other registers, takes_wgmma says no and gemm_kernel.h is taken.)
template <class Kind, class Use>
auto with_block(const LinearParams& p, const Use& use) {
  constexpr std::integral_constant<int, 32> k32;
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kThroughRegisters> through_registers;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kStaged> staged;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kStagedHalf> half;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kLarge> large;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kPair> pair;
  if (p.tokens <= 16) return use(std::integral_constant<int, 16>{}, through_registers);
  if constexpr (Kind::kCodeBits == 8) {
    if (p.tokens <= 32) return use(k32, through_registers);
  } else if (takes_staged_wgmma(p)) {
    const bool all = range_shape(p).rows == 256;
    if (p.tokens <= 32) return all ? use(k32, staged) : use(k32, half);
    if constexpr (!Kind::kTable) return all ? use(k64, staged) : use(k64, half);
  }
  if (p.tokens <= 64) return use(k64, through_registers);
  if (!takes_large_wgmma(p)) return use(std::integral_constant<int, 128>{}, through_registers);
  if (takes_pairs(p)) return use(std::integral_constant<int, kPairTokens>{}, pair);
  return use(std::integral_constant<int, kLargeTokens>{}, large);
}

template <class Kind>
bool runs_wgmma_of(const LinearParams& p) {
  WgmmaParams planned = {};
  static_cast<LinearParams&>(planned) = p;
  return with_block<Kind>(p, [&](auto tokens, auto way) {
    return p.x_dtype == kBFloat16 ? plan_tokens<Kind, BFloat16, tokens, way>(planned) : plan_tokens<Kind, Float16, tokens, way>(planned);
  });
}

template <class Kind>
const char* launch_wgmma_of(const WgmmaParams& p, cudaStream_t stream) {
  return with_block<Kind>(p, [&](auto tokens, auto way) {
    return p.x_dtype == kBFloat16 ? launch_wgmma_tokens<Kind, BFloat16, tokens, way>(p, stream)
                                  : launch_wgmma_tokens<Kind, Float16, tokens, way>(p, stream);
  });
}

}  // namespace
}  // namespace hfq
