// 65 and more tokens: 128 rows and up to 256 tokens of a thread block, and x for two blocks at once.
//
// Of so many tokens accumulators leave no registers for a second set of sums: weights are multiplied by their scales before, in 16 bits
// (wgmma_rounded.h). Each is unpacked once, for one tile of a warp: 256 instructions for a chunk (4 bits, bfloat16, scales in two parts; 210 with
// scales as stored, 491 through float32), for which tensor cores take 2048 clocks with 256 tokens, 1024 with 128. Two such warps are 512 of a
// scheduler. A unit's operands are 8 registers, so that there is room for those of four: one unit runs, one waits behind it, the next one is
// unpacked. Measured on an H200 with 256 tokens: 2500 clocks.
//
// x would cost 64 KB of L2 for each chunk of 256 tokens, with 8 KB of codes 36 bytes a clock of a multiprocessor, of 28 that are published. So two
// blocks of neighbouring rows are a pair, a cluster, each of which asks for half of x for both: 20 bytes a clock. A stage of x is free when both have
// read it. Of an odd number of blocks of rows the last pair has one without rows, which only helps to copy x. It comes in the order of stages
// (wgmma_tokens.cu), so that it is copied in bulk.
#pragma once

#include "wgmma_ranges.h"
#include "wgmma_rounded.h"

namespace hfq {
namespace {

// Two rings in place of one (wgmma_staged.h), since three whole chunks of both find no room: of x with 64 columns a stage, alike in both blocks, and
// of weights with a chunk a stage. Of 4 bits five stages each. They run on from segment to segment.
template <class Kind, int kTokens_>
struct WgmmaPairBlock {
  static constexpr int kTiles = 8, kRows = kTiles * kTileRows, kNeighbours = 2;
  static_assert(kNeighbours * kRows == kPairRows);
  static constexpr int kTokens = kTokens_, kBits = Kind::kCodeBits;
  static constexpr int kConsumers = kTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  static constexpr int kResident = 1;
  static constexpr int kWeightWarps = 2;  // of those that copy; another one copies x, and the last one raises a flag
  static constexpr int kAtFirst = 168, kOfConsumers = 216, kOfProducers = 72;  // registers, as in wgmma_staged.h
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kSums = kTokens / 2;

  static constexpr int kXOfChunk = 2, kXStage = kTokens * 128, kXShare = kXStage / kNeighbours;  // kXOfChunk: stages of a chunk
  static constexpr int kCodesAt = 0, kScalesAt = kTiles * kBytes, kScaleBytes = kUnits * 64, kZerosAt = kScalesAt + kTiles * kScaleBytes;
  static constexpr int kStage = kZerosAt + (Kind::kMayHaveZeros ? kTiles * kScaleBytes : 0);
  // Partial sums of a block, as stages of x.
  static constexpr int kPartialStages = kRows * kTokens * 4 / kXStage;
  static_assert(kPartialStages * kXStage == kRows * kTokens * 4);
  // Shared memory: the ring of x, that of weights, which has three chunks or more, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 384;
  static constexpr int kRoom = kMostWgmmaBytes - kTableBytes - kBarrierBytes, kXRoom = (kRoom - 3 * kStage) / kXStage;
  static constexpr int kXStages = kXRoom > 10 ? 10 : kXRoom, kXRing = kXStages * kXStage;
  static constexpr int kStagesRoom = (kRoom - kXRing) / kStage, kStages = kStagesRoom > 8 ? 8 : kStagesRoom;
  static constexpr int kRing = kXRing + kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kXStages >= 5 && 8 * (2 * (kXStages + kStages) + 2) <= kBarrierBytes);

  uint8_t* memory;          // rings begin here
  uint32_t ring, barriers;  // where those are, as instructions count
  WgmmaSegment first;  // of the range

  // By all threads.
  __device__ __forceinline__ explicit WgmmaPairBlock(const WgmmaParams& p) {
    memory = swizzled_memory();
    ring = shared_address(memory), barriers = kept(ring + kRing + kTableBytes);
    first = first_segment(p, range(p));
  }

