// What the warps of a thread block with wgmma share: how memory is laid out, barriers, and the way of x, codes and scales to it.
//
// wgmma.m64nNk16 takes its first operand from registers: warp w of four holds rows 16 w .. 16 w + 15, in just the fragments of mma.m16n8k16.
// So four tiles of the layout are its 64 rows as they are, and codes become numbers in registers. The second operand, x, is read by the
// hardware from shared memory, [tokens][k] in rows of 128 bytes, swizzled. There x must stand in the order in which the layout has its columns:
//
//   columns 8t + 4j + {0, 1} of a unit are k = 2t, 2t + 1 of instruction j, columns 8t + 4j + {2, 3} are k = 2t + 8, 2t + 9
//   so word 4t + 2j + h of a unit of x (two columns each) goes to word 4 (2j + h) + t, in 16-byte piece 2j + h
//   and piece p of the row of token m stands in place p ^ m % 8: that is the swizzle of 128 bytes
//
// A ring of stages has chunks of 128 columns. Four warps fill it. Codes and scales come in bulk, a copy for each tile, as far ahead as there are
// stages.
//
// Words of x move, so it goes through registers: a lane loads four words of a token, 16 bytes, and stores each by itself. 32 lanes have 64 columns of
// four tokens: they load 128 bytes of each, and write the 32 banks once. x of the next chunk is on its way to registers while the ring is full. Its
// stores are made known to wgmma by those who made them: a fence that might wait for cp.async of its thread, so that there are none. (Large blocks:
// wgmma_tokens.cu has moved the words, and x comes in bulk, too. Staged: wgmma_staged.h.)
#pragma once

#include <type_traits>

#include "fragments.h"
#include "wgmma.h"

namespace hfq {
namespace {

// How stages are filled, and which rows and tokens a block has: as here; wgmma_staged.h, of 256 or of 128 rows; wgmma_large.h; wgmma_pair.h.
enum class WgmmaWay { kThroughRegisters, kStaged, kStagedHalf, kLarge, kPair };

// What blocks with one ring, of x and weights, have in common.
template <class Kind, int kTokens_, int kTiles_, bool kXSums, int kBarrierBytes_>
struct WgmmaRing {
  static constexpr int kTokens = kTokens_, kTiles = kTiles_, kRows = kTiles * kTileRows;
  static constexpr int kBits = Kind::kCodeBits;
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;  // of a chunk
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2;

  // A stage: two halves of 64 columns of x, [kTokens][128 bytes]; codes of each tile; of each tile scales of the groups in the chunk, and zero
  // points, 8 pairs each; sums of x, [kUnits][kTokens], for scales that float32 sums are multiplied by.
  static constexpr int kHalf = kTokens * 128, kCodesAt = 2 * kHalf, kScalesAt = kCodesAt + kTiles * kBytes, kScaleBytes = kUnits * 64;
  static constexpr int kZerosAt = kScalesAt + kTiles * kScaleBytes, kXSumsAt = kZerosAt + kTiles * kScaleBytes;
  static constexpr int kStage = (kXSumsAt + (kXSums ? kUnits * kTokens * 4 : 0) + 1023) / 1024 * 1024;
  // Shared memory: the ring, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = kBarrierBytes_;
  static constexpr int kRoom = (kMostWgmmaBytes - kTableBytes - kBarrierBytes) / kStage, kStages = kRoom > 8 ? 8 : kRoom;
  static constexpr int kRing = kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kStages >= 3);

  uint8_t* memory;          // the ring begins here
  uint32_t ring, barriers;  // where those are, as instructions count

  __device__ __forceinline__ WgmmaRing() : memory(swizzled_memory()) {
    ring = shared_address(memory), barriers = kept(ring + kRing + kTableBytes);
  }

  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + at * kStage; }
  // Barriers of a stage: it is there, all have read it, sums of its x are there.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t summed(uint32_t at) const { return full(at) + 16 * kStages; }
  // The table is filled; those of a kind of blocks.
  __device__ __forceinline__ uint32_t filled() const { return barriers + 24 * kStages; }
  __device__ __forceinline__ uint32_t others() const { return filled() + 8; }

  // By one thread.
  __device__ __forceinline__ void init_stages(uint32_t filling, uint32_t consumers) const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full(i), filling);
      mbarrier_init(empty(i), consumers);
      mbarrier_init(summed(i), consumers < kTokenTiles ? consumers : kTokenTiles);
    }
    mbarrier_init(filled(), 32 * consumers);
  }
};

