// The kernel of wgmma.h, for one kind of codes in each file that includes this.
//
// Up to 64 tokens: wgmma_staged.h, or wgmma_shared.h, brings x and weights to shared memory, wgmma_consumer.h multiplies. More: wgmma_pair.h,
// wgmma_rounded.h. All have ranges of all chunks of columns of all tiles of the output: wgmma_ranges.h.
#pragma once

#include <type_traits>

#include "wgmma_consumer.h"
#include "wgmma_pair.h"
#include "wgmma_shared.h"
#include "wgmma_staged.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFQ_WGMMA
#endif

namespace hfq {
namespace {

// What a thread block is made of.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
struct WgmmaParts {
  static constexpr bool kShares = kWay == WgmmaWay::kShared || kWay == WgmmaWay::kSharedHalf;
  using Block = WgmmaStagedBlock<Kind, T, kTokens, kWay == WgmmaWay::kStaged || kWay == WgmmaWay::kShared ? 16 : 8, kShares ? 2 : 1>;
  using Producer = typename std::conditional<kShares, WgmmaSharedProducer<Block>, WgmmaStagedProducer<Block>>::type;
  using Consumer = WgmmaConsumer<Block>;
};
template <class Kind, class T, int kTokens>
struct WgmmaParts<Kind, T, kTokens, WgmmaWay::kPair> {
  using Block = WgmmaPairBlock<Kind, kTokens>;
  using Producer = WgmmaPairProducer<Block>;
  using Consumer = WgmmaPairConsumer<Kind, T, Block>;
};

template <class Kind, class T, int kTokens, WgmmaWay kWay>
using WgmmaBlock = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;

template <class Kind, class T, int kTokens, WgmmaWay kWay>
__global__ void __launch_bounds__(WgmmaBlock<Kind, T, kTokens, kWay>::kThreads, WgmmaBlock<Kind, T, kTokens, kWay>::kResident)
    wgmma_kernel(const WgmmaParams p) {
#ifdef HFQ_WGMMA
  using Parts = WgmmaParts<Kind, T, kTokens, kWay>;
  using Block = typename Parts::Block;
  const Block block(p);
  let_next_kernel_start();
  if (threadIdx.x == 0) block.init_barriers();
  if constexpr (Block::kNeighbours > 1)
    sync_cluster_only();
  else
    sync_block();
  const int warp = own_warp();
  if (warp >= Block::kConsumers) {
    if constexpr (Block::kOfProducers < Block::kAtFirst) give_registers<Block::kOfProducers>();
    const typename Parts::Producer mine(p, block, warp - Block::kConsumers);
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
  }
#endif
}

// ---- launcher

// Clusters of so many blocks that run at a time; none for want of shared memory, or because another compiler has chosen other registers.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
int active_blocks(int cluster) {
  using Block = WgmmaBlock<Kind, T, kTokens, kWay>;
  // With fewer registers than they count on, warps would wait for them forever.
  constexpr int kRegisters = Block::kOfConsumers > Block::kAtFirst ? Block::kAtFirst : 0;
  return active_clusters<WgmmaParams, wgmma_kernel<Kind, T, kTokens, kWay>>(cluster, Block::kThreads, Block::kSharedBytes, kRegisters);
}

// What the kernel takes of a product, in `p`. False: it does not run here.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
bool plan_tokens(WgmmaParams& p, const RangeShape& shape) {
  using Block = WgmmaBlock<Kind, T, kTokens, kWay>;
  p.token_tiles = static_cast<uint32_t>(divided(p.tokens, kTokens)), p.of_token_tiles = reciprocal(p.token_tiles);
  p.cut = plan_ranges(p, shape, active_blocks<Kind, T, kTokens, kWay>(Block::kNeighbours));
  return p.cut.ranges > 0;
}

template <class Kind, class T, int kTokens, WgmmaWay kWay>
const char* launch_wgmma_tokens(const WgmmaParams& params, const RangeShape& shape, cudaStream_t stream) {
  using Block = WgmmaBlock<Kind, T, kTokens, kWay>;
  constexpr auto kKernel = wgmma_kernel<Kind, T, kTokens, kWay>;
  WgmmaParams p = params;
  p.tiles = static_cast<uint32_t>(divided(p.weight.out_features, kTileRows));
  p.tile_bytes = static_cast<uint32_t>(divided(p.weight.in_features, kBlockColumns<Block::kBits>)) * kBlockBytes<Block::kBits>;
  p.scale_bytes = static_cast<uint32_t>(p.weight.groups) * 8 * pair_bytes(p.weight.scale_dtype);
  if (!p.workspace) return "a product with wgmma has no workspace";  // linear_workspace has taken it for another kernel's
  if (!plan_tokens<Kind, T, kTokens, kWay>(p, shape)) return "the kernel with wgmma does not run here";  // takes_wgmma asks before
  if constexpr (Block::kNeighbours > 1)
    if (const char* error = launch_arrange(p, stream)) return error;
  place_ranges(p, shape);
  if constexpr (Block::kNeighbours == 1)
    return launch_early(kKernel, p.cut.ranges, Block::kThreads, Block::kSharedBytes, stream, p);
  else
    return launch_clusters(kKernel, Block::kNeighbours * p.cut.ranges, Block::kNeighbours, Block::kThreads, Block::kSharedBytes, stream, p);
}

// `use` of how many tokens of this product a thread block takes, the fewest that hold all, and which way, as types, and of the shape. (Where it does
// not run, because another compiler has chosen other registers, takes_wgmma says no and gemm_kernel.h is taken.)
template <class Kind, class Use>
auto with_block(const LinearParams& p, const Use& use) {
  constexpr std::integral_constant<int, 32> k32;
  constexpr std::integral_constant<int, kStagedTokens> k64;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kStaged> staged;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kStagedHalf> half;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kShared> shared;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kSharedHalf> shared_half;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kPair> pair;
  const RangeShape shape = range_shape(p);
  if (shape.tokens == kPairTokens) return use(std::integral_constant<int, kPairTokens>{}, pair, shape);
  if (shape.tokens == kPairTokens / 2) return use(std::integral_constant<int, kPairTokens / 2>{}, pair, shape);
  if (shape.tokens == 16) return use(std::integral_constant<int, 16>{}, half, shape);
  if (shape.tokens == 32) return shape.rows == 256 ? use(k32, staged, shape) : use(k32, half, shape);
  if (shape.blocks > 1) return shape.rows == 512 ? use(k64, shared, shape) : use(k64, shared_half, shape);
  return shape.rows == 256 ? use(k64, staged, shape) : use(k64, half, shape);
}

template <class Kind>
bool runs_wgmma_of(const LinearParams& p) {
  WgmmaParams planned = {};
  static_cast<LinearParams&>(planned) = p;
  return with_block<Kind>(p, [&](auto tokens, auto way, const RangeShape& shape) {
    return p.x_dtype == kBFloat16 ? plan_tokens<Kind, BFloat16, tokens, way>(planned, shape)
                                  : plan_tokens<Kind, Float16, tokens, way>(planned, shape);
  });
}

template <class Kind>
const char* launch_wgmma_of(const WgmmaParams& p, cudaStream_t stream) {
  return with_block<Kind>(p, [&](auto tokens, auto way, const RangeShape& shape) {
    return p.x_dtype == kBFloat16 ? launch_wgmma_tokens<Kind, BFloat16, tokens, way>(p, shape, stream)
                                  : launch_wgmma_tokens<Kind, Float16, tokens, way>(p, shape, stream);
  });
}

}  // namespace
}  // namespace hfq
