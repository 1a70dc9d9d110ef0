// From stages to sums for 17 to 64 tokens: 128 rows of a thread block, x for two of them at once, and ranges of all chunks (wgmma_ranges.h).
//
// wgmma_staged.h has 256 rows and clusters that share columns: of 14336 x 4096 six blocks, for which 96 multiprocessors of an H200 have room, with 19
// chunks each, where 13.6 would be their share of all 132. Ranges give them that. A tile of 256 rows would have 64 KB of partial sums of eight
// blocks, which one would have to read; so a block has 128 rows, half as many sums of half as many, and two are a pair, for both of which x comes
// once from L2, as many bytes as for 256 rows.
//
// Two teams of 8 warps take turns with chunks: four warps of a scheduler, of which one can wait for its wgmma while others unpack. At the end of a
// segment the two warps with the same rows give each other half of their tokens.
//
// Counted for a chunk of 256 rows (int4, bfloat16, groups of 128): warps that multiply execute 173 instructions, four of them a scheduler, beside
// one that does little: x and weights come in bulk. Tensor cores are busy for 1024 clocks, shared memory for some 1050, the way from L2 for 1200.
// Reckoned were 1300 clocks, and 15 to 17 us for 4096 x 14336 with 64 tokens; an H200 takes 23.0, staged blocks 19.4: so many copies in bulk cost more
// than their bytes, and 940 clocks for 128 rows are left without any (benchmarks/NOTES.md). HFQ_CUDA_WGMMA=pairs takes these blocks.
#pragma once

#include "wgmma_consumer.h"
#include "wgmma_pair.h"

namespace hfq {
namespace {

// Scales are applied once for a chunk, and there are no zero points.
template <class Kind, class T>
struct WgmmaSmallPairBlock : WgmmaOneOfPair {
  static constexpr bool kEarly = true;
  static constexpr int kTokens = kSmallPairTokens, kBits = Kind::kCodeBits;
  static constexpr int kTeams = 2;
  static constexpr int kConsumers = kTeams * kTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  static constexpr int kAtFirst = 96, kOfConsumers = 104, kOfProducers = 64;  // registers, as in wgmma_block.h
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2, kEndSums = kSums / kTeams;

  // A stage has x of a chunk, two halves of 64 columns, alike in both blocks, codes and scales. A ring of stages runs on from segment to segment.
  static constexpr int kPartialStages = 0;  // (sums of others do not come through stages)
  static constexpr int kHalf = kTokens * 128, kXOfChunk = 1, kXStage = 2 * kHalf, kXShare = kXStage / kNeighbours;
  static constexpr int kCodesAt = kXStage, kScalesAt = kCodesAt + kTiles * kBytes, kScaleBytes = 64, kZerosAt = kScalesAt;  // (no zero points)
  static constexpr int kStage = (kScalesAt + kTiles * kScaleBytes + 1023) / 1024 * 1024;
  // Shared memory: the ring, what teams give each other, barriers.
  static constexpr int kGivenBytes = kEndSums * 32 * 4, kAllGiven = kConsumers * kGivenBytes, kBarrierBytes = 256;  // of a warp, of all
  static constexpr int kStages = (kMostWgmmaBytes - kAllGiven - kBarrierBytes) / kStage, kXStages = kStages;
  static constexpr int kRing = kStages * kStage, kSharedBytes = kRing + kAllGiven + kBarrierBytes;
  static_assert(kStages >= 5 && 8 * (2 * kStages + kTiles + 1) <= kBarrierBytes);

  // By all threads.
  __device__ __forceinline__ explicit WgmmaSmallPairBlock(const WgmmaParams& p) : WgmmaOneOfPair(p, kRing + kAllGiven) {}

  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + at * kStage; }
  __device__ __forceinline__ uint32_t x_stage(uint32_t at) const { return stage(at); }
  // Barriers of a stage: all of it is there, and those of both blocks that multiply it have read it.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t x_full(uint32_t at) const { return full(at); }
  __device__ __forceinline__ uint32_t x_empty(uint32_t at) const { return empty(at); }
  // Of two warps with the same rows: both have given, both have taken, in turns.
  __device__ __forceinline__ uint32_t met(uint32_t tile) const { return barriers + 16 * kStages + 8 * tile; }
  // All have written their partial sums.
  __device__ __forceinline__ uint32_t written() const { return met(kTiles); }
  // Where a warp finds what it is given; what it gives is the other team's.
  __device__ __forceinline__ uint32_t given(uint32_t tile, uint32_t team) const { return ring + kRing + (tile * kTeams + team) * kGivenBytes; }

  // By one thread, before a barrier of the cluster: what the neighbour copies arrives here, too.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) mbarrier_init(full(i), kWeightWarps + 1), mbarrier_init(empty(i), kNeighbours * kTiles);
    for (int i = 0; i < kTiles; ++i) mbarrier_init(met(i), kTeams);
    mbarrier_init(written(), kConsumers);
    fence_mbarrier_init();
  }
};