template <class Kind, int kTokens, WgmmaWay kWay>
using WgmmaClusterRing = WgmmaRing<Kind, kTokens, (kTokens > 64 && kWay != WgmmaWay::kLarge ? 8 : 16), kWay != WgmmaWay::kLarge, 256>;

template <class Kind, class T, int kTokens_, WgmmaWay kWay>
struct WgmmaBlock : WgmmaClusterRing<Kind, kTokens_, kWay> {
  using Ring = WgmmaClusterRing<Kind, kTokens_, kWay>;
  using Ring::kTokens, Ring::kTiles, Ring::kRows, Ring::kStages, Ring::kRing, Ring::kBarrierBytes;
  static constexpr bool kLarge = kWay == WgmmaWay::kLarge, kWholeOnly = false, kEarly = false;
  static_assert(!kLarge || kTokens == kLargeTokens);
  static constexpr int kWarpTiles = kLarge ? 2 : 1;
  static constexpr int kConsumers = kTiles / kWarpTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  static constexpr int kWeightWarps = kProducers;  // (wgmma_pair.h has others)
  // Registers of a thread. Where the copying warps give some to the others, all have as many at first as there are for all (ptxas' number, which
  // has to be this one: tests/kernels/test_ptxas.py).
  static constexpr int kAtFirst = kConsumers == 16 ? 96 : 168;
  static constexpr int kOfConsumers = kTokens == 128 ? 216 : kTokens == 64 ? 104 : kAtFirst;
  static constexpr int kOfProducers = kTokens == 128 ? 72 : kTokens == 64 ? 64 : kAtFirst;
  static_assert(kConsumers * kOfConsumers + kProducers * kOfProducers <= (kConsumers + kProducers) * kAtFirst);

  // Which warps bring x to a stage: `kSharing` of them share it, the next ones have the next. Each has 4 KB on its way to registers.
  static constexpr int kPieces = 8, kAllPieces = kTokens / 2;  // of a warp at a time, of a chunk: 4 tokens, 64 columns
  static constexpr int kSharing = kAllPieces / kPieces < kProducers ? kAllPieces / kPieces : kProducers, kTurns = kProducers / kSharing;
  // Who says that a stage is full: warps that have asked for weights, and that have stored x.
  static constexpr int kFilling = kLarge ? kProducers : kProducers + kSharing;
  static_assert(kTokens * (kRows + 4) * 4 <= kRing && 8 * (3 * kStages + 2) <= kBarrierBytes);

  uint32_t split, first_token, first_tile;
  uint32_t chunk, chunks;                // the first one, and how many

  __device__ __forceinline__ explicit WgmmaBlock(const WgmmaParams& p) {
    // Neighbouring clusters read the same weights for other tokens: the second finds them in L2.
    const uint32_t splits = p.plan.splits, all = static_cast<uint32_t>((p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns);
    split = blockIdx.x % splits;
    first_token = blockIdx.x / splits % p.token_tiles * kTokens;
    first_tile = blockIdx.x / splits / p.token_tiles * kTiles;
    chunk = split * p.plan.split_chunks;
    chunks = chunk < all ? (all - chunk < static_cast<uint32_t>(p.plan.split_chunks) ? all - chunk : p.plan.split_chunks) : 0;
  }

  // All have read all stages, for good.
  __device__ __forceinline__ uint32_t drained() const { return Ring::others(); }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    Ring::init_stages(kFilling, kConsumers);
    mbarrier_init(drained(), kConsumers);
    fence_proxy_async();  // for copies in bulk
  }
};

// x in a stage at this shared address as wgmma reads it, for its first unit. Rows of 128 bytes (swizzle 1 in bits 62, 63), 8 of them 1024 bytes from
// the next 8 (in 16 bytes, bits 32 to 45).
__device__ __forceinline__ uint64_t x_descriptor(uint32_t stage) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (stage & 0x3ffff) / 16;
}

// Sums of a tile of rows to [tokens][kRows + 4] of shared memory: 8 lanes apart are 4 tokens, other banks.
template <class Block>
__device__ __forceinline__ void store_tile(float* partial, int tile, const float (&sums)[Block::kSums]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < Block::kSums; ++i) {
    const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2, row = kTileRows * tile + lane / 4 + i / 2 % 2 * 8;
    partial[token * (Block::kRows + 4) + row] = sums[i];
  }
}

