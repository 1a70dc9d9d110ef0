// From stages to sums for 129 and more tokens: 128 rows and 256 tokens of a thread block, and x for two blocks at once.
//
// Of 256 tokens a block of wgmma_large.h takes 128, so that each weight is unpacked twice. Here it is unpacked once, for one tile of a warp: 278
// instructions for a chunk (4 bits, bfloat16, scales in two parts; 226 with scales as stored, 511 through float32) in place of 419, for the same 2048
// clocks of tensor cores. Two such warps are 556 of a scheduler. A unit's operands are 8 registers, so that there is room for those of four: one unit
// runs, one waits behind it, the next one is unpacked.
//
// x would cost 64 KB of L2 for each chunk, with 8 KB of codes 36 bytes a clock of a multiprocessor, of 28 that are published. So two blocks of
// neighbouring rows are a pair, each of which asks for half of x for both: 20 bytes a clock. A stage of x is free when both have read it. A
// cluster is a pair, or as many of them as share the columns. Of an odd number of blocks of rows the last pair has one without rows, which only
// helps to copy x.
// Expected, none of it measured: 2050 to 2200 clocks a chunk, where wgmma_large.h takes 2740 with as many tokens.
#pragma once

#include "wgmma_rounded.h"

namespace hfq {
namespace {

// Two rings in place of one (wgmma_block.h), since three whole chunks of both find no room: of x with 64 columns a stage, alike in both blocks, and
// of weights with a chunk a stage. Of 4 bits five stages each.
template <class Kind, class T>
struct WgmmaPairBlock {
  static constexpr int kTokens = kPairTokens, kBits = Kind::kCodeBits;
  static constexpr int kTiles = 8, kRows = kTiles * kTileRows, kWarpTiles = 1, kNeighbours = 2;
  static constexpr int kConsumers = kTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  static constexpr int kWeightWarps = 2;  // of the producers; another one copies x
  static constexpr int kAtFirst = 168, kOfConsumers = 216, kOfProducers = 72;  // registers, as in wgmma_block.h
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kSums = kTokens / 2;

  static constexpr int kXStage = kTokens * 128, kXShare = kXStage / kNeighbours;
  static constexpr int kCodesAt = 0, kScalesAt = kTiles * kBytes, kScaleBytes = kUnits * 64, kZerosAt = kScalesAt + kTiles * kScaleBytes;
  static constexpr int kStage = kZerosAt + (Kind::kMayHaveZeros ? kTiles * kScaleBytes : 0);
  // Shared memory: the ring of x, that of weights, which has three chunks or more, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 256;
  static constexpr int kRoom = kMostWgmmaBytes - kTableBytes - kBarrierBytes, kXStages = (kRoom - 3 * kStage) / kXStage;
  static constexpr int kXRing = kXStages * kXStage, kStages = (kRoom - kXRing) / kStage;
  static constexpr int kRing = kXRing + kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kXStages >= 5 && kTokens * (kRows + 4) * 4 <= kXRing && 8 * (2 * (kXStages + kStages) + 2) <= kBarrierBytes);

  uint8_t* memory;                       // the rings begin here
  uint32_t ring, barriers;               // where those are, as instructions count
  uint32_t splits, split, neighbour, first_token, first_tile;
  uint32_t chunk, chunks;                // the first one, and how many

  __device__ __forceinline__ explicit WgmmaPairBlock(const WgmmaParams& p) {
    memory = swizzled_memory();
    ring = shared_address(memory), barriers = kept(ring + kRing + kTableBytes);
    splits = p.plan.splits;
    const uint32_t all = static_cast<uint32_t>((p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns);
    const uint32_t pair = blockIdx.x / (kNeighbours * splits);
    split = blockIdx.x % splits, neighbour = blockIdx.x / splits % kNeighbours;
    first_token = pair % p.token_tiles * kTokens;
    first_tile = (pair / p.token_tiles * kNeighbours + neighbour) * kTiles;
    chunk = split * p.plan.split_chunks;
    chunks = chunk < all ? (all - chunk < static_cast<uint32_t>(p.plan.split_chunks) ? all - chunk : p.plan.split_chunks) : 0;
  }

  // Which block of the cluster has another part of the columns, of these rows or of the neighbour's.
  __device__ __forceinline__ uint32_t rank_of(uint32_t other_split) const { return rank_of(neighbour, other_split); }
  __device__ __forceinline__ uint32_t rank_of(uint32_t other, uint32_t other_split) const { return other * splits + other_split; }

  __device__ __forceinline__ uint32_t x_stage(uint32_t at) const { return ring + at * kXStage; }
  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + kXRing + at * kStage; }
  // Barriers of a stage: it is there, all have read it: that of x, those of both blocks.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t x_full(uint32_t at) const { return barriers + 16 * kStages + 8 * at; }
  __device__ __forceinline__ uint32_t x_empty(uint32_t at) const { return x_full(at) + 8 * kXStages; }
  // The table is filled; all have read all of x, for good.
  __device__ __forceinline__ uint32_t filled() const { return barriers + 16 * (kStages + kXStages); }
  __device__ __forceinline__ uint32_t drained() const { return filled() + 8; }

