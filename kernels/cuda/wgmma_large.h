// From stages to sums for many tokens: 256 rows and 128 tokens, for which accumulators leave no registers for a second set of sums.
//
// So weights are rounded to 16 bits (wgmma_rounded.h). x comes in the order of stages (wgmma_tokens.cu).
// Each of 8 warps has two tiles, each of two warpgroups two instructions side by side. Tensor cores take 2048 clocks for a chunk of 128 tokens,
// while a scheduler issues some 880 instructions of consumers (4 bits, bfloat16, scales in two parts; through float32 1720). Measured on an H200:
// 2230 clocks.
#pragma once

#include "wgmma_rounded.h"

namespace hfq {
namespace {

// Fills stages, a quarter of each a warp, in bulk. (One warp whose lanes ask for all 33 copies of a chunk needs some 80 clocks for each, 2600 beside
// the 2048 of the tensor cores.)
template <class Block>
struct WgmmaLargeProducer {
  static constexpr int kXBytes = 2 * Block::kHalf, kShare = kXBytes / Block::kProducers;

  const Block& block;
  WgmmaWeights<Block> weights;
  uint32_t x_to;          // the warp's share of x, in a stage
  const uint8_t* x_from;  // of the chunk that is copied next

  __device__ __forceinline__ WgmmaLargeProducer(const WgmmaParams& p, const Block& b, int warp)
      : block(b), weights(p, b, warp, b.first_tile, b.chunk), x_to(warp * kShare) {
    const int64_t chunks = (p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns, tile = block.first_token / Block::kTokens;
    x_from = reinterpret_cast<const uint8_t*>(p.workspace) + (tile * chunks + block.chunk) * kXBytes + x_to;
  }

  __device__ __forceinline__ void run() {
    const uint32_t ahead = block.chunks < Block::kStages ? block.chunks : Block::kStages;
#pragma unroll 1
    for (uint32_t i = 0; i < ahead; ++i) weights.copy(i, kShare);
    wait_for_previous_kernel();
#pragma unroll 1
    for (uint32_t i = 0; i < ahead; ++i) copy_x(i);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (uint32_t i = ahead; i < block.chunks; ++i, turn.next()) {
      mbarrier_wait(block.empty(turn.at), turn.round % 2);
      sync_warp();  // a lane that copies nothing could come so late that it sees the bit of the next phase but one
      weights.copy(turn.at, kShare);
      copy_x(turn.at);
    }
  }

  __device__ __forceinline__ void copy_x(uint32_t at) {
    if (threadIdx.x % 32 == 0) copy_bulk(block.stage(at) + x_to, x_from, kShare, block.full(at));
    x_from += kXBytes;
  }
};

template <class Kind, class T, class Block>
struct WgmmaLargeConsumer : WgmmaRounded<Kind, T, Block, 2> {
  using Rounded = WgmmaRounded<Kind, T, Block, 2>;
  using Rounded::a, Rounded::block, Rounded::kTiles, Rounded::kUnits, Rounded::lane, Rounded::sums;
  using Rounded::Rounded;

  // Units u and later of the stage `turn`, of which `x` describes the activations. `first`: no other one is behind; `more`: another one follows.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void multiply(uint64_t x, const Turn<Block::kStages>& turn, uint32_t unit, bool first, bool more) {
    constexpr int kFrom = (u / 2 * Block::kHalf + u % 2 * 64) / 16;
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < kTiles; ++i) wgmma(T{}, sums[i], a[u % 2][i][j], x + kFrom + 2 * j, true);
    wgmma_commit();
    wgmma_wait<1>();
    if (u == 0 && !first) {  // nothing reads the stage behind any more
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.empty(turn.at ? turn.at - 1 : Block::kStages - 1));
    }
    if constexpr (u + 1 < kUnits) {
      this->template unpack<kScaling, kWhole, u + 1>(block.stage(turn.at), unit);
      multiply<kScaling, kWhole, u + 1>(x, turn, unit, first, more);
    } else if (more) {
      Turn<Block::kStages> next = turn;
      next.next();
      mbarrier_wait(block.full(next.at), next.round % 2);
      this->template unpack<kScaling, kWhole, 0>(block.stage(next.at), unit + kUnits);
    }
  }

  template <Scaling kScaling, bool kWhole>
  __device__ __forceinline__ void run_chunks() {
    const uint64_t x = x_descriptor(block.ring);
    Turn<Block::kStages> turn;
    if (block.chunks) {
      mbarrier_wait(block.full(0), 0);
      this->template unpack<kScaling, kWhole, 0>(block.ring, block.chunk * kUnits);
    }
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next())
      multiply<kScaling, kWhole, 0>(x + turn.at * (Block::kStage / 16), turn, (block.chunk + i) * kUnits, i == 0, i + 1 < block.chunks);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) wgmma_wait<0>(sums[i]);
  }

  __device__ __forceinline__ void run() { run_rounded(*this); }
};

}  // namespace
}  // namespace hfq