// A stage after the other, and in which round of the ring.
template <int kStages>
struct Turn {
  uint32_t at = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++at == kStages) at = 0, ++round;
  }
};

__device__ __forceinline__ uint32_t group_of(const WgmmaParams& p, uint32_t unit) {
  const uint32_t group = multiply_high(2 * unit, p.group_magic), last = static_cast<uint32_t>(p.weight.groups) - 1;
  return group < last ? group : last;  // of units behind K
}
// Where a stage that begins with a unit has the scales of unit `u` behind it, from those of the first one on.
__device__ __forceinline__ uint32_t scales_of(const WgmmaParams& p, uint32_t unit, int u) {
  return u ? (group_of(p, unit + u) - group_of(p, unit)) * 8 * pair_bytes(p.weight.scale_dtype) : 0;
}

// ---- from global memory to stages

// Codes, scales and zero points of the tiles of a warp, in bulk: a copy of each lane. (One thread that asks for all is slower, 16.4 us instead
// of 15.5: H200, 4096 x 14336, 16 tokens.)
template <class Block>
struct WgmmaWeights {
  static constexpr int kTiles = Block::kTiles / Block::kWeightWarps, kBytes = Block::kBytes;

  const WgmmaParams& p;
  const Block& block;
  uint32_t unit;        // the first one of the chunk that is copied next
  uint32_t tiles;       // of the warp's that exist
  uint32_t tile_bytes;  // of codes
  // Of the lane: whether it copies something of a tile, and codes or numbers, from where, and to where in a stage.
  bool copies, numbers;
  const uint8_t* from;
  uint32_t to;

  // From this chunk on, of the rows that begin with tile `first_tile`.
  __device__ __forceinline__ WgmmaWeights(const WgmmaParams& params, const Block& b, int warp, uint32_t first_tile, uint32_t chunk)
      : p(params), block(b), unit(chunk * Block::kUnits) {
    const Weight& w = p.weight;
    const int64_t first = static_cast<int64_t>(first_tile) + warp * kTiles, left = (w.out_features + kTileRows - 1) / kTileRows - first;
    tiles = static_cast<uint32_t>(left < 0 ? 0 : left < kTiles ? left : kTiles);
    tile_bytes = static_cast<uint32_t>((w.in_features + kBlockColumns<Block::kBits> - 1) / kBlockColumns<Block::kBits>) * kBlockBytes<Block::kBits>;
    const uint32_t lane = threadIdx.x % 32, what = lane / kTiles, tile = lane % kTiles;  // codes, scales, zero points
    copies = tile < tiles && what < (w.zeros ? 3 : 2), numbers = what > 0;
    const void* const of_what = what == 0 ? w.qweight : what == 1 ? w.scales : w.zeros;
    from = static_cast<const uint8_t*>(of_what) + (first + tile) * (numbers ? w.groups * 8 * pair_bytes(w.scale_dtype) : tile_bytes);
    const uint32_t begin = what == 0 ? Block::kCodesAt : what == 1 ? Block::kScalesAt : Block::kZerosAt;
    to = begin + (warp * kTiles + tile) * (numbers ? Block::kScaleBytes : kBytes);
  }

  // The next chunk, to stage `at`. `more`: bytes of it that come beside these.
  __device__ __forceinline__ void copy(uint32_t at, uint32_t more) {
    const uint32_t codes = unit / Block::kUnits * kBytes, left = tile_bytes - codes, code_bytes = left < kBytes ? left : kBytes;
    const uint32_t group = group_of(p, unit), groups = group_of(p, unit + Block::kUnits - 1) - group + 1;
    const uint32_t of_group = 8 * pair_bytes(p.weight.scale_dtype), number_bytes = groups * of_group, full = block.full(at);
    if (threadIdx.x % 32 == 0) mbarrier_arrive_and_expect(full, more + tiles * (code_bytes + (p.weight.zeros ? 2 : 1) * number_bytes));
    if (copies) copy_bulk(block.stage(at) + to, from + (numbers ? group * of_group : codes), numbers ? number_bytes : code_bytes, full);
    unit += Block::kUnits;
  }
};

template <class Block>
struct WgmmaProducer {
  static constexpr int kSharing = Block::kSharing, kPieces = Block::kPieces;
  static constexpr int kSteps = Block::kAllPieces / kSharing / kPieces;  // of a chunk of x
  // A warp has both halves of the columns of all tokens, or one half of all, or one half of every second eight of them.
  static constexpr int kHalves = kSharing == 1 ? 2 : 1, kStride = kSharing == 4 ? 2 : 1;

