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
// Words move, so x goes through registers: a lane loads four words of a token, 16 bytes, and stores each by itself. 32 lanes have 64 columns of four
// tokens: they load 128 bytes of each, and write the 32 banks once.
//
// A ring of stages has chunks of 128 columns. Four warps fill it. Codes come in bulk, a copy for each tile, as far ahead as there are stages. x of
// the next chunk is on its way to registers while the ring is full. Its stores are made known to wgmma by those who made them.
#pragma once

#include <type_traits>

#include "fragments.h"
#include "wgmma.h"

namespace hfq {
namespace {

template <class Kind, class T, int kTokens_, bool kLarge = false>
struct WgmmaBlock {
  static constexpr int kTokens = kTokens_;
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (Kind::kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kTiles = kTokens > 64 && !kLarge ? 8 : 16, kRows = kTiles * kTileRows, kWarpTiles = kLarge ? 2 : 1;
  static constexpr int kConsumers = kTiles / kWarpTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  // Registers of a thread: at first as many as there are for all (ptxas' number, which has to be this one: tests/kernels/test_ptxas.py). With 64
  // tokens and more the copying warps then give some to the others.
  static constexpr int kAtFirst = kConsumers == 16 ? 96 : 168;
  static constexpr int kOfConsumers = kTokens == 128 ? 216 : kTokens == 64 && !kLarge ? 104 : kAtFirst;
  static constexpr int kOfProducers = kTokens == 128 ? 72 : kTokens == 64 && !kLarge ? 64 : kAtFirst;
  static_assert(kConsumers * kOfConsumers + kProducers * kOfProducers <= (kConsumers + kProducers) * kAtFirst);
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;  // of a chunk
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2;

  // Which warps fill a stage: `kSharing` of them share it, the next ones have the next. Each has 4 KB of x on its way to registers.
  static constexpr int kPieces = 8, kAllPieces = kTokens / 2;  // of a warp at a time, of a chunk: 4 tokens, 64 columns
  static constexpr int kSharing = kAllPieces / kPieces < kProducers ? kAllPieces / kPieces : kProducers, kTurns = kProducers / kSharing;

  // A stage: two halves of 64 columns of x, [kTokens][128 bytes]; codes of each tile; of each tile and unit 64 bytes of scales, and of zero
  // points; sums of x, [kUnits][kTokens], for scales that float32 sums are multiplied by.
  static constexpr int kHalf = kTokens * 128, kCodesAt = 2 * kHalf, kScalesAt = kCodesAt + kTiles * kBytes, kScaleBytes = 64;
  static constexpr int kZerosAt = kScalesAt + kTiles * kUnits * kScaleBytes, kXSumsAt = kZerosAt + kTiles * kUnits * kScaleBytes;
  static constexpr int kStage = (kXSumsAt + (kLarge ? 0 : kUnits * kTokens * 4) + 1023) / 1024 * 1024;
  // Shared memory: the ring, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 256;
  static constexpr int kRoom = (kMostWgmmaBytes - kTableBytes - kBarrierBytes) / kStage, kStages = kRoom > 8 ? 8 : kRoom;
  static constexpr int kRing = kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kStages >= 3 && kStages >= kTurns && kTokens * (kRows + 4) * 4 <= kRing && 8 * (3 * kStages + 2) <= kBarrierBytes);

  uint8_t* memory;                       // the ring begins here
  uint32_t ring, barriers;               // where those are, as instructions count
  uint32_t split, first_token, first_tile;
  uint32_t chunk, chunks;                // the first one, and how many