  // (Made again where it is needed: a register less through all chunks.)
  static __device__ __forceinline__ uint32_t range(const WgmmaParams& p) { return p.cut.ranges - 1 - kept(blockIdx.x) / kNeighbours; }
  static __device__ __forceinline__ uint32_t neighbour() { return kept(blockIdx.x) % kNeighbours; }

  __device__ __forceinline__ uint32_t x_stage(uint32_t at) const { return ring + at * kXStage; }
  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + kXRing + at * kStage; }
  // Barriers of a stage: it is there, all have read it: that of x, those of both blocks.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t x_full(uint32_t at) const { return barriers + 16 * kStages + 8 * at; }
  __device__ __forceinline__ uint32_t x_empty(uint32_t at) const { return x_full(at) + 8 * kXStages; }
  // The table is filled; all have written their partial sums.
  __device__ __forceinline__ uint32_t filled() const { return barriers + 16 * (kStages + kXStages); }
  __device__ __forceinline__ uint32_t written() const { return filled() + 8; }

  // By one thread, before a barrier of the cluster: what the neighbour copies arrives here, too.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full(i), kWeightWarps * 33), mbarrier_init(empty(i), kConsumers);
    for (int i = 0; i < kXStages; ++i) mbarrier_init(x_full(i), 1), mbarrier_init(x_empty(i), kNeighbours * kConsumers);
    mbarrier_init(filled(), 32 * kConsumers), mbarrier_init(written(), kConsumers);
    fence_mbarrier_init();
  }
};

// Codes, scales and zero points of the tiles of a warp. Codes in bulk, a lane for each tile: some 60 clocks of the copying engine each, whatever
// their bytes, which is why scales and zero points, 32 bytes of a tile, go by cp.async, eight lanes for each tile. (In bulk they took 15 % of the
// time of 64 tokens in such blocks, on an H200.)
template <class Block>
struct WgmmaWeights {
  static constexpr int kTiles = Block::kTiles / Block::kWeightWarps, kBytes = Block::kBytes, kLanes = 32 / kTiles;
  static constexpr uint32_t kRound = 16 * kLanes;  // bytes of a tile

  const WgmmaParams& p;
  const Block& block;
  uint32_t unit;   // the first one of the chunk that is copied next
  uint32_t tiles;  // of the warp's that exist
  bool numbers;    // whether the tile of the lane's scales exists
  // Of the lane, and where they go in a stage.
  const uint8_t *codes, *scales, *zeros;
  uint32_t codes_to, scales_to;

  // From this chunk on, of the rows that begin with tile `first_tile`.
  __device__ __forceinline__ WgmmaWeights(const WgmmaParams& params, const Block& b, int warp, uint32_t first_tile, uint32_t chunk)
      : p(params), block(b), unit(chunk * Block::kUnits) {
    const Weight& w = p.weight;
    const uint32_t first = first_tile + warp * kTiles, left = p.tiles > first ? p.tiles - first : 0;
    tiles = left < kTiles ? left : kTiles;
    const uint32_t lane = threadIdx.x % 32, tile = lane / kLanes, within = lane % kLanes * 16;
    codes = w.qweight + static_cast<uint64_t>(first + lane) * p.tile_bytes;
    codes_to = Block::kCodesAt + (warp * kTiles + lane) * kBytes;
    const uint64_t of_tile = static_cast<uint64_t>(first + tile) * p.scale_bytes + within;
    numbers = tile < tiles;
    scales = static_cast<const uint8_t*>(w.scales) + of_tile, zeros = static_cast<const uint8_t*>(w.zeros) + of_tile;
    scales_to = Block::kScalesAt + (warp * kTiles + tile) * Block::kScaleBytes + within;
  }