  const WgmmaParams& p;
  const Block& block;
  WgmmaWeights<Block> weights;
  int lane;
  uint32_t x_chunk;  // of the block: the one whose x is loaded
  // Of the lane, for that chunk.
  const uint8_t* x_from;
  uint32_t column, four_bytes;  // four_bytes: from a token to the fourth after it
  int tokens;                   // that exist, from the lane's first one on
  uint32_t x_to;                // where its first word goes
  uint4 x[kPieces] = {};

  __device__ __forceinline__ WgmmaProducer(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), weights(params, b, warp, b.first_tile, b.chunk), lane(threadIdx.x % 32), x_chunk(warp / kSharing) {
    const Weight& w = p.weight;
    const int own = warp % kSharing, half = kHalves == 1 ? own % 2 : 0, token = own / 2 * 8 + lane / 8;
    const uint32_t row_bytes = static_cast<uint32_t>(w.in_features) * 2;
    column = (block.chunk + x_chunk) * kWgmmaColumns + 64 * half + 8 * (lane % 8);
    tokens = static_cast<int>(p.tokens - block.first_token < Block::kTokens ? p.tokens - block.first_token : Block::kTokens) - token;
    x_from = static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(block.first_token + token) * row_bytes + static_cast<int64_t>(column) * 2;
    four_bytes = 4 * row_bytes;
    x_to = half * Block::kHalf + 128 * token + 16 * ((lane / 4 % 2 * 4) ^ (token % 8)) + 4 * (lane % 4);
  }

  // All chunks of the block. What is not copied, of tokens and rows that do not exist, reaches no other one's sums; codes of columns behind K meet
  // zeros (takes_large_wgmma has the exception).
  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks && i < Block::kStages; ++i) weights.copy(i, 0);
    wait_for_previous_kernel();
    if (x_chunk < block.chunks) load_x(0);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next()) {
      if (turn.round) {
        mbarrier_wait(block.empty(turn.at), (turn.round - 1) % 2);
        sync_warp();  // a lane that copies nothing could come so late that it sees the bit of the next phase but one
        weights.copy(turn.at, 0);
      }
      if (i != x_chunk) continue;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step) load_x(step);
        store_x(block.stage(turn.at), step);
      }
      fence_proxy_async();
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.full(turn.at));
      x_from += 2 * kWgmmaColumns * Block::kTurns, column += kWgmmaColumns * Block::kTurns, x_chunk += Block::kTurns;
      if (x_chunk < block.chunks) load_x(0);
    }
  }

  // Piece i of a step: of which half of the columns that are the warp's, and which four tokens, from its first ones on.
  static __device__ __forceinline__ int half_of(int i) { return i / (kPieces / kHalves); }
  static __device__ __forceinline__ int four_of(int step, int i) {
    const int eight = (step * kPieces + i % (kPieces / kHalves)) / 2;
    return 2 * kStride * eight + i % 2;
  }

  // x of a chunk to registers, zeros behind K.
  __device__ __forceinline__ void load_x(int step) {
    const uint32_t end = static_cast<uint32_t>(p.weight.in_features);
    if ((column / kWgmmaColumns + 1) * kWgmmaColumns <= end) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (4 * four_of(step, i) < tokens) x[i] = load_written(piece(step, i));
      return;
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i)
      x[i] = column + 64 * half_of(i) < end && 4 * four_of(step, i) < tokens ? load_written(piece(step, i)) : uint4{};
  }

  __device__ __forceinline__ const uint4* piece(int step, int i) const {
    return reinterpret_cast<const uint4*>(x_from + four_of(step, i) * four_bytes + 128 * half_of(i));
  }

  // (Bits of `to` are changed, which is what a swizzle is, before constants are added.)
  __device__ __forceinline__ void store_x(uint32_t stage, int step) const {
    const uint32_t to = stage + x_to;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const uint32_t swizzled = to ^ (i % 2 * 64), offset = half_of(i) * Block::kHalf + 512 * four_of(step, i);
      store_shared(swizzled + offset, x[i].x);
      store_shared((swizzled ^ 16) + offset, x[i].y);
      store_shared((swizzled ^ 32) + offset, x[i].z);
      store_shared((swizzled ^ 48) + offset, x[i].w);
    }
  }
};

}  // namespace
}  // namespace hfq
