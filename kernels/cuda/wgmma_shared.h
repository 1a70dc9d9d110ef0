// 33 to 64 tokens, x for two blocks at once: staged blocks of neighbouring rows are a cluster, each of which asks for one half of the columns of x
// for both. It comes in the order of stages (wgmma_tokens.cu), 8 KB in one copy, so that nobody puts it in order, and two warps copy weights. A stage
// is free when both blocks have read it. Of an odd number of blocks of rows the last pair has one without rows, which only helps to copy x.
//
// Counted for a chunk of 256 rows and 64 tokens, as in wgmma_staged.h: a scheduler has some 770 instructions (850 there), shared memory is busy for
// 910 clocks (1170), the way from L2 for 880 (1200), tensor cores for 1024. Not measured: HFQ_CUDA_WGMMA=shared takes it.
#pragma once

#include "wgmma_staged.h"

namespace hfq {
namespace {

template <class Block>
struct WgmmaSharedProducer : WgmmaStagedCopies<Block> {
  using Copies = WgmmaStagedCopies<Block>;
  using Copies::block, Copies::lane, Copies::p, Copies::warp;
  static_assert(Block::kNeighbours == 2);  // halves of the columns

  using Copies::Copies;

  __device__ __forceinline__ void run() const {
    if (warp < Block::kWeightWarps) this->copy_weights();
    if (warp == Block::kWeightWarps) {
      wait_for_previous_kernel();
      copy_x();
      this->gather();
      wait_until_all_is_read();
    }
    if (warp > Block::kWeightWarps) raise_flag_of_range(p, block);
  }

  // The block's half of each stage, to both blocks, by one lane. (All go through the loop: what the range is stays the same for whole warps.) The
  // neighbour's may come first.
  __device__ __forceinline__ void copy_x() const {
    const uint32_t own = block.neighbour() * Block::kHalf;
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
      const int64_t chunk = static_cast<int64_t>(segment.token_tile(p)) * segment.all + segment.chunk;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.workspace) + chunk * 2 * Block::kHalf + own;
#pragma unroll 1
      for (uint32_t i = 0; i < segment.chunks; ++i, turn.next(), from += 2 * Block::kHalf) {
        wait_together(block.empty(turn.at), (turn.round + 1) % 2);
        if (lane) continue;
        mbarrier_arrive_and_expect(block.full(turn.at), 2 * Block::kHalf);
        copy_bulk_to_blocks(block.stage(turn.at) + own, from, Block::kHalf, block.full(turn.at), 3);
      }
    }
  }

  // By both blocks: before, the neighbour may still arrive here, and copies be on the way from here to it.
  __device__ __forceinline__ void wait_until_all_is_read() const {
    const uint32_t chunks = block.first.chunks + block.first.left;
#pragma unroll 1
    for (uint32_t at = 0; at < Block::kStages; ++at)
      if (const uint32_t rounds = (chunks + Block::kStages - 1 - at) / Block::kStages) mbarrier_wait(block.empty(at), (rounds + 1) % 2);
  }
};

}  // namespace
}  // namespace hfq