  // The next chunk, to stage `at`.
  __device__ __forceinline__ void copy(uint32_t at) {
    const uint32_t lane = threadIdx.x % 32, behind = unit / Block::kUnits * kBytes, left = p.tile_bytes - behind;
    const uint32_t code_bytes = left < kBytes ? left : kBytes, stage = block.stage(at), full = block.full(at);
    if (lane == 0) mbarrier_arrive_and_expect(full, tiles * code_bytes);
    if (lane < tiles) copy_bulk(stage + codes_to, codes + behind, code_bytes, full);
    const uint32_t group = group_of(p, unit), groups = group_of(p, unit + Block::kUnits - 1) - group + 1;
    const uint32_t of_group = 8 * pair_bytes(p.weight.scale_dtype), bytes = groups * of_group, from = group * of_group;
#pragma unroll 1
    for (uint32_t round = 0; round < bytes; round += kRound) {
      if (!numbers || round + lane % kLanes * 16 >= bytes) continue;
      cp_async(stage + scales_to + round, scales + from + round);
      if (p.weight.zeros) cp_async(stage + scales_to + Block::kZerosAt - Block::kScalesAt + round, zeros + from + round);
    }
    mbarrier_arrive_after_copies(full);
    unit += Block::kUnits;
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
    if (warp == Block::kWeightWarps) copy_x();
    if (warp > Block::kWeightWarps) raise_flag_of_range(p, block);
  }

  __device__ __forceinline__ void copy_weights() const {
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
      WgmmaWeights<Block> weights(p, block, warp, segment.first_tile(p, block), segment.chunk);
#pragma unroll 1
      for (uint32_t i = 0; i < segment.chunks; ++i, turn.next()) {
        if (turn.round) mbarrier_wait(block.empty(turn.at), (turn.round - 1) % 2);
        sync_warp();  // a lane that copies nothing could come so late that it sees the bit of the next phase but one
        weights.copy(turn.at);
      }
    }
  }

  // One thread copies; behind x what other ranges have of the last tile, as stages of x.
  __device__ __forceinline__ void copy_x() const {
    Turn<Block::kXStages> turn;
    const bool copies = threadIdx.x % 32 == 0;
    wait_for_previous_kernel();
    if (copies) copy_x_stages(turn);
    const uint32_t others = others_of_last(p, block);
    wait_for_partials(p, block, 0, others);
    if (copies && others) copy_partials(others, turn);
    if (!copies) return;
    // Until both blocks have read all: before, the neighbour may still arrive here, and copies be on the way from here to it.
#pragma unroll 1
    for (int i = 0; i < Block::kXStages; ++i, turn.next()) wait_until_empty(turn);
  }

  // Of each stage the block's share, to both blocks. The neighbour's share may come first.
  __device__ __forceinline__ void copy_x_stages(Turn<Block::kXStages>& turn) const {
    const uint32_t share = block.neighbour() * Block::kXShare;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
      const int64_t chunk = static_cast<int64_t>(segment.token_tile(p)) * segment.all + segment.chunk;
      const uint8_t* from = reinterpret_cast<const uint8_t*>(p.workspace) + chunk * Block::kXOfChunk * Block::kXStage + share;
#pragma unroll 1
      for (uint32_t i = 0; i < Block::kXOfChunk * segment.chunks; ++i, turn.next(), from += Block::kXStage) {
        wait_until_empty(turn);
        mbarrier_arrive_and_expect(block.x_full(turn.at), Block::kXStage);
        copy_bulk_to_blocks(block.x_stage(turn.at) + share, from, Block::kXShare, block.x_full(turn.at), 3);
      }
    }
  }

  // Partial sums of the block's own rows, while the last stages of x are still multiplied. (Both blocks have as many, so that stages have turns
  // alike.)
  __device__ __forceinline__ void copy_partials(uint32_t others, Turn<Block::kXStages>& turn) const {
    using Partials = WgmmaPartials<Block>;
    fence_proxy_async_global();
#pragma unroll 1
    for (uint32_t i = 0; i < Block::kPartialStages * others; ++i, turn.next()) {
      const uint32_t range = block.range(p) + 1 + i / Block::kPartialStages;
      const uint8_t* const from = reinterpret_cast<const uint8_t*>(Partials::of_block(p, block, range)) + i % Block::kPartialStages * Block::kXStage;
      wait_until_empty(turn);
      mbarrier_arrive_and_expect(block.x_full(turn.at), Block::kXStage);
      copy_bulk(block.x_stage(turn.at), from, Block::kXStage, block.x_full(turn.at));
    }
  }

  __device__ __forceinline__ void wait_until_empty(const Turn<Block::kXStages>& turn) const {
    if (turn.round) mbarrier_wait(block.x_empty(turn.at), (turn.round - 1) % 2);
  }
};