template <class Kind, class T, class Block>
struct WgmmaSmallPairConsumer : WgmmaConsumer<Kind, T, Block> {
  using Consumer = WgmmaConsumer<Kind, T, Block>;
  using Consumer::block, Consumer::kSums, Consumer::kUnits, Consumer::lane, Consumer::p, Consumer::sums;

  uint32_t tile, team;
  WgmmaSegment segment;
  Turn<Block::kStages> turn;  // of the team's next chunk

  __device__ __forceinline__ WgmmaSmallPairConsumer(const WgmmaParams& params, const Block& b, int warp)
      : Consumer(params, b, warp % Block::kTiles), tile(warp % Block::kTiles), team(warp / Block::kTiles), segment(b.first) {
    if (team) turn.next();
  }

  __device__ __forceinline__ void run() {
    if (p.weight.scale_dtype == kFloat16) return run_segments<kFloat16>();
    if (p.weight.scale_dtype == kBFloat16) return run_segments<kBFloat16>();
    run_segments<kFloat32>();
  }

  template <int kScales>
  __device__ __forceinline__ void run_segments() {
    const uint64_t x = x_descriptor(block.ring);
    uint32_t i = team;  // of the segment's chunks, the team's next one
#pragma unroll 1
    for (; segment.chunks; i -= segment.chunks, segment.next()) {
#pragma unroll
      for (int s = 0; s < kSums; ++s) sums[s] = 0.0f;
      if (i < segment.chunks) this->begin(turn);
#pragma unroll 1
      for (; i < segment.chunks; i += Block::kTeams) {
        Turn<Block::kStages> next = turn;
        next.next(), next.next();
        const uint32_t unit = (segment.chunk + i) * kUnits;
        this->template multiply<true, kScales, 0>(x + turn.at * (Block::kStage / 16), turn, next, unit, i + Block::kTeams < segment.chunks);
        sync_warp();
        if (lane < Block::kNeighbours) mbarrier_arrive_of_block(block.empty(turn.at), lane);
        turn = next;
      }
      float own[Block::kEndSums];
      exchange(own);
      const auto add = [&](uint32_t others) { add_partials(others, own); };
      end_segment<T>(p, block, segment, lane, tile, team * Block::kTokens / Block::kTeams, own, add);
    }
  }

  // Sums of both teams, of the team's half of the tokens.
  __device__ __forceinline__ void exchange(float (&own)[Block::kEndSums]) const {
    constexpr int kHalf = Block::kEndSums;
    const uint32_t met = block.met(tile), to = block.given(tile, 1 - team) + 16 * lane, from = block.given(tile, team) + 16 * lane;
    mbarrier_wait(met, 1);  // both have taken what was given before
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      uint32_t give[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) give[c] = as_bits(team ? sums[i + c] : sums[kHalf + i + c]);
      store_shared(to + 128 * i, make_uint4(give[0], give[1], give[2], give[3]));
    }
    arrive(met);
    mbarrier_wait(met, 0);
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      const uint4 given = load_shared<uint4>(from + 128 * i);
      const uint32_t words[4] = {given.x, given.y, given.z, given.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) own[i + c] = (team ? sums[kHalf + i + c] : sums[i + c]) + as_float(words[c]);
    }
    arrive(met);
  }

  // Those of three ranges are on the way at a time.
  __device__ __forceinline__ void add_partials(uint32_t others, float (&own)[Block::kEndSums]) const {
    using Partials = WgmmaPartials<Block>;
    constexpr int kAtOnce = 3, kFours = Block::kEndSums / 4, kToNext = Block::kNeighbours * Partials::kOfBlock;
    wait_for_partials(p, block, others);
    const float4* from = Partials::of_block(p, block, block.range(p) + 1) + kept(threadIdx.x);
#pragma unroll 1
    for (uint32_t at = 0; at < others; at += kAtOnce, from += kAtOnce * kToNext) {
      float4 parts[kAtOnce][kFours];
#pragma unroll
      for (uint32_t range = 0; range < kAtOnce; ++range)
#pragma unroll
        for (int i = 0; i < kFours; ++i)
          parts[range][i] = at + range < others ? load_of_others(from + range * kToNext + i * Partials::kThreads) : float4{};
#pragma unroll
      for (uint32_t range = 0; range < kAtOnce; ++range)
#pragma unroll
        for (int i = 0; i < kFours; ++i) {
          const float4& part = parts[range][i];
          float* const d = own + 4 * i;
          d[0] += part.x, d[1] += part.y, d[2] += part.z, d[3] += part.w;
        }
    }
  }

  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    sync_warp();
    if (lane == 0) mbarrier_arrive(barrier);
  }
};

}  // namespace
}  // namespace hfq