  __device__ __forceinline__ explicit WgmmaBlock(const WgmmaParams& p) {
    memory = swizzled_memory();
    ring = shared_address(memory), barriers = kept(ring + kRing + kTableBytes);
    // Neighbouring clusters read the same weights for other tokens: the second finds them in L2.
    const uint32_t splits = p.plan.splits, all = static_cast<uint32_t>((p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns);
    split = blockIdx.x % splits;
    first_token = blockIdx.x / splits % p.token_tiles * kTokens;
    first_tile = blockIdx.x / splits / p.token_tiles * kTiles;
    chunk = split * p.plan.split_chunks;
    chunks = chunk < all ? (all - chunk < static_cast<uint32_t>(p.plan.split_chunks) ? all - chunk : p.plan.split_chunks) : 0;
  }

  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + at * kStage; }
  // Barriers of a stage: it is there, all have read it, sums of its x are there.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t summed(uint32_t at) const { return full(at) + 16 * kStages; }
  // The table is filled; all have read all stages, for good.
  __device__ __forceinline__ uint32_t filled() const { return barriers + 24 * kStages; }
  __device__ __forceinline__ uint32_t drained() const { return filled() + 8; }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full(i), kSharing * (32 + 2));  // of each warp: its lanes when scales are there, one for codes, one for x
      mbarrier_init(empty(i), kConsumers);
      mbarrier_init(summed(i), kConsumers < kTokenTiles ? kConsumers : kTokenTiles);
    }
    mbarrier_init(filled(), 32 * kConsumers);
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
  __device__ __forceinline__ void next(uint32_t stages = 1) {
    at += stages;
    if (at >= kStages) at -= kStages, ++round;
  }
};

// ---- from global memory to stages

template <class Block>
struct WgmmaProducer {
  static constexpr int kSharing = Block::kSharing, kTiles = Block::kTiles / kSharing, kPieces = Block::kPieces;
  static constexpr int kSteps = Block::kAllPieces / kSharing / kPieces;  // of a chunk of x
  // A warp has both halves of the columns of all tokens, or one half of all, or one half of every second eight of them.
  static constexpr int kHalves = kSharing == 1 ? 2 : 1, kStride = kSharing == 4 ? 2 : 1;
  static constexpr int kBytes = Block::kBytes;

  const WgmmaParams& p;
  const Block& block;
  int lane, own;                  // own: which of the warps that share a chunk
  uint32_t first;                 // chunk of the block
  // Of the lane, for the chunk whose x is loaded next.
  const uint8_t* x_from;
  uint32_t column, four_bytes;  // four_bytes: from a token to the fourth after it
  int tokens;                   // that exist, from the lane's first one on
  uint32_t x_to;                // where its first word goes
  uint4 x[kPieces] = {};
  // Of the warp: its first tile, of those of the block, and how many exist; where the next codes are.
  int first_tile, tiles;
  const uint8_t* codes_from;
  uint32_t codes_to, tile_bytes, code_chunk;
  // Of the lane: the unit whose scales it copies next, of which tiles; from and to where.
  uint32_t unit, numbers_to, pair_shift;
  int number_tile, number_tiles;
  int64_t numbers_from, numbers_step;

  __device__ __forceinline__ WgmmaProducer(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), lane(threadIdx.x % 32), own(warp % kSharing), first(warp / kSharing) {
    const Weight& w = p.weight;
    const int half = kHalves == 1 ? own % 2 : 0, token = own / 2 * 8 + lane / 8;
    const uint32_t row_bytes = static_cast<uint32_t>(w.in_features) * 2, chunk = block.chunk + first;
    column = chunk * kWgmmaColumns + 64 * half + 8 * (lane % 8);
    tokens = static_cast<int>(p.tokens - block.first_token < Block::kTokens ? p.tokens - block.first_token : Block::kTokens) - token;
    x_from = static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(block.first_token + token) * row_bytes + static_cast<int64_t>(column) * 2;
    four_bytes = 4 * row_bytes;
    x_to = half * Block::kHalf + 128 * token + 16 * ((lane / 4 % 2 * 4) ^ (token % 8)) + 4 * (lane % 4);
    first_tile = own * kTiles;
    const int64_t all = (w.out_features + kTileRows - 1) / kTileRows - (block.first_tile + first_tile);
    tiles = static_cast<int>(all < 0 ? 0 : all < kTiles ? all : kTiles);
    tile_bytes = static_cast<uint32_t>((w.in_features + kBlockColumns<Block::kBits> - 1) / kBlockColumns<Block::kBits>) * kBlockBytes<Block::kBits>;
    codes_from = w.qweight + static_cast<int64_t>(block.first_tile + first_tile + lane) * tile_bytes + static_cast<int64_t>(chunk) * kBytes;
    codes_to = Block::kCodesAt + (first_tile + lane) * kBytes;
    code_chunk = chunk;
    const int of_pieces = w.scale_dtype == kFloat32 ? 2 : 1, of_units = p.flush_mask == 0 ? 2 : p.flush_mask == 1 ? 1 : 0;  // powers of two
    const int piece = lane & ((1 << of_pieces) - 1);
    const uint32_t of_chunk = (lane >> of_pieces & ((1 << of_units) - 1)) * (p.flush_mask + 1) + p.flush_mask;
    unit = chunk * Block::kUnits + of_chunk;
    number_tile = lane >> (of_pieces + of_units), number_tiles = 32 >> (of_pieces + of_units);
    pair_shift = 4 + of_pieces;
    numbers_to = kept(Block::kScalesAt + ((first_tile + number_tile) * Block::kUnits + of_chunk) * Block::kScaleBytes + 16 * piece);
    numbers_from = kept((static_cast<int64_t>(block.first_tile + first_tile + number_tile) * w.groups << pair_shift) + 16 * piece);
    numbers_step = static_cast<int64_t>(number_tiles) * w.groups << pair_shift;
  }