  // By one thread, before a barrier of the cluster: what the neighbour copies arrives here, too.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full(i), kWeightWarps), mbarrier_init(empty(i), kConsumers);
    for (int i = 0; i < kXStages; ++i) mbarrier_init(x_full(i), 1), mbarrier_init(x_empty(i), kNeighbours * kConsumers);
    mbarrier_init(filled(), 32 * kConsumers);
    mbarrier_init(drained(), kConsumers);
    fence_mbarrier_init();
  }
};

template <class Block>
struct WgmmaPairProducer {
  const WgmmaParams& p;
  const Block& block;
  int warp;

  __device__ __forceinline__ WgmmaPairProducer(const WgmmaParams& params, const Block& b, int own) : p(params), block(b), warp(own) {}

  __device__ __forceinline__ void run() const {
    if (warp < Block::kWeightWarps) copy_weights();
    if (warp == Block::kWeightWarps && threadIdx.x % 32 == 0) copy_x();
    sync_warp();                 // what follows takes whole warps
    wait_for_previous_kernel();  // which may read the outputs' memory
  }

  __device__ __forceinline__ void copy_weights() const {
    WgmmaWeights<Block> weights(p, block, warp);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next()) {
      if (turn.round) mbarrier_wait(block.empty(turn.at), (turn.round - 1) % 2);
      sync_warp();  // a lane that copies nothing could come so late that it sees the bit of the next phase but one
      weights.copy(turn.at, 0);
    }
  }

  // By one thread: of each stage the block's share, to both blocks. The neighbour's share may come first.
  __device__ __forceinline__ void copy_x() const {
    const int64_t chunks = (p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns, tile = block.first_token / Block::kTokens;
    const uint32_t share = block.neighbour * Block::kXShare, both = (1u | 1u << block.splits) << block.split;
    const uint8_t* from = reinterpret_cast<const uint8_t*>(p.workspace) + (tile * chunks + block.chunk) * 2 * Block::kXStage + share;
    Turn<Block::kXStages> turn;
    wait_for_previous_kernel();
#pragma unroll 1
    for (uint32_t i = 0; i < 2 * block.chunks; ++i, turn.next(), from += Block::kXStage) {
      if (turn.round) mbarrier_wait(block.x_empty(turn.at), (turn.round - 1) % 2);
      mbarrier_arrive_and_expect(block.x_full(turn.at), Block::kXStage);
      copy_bulk_to_blocks(block.x_stage(turn.at) + share, from, Block::kXShare, block.x_full(turn.at), both);
    }
  }
};

template <class Kind, class T, class Block>
struct WgmmaPairConsumer : WgmmaRounded<Kind, T, Block, 4> {
  using Rounded = WgmmaRounded<Kind, T, Block, 4>;
  using Rounded::a, Rounded::block, Rounded::kUnits, Rounded::lane, Rounded::sums;
  using Rounded::Rounded;

  // Units u and later of a chunk. While the instructions of the one before run and this one's wait, the next one is unpacked. `first`: no other chunk
  // is behind; `more`: another one follows.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void multiply(uint64_t x, Turn<Block::kXStages>& x_turn, Turn<Block::kStages>& turn, uint32_t unit, bool first,
                                           bool more) {
    if (u % 2 == 0) mbarrier_wait(block.x_full(x_turn.at), x_turn.round % 2);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j) wgmma(T{}, sums[0], a[u][0][j], x + x_turn.at * (Block::kXStage / 16) + u % 2 * 4 + 2 * j, true);
    wgmma_commit();
    if constexpr (u + 1 < kUnits) {
      this->template unpack<kScaling, kWhole, u + 1>(block.stage(turn.at), unit);
    } else if (more) {
      mbarrier_wait(block.full(turn.at), turn.round % 2);
      this->template unpack<kScaling, kWhole, 0>(block.stage(turn.at), unit + kUnits);
    }
    if (u + 2 == kUnits) {  // nobody reads these weights any more
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.empty(turn.at));
      turn.next();
    }
    wgmma_wait<1>();
    if (u % 2 == 0 && !(u == 0 && first)) {  // nothing reads the stage of x behind any more
      sync_warp();
      const uint32_t behind = x_turn.at ? x_turn.at - 1 : Block::kXStages - 1;
      if (lane < Block::kNeighbours) mbarrier_arrive_of_block(block.x_empty(behind), block.rank_of(lane, block.split));
    }
    if (u % 2 == 1) x_turn.next();
    if constexpr (u + 1 < kUnits) multiply<kScaling, kWhole, u + 1>(x, x_turn, turn, unit, first, more);
  }

  template <Scaling kScaling, bool kWhole>
  __device__ __forceinline__ void run_chunks() {
    const uint64_t x = x_descriptor(block.ring);
    Turn<Block::kXStages> x_turn;
    Turn<Block::kStages> turn;
    if (block.chunks) {
      mbarrier_wait(block.full(0), 0);
      this->template unpack<kScaling, kWhole, 0>(block.stage(0), block.chunk * kUnits);
    }
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i)
      multiply<kScaling, kWhole, 0>(x, x_turn, turn, (block.chunk + i) * kUnits, i == 0, i + 1 < block.chunks);
    wgmma_wait<0>(sums[0]);
  }

  __device__ __forceinline__ void run() { run_rounded(*this); }
};

}  // namespace
}  // namespace hfq