template <class Kind, class T, class Block>
struct WgmmaPairConsumer : WgmmaRounded<Kind, T, Block> {
  using Rounded = WgmmaRounded<Kind, T, Block>;
  using Rounded::a, Rounded::block, Rounded::kUnits, Rounded::kSums, Rounded::lane, Rounded::p, Rounded::sums;

  WgmmaSegment segment;
  Turn<Block::kXStages> x_turn;
  Turn<Block::kStages> turn;

  __device__ __forceinline__ WgmmaPairConsumer(const WgmmaParams& params, const Block& b, int warp)
      : Rounded(params, b, warp), segment(b.first) {}

  // The last stage of x that was multiplied, which nothing reads any more.
  __device__ __forceinline__ void free_x_behind() const {
    sync_warp();
    const uint32_t behind = x_turn.at ? x_turn.at - 1 : Block::kXStages - 1;
    if (lane < Block::kNeighbours) mbarrier_arrive_of_block(block.x_empty(behind), lane);
  }

  // Units u and later of a chunk. While the instructions of the one before run and this one's wait, the next one is unpacked. `first`: no other chunk
  // of the segment is behind; `more`: another one follows.
  template <Scaling kScaling, bool kWhole, int u>
  __device__ __forceinline__ void multiply(uint64_t x, uint32_t unit, bool first, bool more) {
    if (u % 2 == 0) mbarrier_wait(block.x_full(x_turn.at), x_turn.round % 2);
    wgmma_fence();
#pragma unroll
    for (int j = 0; j < 2; ++j) wgmma(T{}, sums, a[u][j], x + x_turn.at * (Block::kXStage / 16) + u % 2 * 4 + 2 * j, true);
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
    if (u % 2 == 0 && !(u == 0 && first)) free_x_behind();
    if (u % 2 == 1) x_turn.next();
    if constexpr (u + 1 < kUnits) multiply<kScaling, kWhole, u + 1>(x, unit, first, more);
  }

  // All segments. (If they chose among these functions one by one, sums of six loops would meet, for which there are no registers: ptxas would wait
  // for each wgmma.)
  template <Scaling kScaling, bool kWhole>
  __device__ __forceinline__ void run_chunks() {
    const uint64_t x = x_descriptor(block.ring);
#pragma unroll 1
    for (; segment.chunks; segment.next()) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
      mbarrier_wait(block.full(turn.at), turn.round % 2);
      this->template unpack<kScaling, kWhole, 0>(block.stage(turn.at), segment.chunk * kUnits);
#pragma unroll 1
      for (uint32_t i = 0; i < segment.chunks; ++i)
        multiply<kScaling, kWhole, 0>(x, (segment.chunk + i) * kUnits, i == 0, i + 1 < segment.chunks);
      wgmma_wait<0>(sums);
      free_x_behind();
      end_segment<T>(p, block, segment, lane, this->tile, sums, [&](uint32_t others) { add_partials(others); });
    }
  }

  // They come as stages of x. (From memory to registers, of which there are 48 for what is on the way, a block's took longer than a chunk.)
  __device__ __forceinline__ void add_partials(uint32_t others) {
    constexpr int kAtOnce = kSums / Block::kPartialStages, kStride = 16 * WgmmaPartials<Block>::kThreads;
#pragma unroll 1
    for (uint32_t i = 0; i < others; ++i) {
#pragma unroll
      for (int stage = 0; stage < Block::kPartialStages; ++stage) {
        mbarrier_wait(block.x_full(x_turn.at), x_turn.round % 2);
        const uint32_t from = block.x_stage(x_turn.at) + 16 * kept(threadIdx.x);
#pragma unroll
        for (int s = 0; s < kAtOnce; s += 4) {
          const uint4 part = load_shared<uint4>(from + s / 4 * kStride);
          float* const d = sums + stage * kAtOnce + s;
          d[0] += as_float(part.x), d[1] += as_float(part.y), d[2] += as_float(part.z), d[3] += as_float(part.w);
        }
        x_turn.next();
        free_x_behind();
      }
    }
  }

  __device__ __forceinline__ void run() { run_rounded(*this); }
};

}  // namespace
}  // namespace hfq