  // All chunks of the warp. What is not copied, of tokens and rows that do not exist, reaches no other one's sums; codes of columns behind K meet
  // zeros.
  __device__ __forceinline__ void run() {
    Turn<Block::kStages> turn;
    turn.at = first;
#pragma unroll 1
    for (uint32_t i = first; i < block.chunks && i < Block::kStages; i += Block::kTurns) copy_codes(i), copy_numbers(i);
    wait_for_previous_kernel();
    if (first < block.chunks) load_x(0);
#pragma unroll 1
    for (uint32_t i = first; i < block.chunks; i += Block::kTurns, turn.next(Block::kTurns)) {
      if (turn.round) {
        mbarrier_wait(block.empty(turn.at), (turn.round - 1) % 2);
        copy_codes(turn.at);
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (step) load_x(step);
        store_x(block.stage(turn.at), step);
      }
      fence_proxy_async();
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.full(turn.at));
      // Behind the fence, which might wait for them.
      if (turn.round) copy_numbers(turn.at);
      x_from += 2 * kWgmmaColumns * Block::kTurns, column += kWgmmaColumns * Block::kTurns;
      if (i + Block::kTurns < block.chunks) load_x(0);
    }
  }

  // Codes of the next chunk to a stage.
  __device__ __forceinline__ void copy_codes(uint32_t at) {
    const uint32_t left = tile_bytes - code_chunk * kBytes, bytes = left < kBytes ? left : kBytes;
    if (lane == 0) mbarrier_arrive_and_expect(block.full(at), tiles * bytes);
    if (lane < tiles) copy_bulk(block.stage(at) + codes_to, codes_from, bytes, block.full(at));
    codes_from += kBytes * Block::kTurns, code_chunk += Block::kTurns;
  }

  // Scales and zero points of the units after which they are applied, 16 bytes to a lane: those of one unit and of every 32nd piece.
  __device__ __forceinline__ void copy_numbers(uint32_t at) {
    const Weight& w = p.weight;
    const uint32_t last = static_cast<uint32_t>(w.groups) - 1;
    uint32_t group = multiply_high(2 * unit, p.group_magic);
    group = group < last ? group : last;  // units behind K
    int64_t from = numbers_from + (static_cast<int64_t>(group) << pair_shift);
    uint32_t to = block.stage(at) + numbers_to;
#pragma unroll 1
    for (int i = number_tile; i < tiles; i += number_tiles, from += numbers_step, to += number_tiles * Block::kUnits * Block::kScaleBytes) {
      cp_async(to, static_cast<const uint8_t*>(w.scales) + from);
      if (w.zeros) cp_async(to + Block::kZerosAt - Block::kScalesAt, static_cast<const uint8_t*>(w.zeros) + from);
    }
    mbarrier_arrive_after_copies(block.full(at));
    unit += Block::kUnits * Block::kTurns;
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
