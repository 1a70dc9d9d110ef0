// Up to 64 tokens at a time. From global memory to stages all of it goes by cp.async, as far ahead as there are stages, and x in its own order, which
// is changed where it lies. (Through registers of warps that copy it, a chunk ahead at most, stages were empty for a fifth of the time.) From stages
// to sums it is wgmma_consumer.h.
//
// Each block has a range of all chunks (wgmma_ranges.h), and 256 rows or 128: with as many tokens, 256 read x half as often, and 128 have half the
// partial sums, which matters where many ranges share a tile (kStagedShapes).
//
// Of the four warps one copies weights, one x, and two put x in order, half of the tokens each. Those that copy make no fence, and those that do
// copy nothing: it is a MEMBAR, which may wait for cp.async of its thread.
//
// In the order of wgmma_block.h word t of piece i of a unit is word i of piece t. So if matrix t of ldmatrix is pieces t of eight units, the lane of
// word i of a row gets all of piece i. Two units of each of four tokens are those eight rows: their places, p ^ m % 8, are in different banks to
// load, and to store by eight lanes at a time.
//
// Counted for a chunk of 256 rows (int4, bfloat16, groups of 128), 64 and 32 tokens: warps that multiply execute 172 and 154 instructions, the one of
// weights 165, of x 143 and 95, those of the order 63 and 46, so that a scheduler has some 850 and 780. Shared memory is busy for 1170 and 720 clocks
// (512 and 256 of them with wgmma), tensor cores for 1024 and 512, the way from L2 for 1200 and 910. Measured on an H200 with 64 tokens, in clusters
// and with 68 instructions more: 1700 clocks a chunk, 2040 with x through registers.
//
// 16 tokens, codes plain: warps that multiply execute 122 instructions (144 with numbers), those of the order 80 (38), for 128 rows. With 32 tokens
// it would be 141 (154) and some 110 (46). Zero points of whole chunks, 64 tokens: some 220 and 170.
#pragma once

#include "wgmma_ranges.h"

namespace hfq {
namespace {

// `kNeighbours`: blocks of a cluster, which share x: two with wgmma_shared.h.
template <class Kind_, class T_, int kTokens_, int kTiles_, int kNeighbours_>
struct WgmmaStagedBlock {
  using Kind = Kind_;
  using T = T_;
  static constexpr int kNeighbours = kNeighbours_, kWeightWarps = kNeighbours;  // of those that copy: two where x comes in order
  static constexpr int kTokens = kTokens_, kTiles = kTiles_, kRows = kTiles * kTileRows;
  static constexpr int kBits = Kind::kCodeBits;
  static constexpr int kConsumers = kTiles, kProducers = 4, kThreads = 32 * (kConsumers + kProducers);  // warps
  // Registers of a thread. Where the copying warps give some to the others, all have as many at first as there are for all (ptxas' number, which
  // has to be this one: tests/kernels/test_ptxas.py).
  static constexpr bool kGives = kTokens * kTiles == 64 * 16;
  static constexpr int kAtFirst = kTiles == 16 ? 96 : 168, kOfConsumers = kGives ? 104 : kAtFirst, kOfProducers = kGives ? 64 : kAtFirst;
  static_assert(kConsumers * kOfConsumers + kProducers * kOfProducers <= (kConsumers + kProducers) * kAtFirst);
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;  // of a chunk
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2;
  // Codes are plain (fragments.h) where whole chunks have a scale and no zero points: with so few tokens what products then lack takes less than a
  // multiply-add for each register of codes.
  static constexpr bool kPlain = Kind::template kPlain<T> && kTokens == 16;
  static __device__ __forceinline__ bool plain(const WgmmaParams& p) { return kPlain && p.flush_mask == kUnits - 1 && !p.weight.zeros; }
  // Who puts x in order also adds it up where whole chunks have a zero point.
  static constexpr bool kSumsX = Kind::kMayHaveZeros && kNeighbours == 1;
  static __device__ __forceinline__ bool sums_x(const WgmmaParams& p) { return kSumsX && p.flush_mask == kUnits - 1 && p.weight.zeros; }

  // A stage: two halves of 64 columns of x, [kTokens][128 bytes]; codes of each tile; of each tile scales of the groups in the chunk, and zero
  // points, 8 pairs each; sums of x, [kUnits][kTokens], or [kTokens] of the chunk, or what products of plain codes lack, [kTokens].
  static constexpr int kHalf = kTokens * 128, kCodesAt = 2 * kHalf, kScalesAt = kCodesAt + kTiles * kBytes, kScaleBytes = kUnits * 64;
  static constexpr int kZerosAt = kScalesAt + kTiles * kScaleBytes, kXSumsAt = kZerosAt + kTiles * kScaleBytes;
  static constexpr int kStage = (kXSumsAt + kUnits * kTokens * 4 + 1023) / 1024 * 1024;
  // Shared memory: the ring, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 384;
  static constexpr int kResident = kTokens == 16 ? 2 : 1;  // blocks of a multiprocessor, so that the next kernel's begin early
  static constexpr int kMost = kResident == 2 ? 113 << 10 : kMostWgmmaBytes;
  static constexpr int kRoom = (kMost - kTableBytes - kBarrierBytes) / kStage, kStages = kRoom > 8 ? 8 : kRoom;
  static constexpr int kRing = kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kStages >= 3 && 8 * (4 * kStages + 4) <= kBarrierBytes);

  uint8_t* memory;          // the ring begins here
  uint32_t ring, barriers;  // where those are, as instructions count
  WgmmaSegment first;       // of the range

  // By all threads.
  __device__ __forceinline__ explicit WgmmaStagedBlock(const WgmmaParams& p)
      : memory(swizzled_memory()), first(first_segment(p, range(p))) {
    ring = shared_address(memory), barriers = kept(ring + kRing + kTableBytes);
  }

  static __device__ __forceinline__ uint32_t range(const WgmmaParams& p) { return p.cut.ranges - 1 - kept(blockIdx.x) / kNeighbours; }
  // Which one of the cluster it is. (Made again where it is needed: a register less through all chunks.)
  static __device__ __forceinline__ uint32_t neighbour() { return kNeighbours == 1 ? 0 : kept(blockIdx.x) % kNeighbours; }

  __device__ __forceinline__ uint32_t stage(uint32_t at) const { return ring + at * kStage; }
  // Barriers of a stage: it is there, all have read it (in all blocks that share x), sums of its x are there; x is there, in its own order.
  __device__ __forceinline__ uint32_t full(uint32_t at) const { return barriers + 8 * at; }
  __device__ __forceinline__ uint32_t empty(uint32_t at) const { return full(at) + 8 * kStages; }
  __device__ __forceinline__ uint32_t summed(uint32_t at) const { return full(at) + 16 * kStages; }
  __device__ __forceinline__ uint32_t raw(uint32_t at) const { return full(at) + 24 * kStages; }
  // The table is filled; all have written their partial sums; those of the next range are there, of all behind it.
  __device__ __forceinline__ uint32_t filled() const { return barriers + 32 * kStages; }
  __device__ __forceinline__ uint32_t written() const { return filled() + 8; }
  __device__ __forceinline__ uint32_t gathered(uint32_t behind) const { return filled() + 16 + 8 * behind; }

  // By a warp that has read all that it needs of a stage.
  __device__ __forceinline__ void release(uint32_t at, uint32_t lane) const {
    if constexpr (kNeighbours == 1) {
      if (lane == 0) mbarrier_arrive(empty(at));
    } else {
      if (lane < kNeighbours) mbarrier_arrive_of_block(empty(at), lane);
    }
  }

  // By one thread.
  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      // Lanes that have copied weights, and warps that have put x in order, or who counts its bytes.
      mbarrier_init(full(i), 32 * kWeightWarps + (kNeighbours == 1 ? kProducers / 2 : 1));
      mbarrier_init(empty(i), kNeighbours * kConsumers);
      mbarrier_init(summed(i), kConsumers < kTokenTiles ? kConsumers : kTokenTiles);
      mbarrier_init(raw(i), 32);
    }
    mbarrier_init(filled(), 32 * kConsumers), mbarrier_init(written(), kConsumers);
    mbarrier_init(gathered(0), 1), mbarrier_init(gathered(1), 1);
    if constexpr (kNeighbours > 1) fence_mbarrier_init();
  }
};

// Lanes stay together: each copy is one instruction for all of them.
__device__ __forceinline__ void wait_together(uint32_t barrier, uint32_t bit) {
  mbarrier_wait(barrier, bit);
  sync_warp();
}

// What is not copied, of tokens and rows that do not exist, reaches no other one's sums; codes of columns behind K meet zeros.
template <class Block>
struct WgmmaStagedCopies {
  static constexpr int kBytes = Block::kBytes, kTilesAtOnce = kBytes > 1024 ? 2 : kBytes > 512 ? 8 : 16;  // as registers allow

  const WgmmaParams& p;
  const Block& block;
  const int warp;  // of those that copy
  const uint32_t lane;

  __device__ __forceinline__ WgmmaStagedCopies(const WgmmaParams& params, const Block& b, int of_producers)
      : p(params), block(b), warp(of_producers), lane(threadIdx.x % 32) {}

  // By the first kWeightWarps. Of codes a lane has 16 bytes of each 512; of scales and zero points two lanes have 32 bytes of a tile at a time, which
  // hold 4 or 8 pairs.
  __device__ __forceinline__ void copy_weights() const {
    constexpr uint32_t kTiles = Block::kTiles / Block::kWeightWarps;
    static_assert(kTiles <= 16);
    const Weight& w = p.weight;
    const uint32_t of_group = 8 * pair_bytes(w.scale_dtype), of_block = Block::kWeightWarps == 1 ? 0 : warp * kTiles;
    const uint32_t codes_to = Block::kCodesAt + of_block * kBytes + 16 * lane;
    const uint32_t numbers_to = Block::kScalesAt + (of_block + lane / 2) * Block::kScaleBytes + 16 * (lane % 2);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
      const uint32_t first = segment.first_tile(p, block) + of_block, left = p.tiles > first ? p.tiles - first : 0;
      const uint32_t tiles = left < kTiles ? left : kTiles;
      const uint64_t numbers = static_cast<uint64_t>(first + lane / 2) * p.scale_bytes + 16 * (lane % 2);
      const uint8_t* const codes_from = w.qweight + static_cast<uint64_t>(first) * p.tile_bytes + 16 * lane;
      const uint8_t* const scales_from = static_cast<const uint8_t*>(w.scales) + numbers;
      const uint8_t* const zeros_from = static_cast<const uint8_t*>(w.zeros) + numbers;
#pragma unroll 1
      for (uint32_t i = 0; i < segment.chunks; ++i, turn.next()) {
        wait_together(block.empty(turn.at), (turn.round + 1) % 2);
        const uint32_t stage = block.stage(turn.at), behind = (segment.chunk + i) * kBytes, there = p.tile_bytes - behind;
        const uint32_t code_bytes = there < kBytes ? there : kBytes;
        const uint8_t* from = codes_from + behind;
        const uint32_t to = stage + codes_to;
#pragma unroll kTilesAtOnce
        for (uint32_t tile = 0; tile < tiles; ++tile, from += p.tile_bytes)
#pragma unroll
          for (uint32_t piece = 0; piece < kBytes; piece += 512)
            if (piece + 16 * lane < code_bytes) cp_async(to + tile * kBytes + piece, from + piece);
        const uint32_t unit = (segment.chunk + i) * Block::kUnits, group = group_of(p, unit);
        const uint32_t groups = group_of(p, unit + Block::kUnits - 1) - group + 1;
        if (lane / 2 < tiles) {
#pragma unroll 1
          for (uint32_t at = 0; at < groups * of_group; at += 32) {
            cp_async(stage + numbers_to + at, scales_from + group * of_group + at);
            if (w.zeros) cp_async(stage + numbers_to + at + Block::kZerosAt - Block::kScalesAt, zeros_from + group * of_group + at);
          }
        }
        mbarrier_arrive_after_copies(block.full(turn.at));
      }
    }
  }

  // Until other ranges have written what the last segment's sums lack: all but the next one first, since that of the tile's end has gone on to
  // another.
  __device__ __forceinline__ void gather() const {
    const uint32_t others = others_of_last(p, block);
    if (others == 0) return;
    wait_for_partials(p, block, 1, others);
    if (lane == 0) mbarrier_arrive(block.gathered(1));
    wait_for_partials(p, block, 0, 1);
    if (lane == 0) mbarrier_arrive(block.gathered(0));
  }
};

template <class Block>
struct WgmmaStagedProducer : WgmmaStagedCopies<Block> {
  using Copies = WgmmaStagedCopies<Block>;
  using Copies::block, Copies::lane, Copies::p, Copies::warp;
  using T = typename Block::T;
  static constexpr uint32_t kFours = Block::kTokens / 8;  // half of the tokens, times four

  using Copies::Copies;

  // Flags are for those who have nothing to copy any more: who waits for them has chunks of its own until then.
  __device__ __forceinline__ void run() const {
    if (warp == 0) this->copy_weights(), raise_flag_of_range(p, block);
    wait_for_previous_kernel();
    if (warp == 1) copy_x(), this->gather();
    if (warp > 1) order_x(warp - 2);
  }

  // A lane has 16 bytes of every fourth token, of both halves of the columns; zeros behind K.
  __device__ __forceinline__ void copy_x() const {
    const uint32_t end = static_cast<uint32_t>(p.weight.in_features), row_bytes = 2 * end;
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (WgmmaSegment segment = block.first; segment.chunks; segment.next()) {
      const int64_t first = static_cast<int64_t>(segment.token_tile(p)) * Block::kTokens, left = p.tokens - first;
      const uint32_t tokens = static_cast<uint32_t>(left < Block::kTokens ? left : Block::kTokens);
      uint32_t column = segment.chunk * kWgmmaColumns + 8 * (lane % 8);
      const uint8_t* x = static_cast<const uint8_t*>(p.x) + (first + lane / 8) * row_bytes + 2 * column;
#pragma unroll 1
      for (uint32_t i = 0; i < segment.chunks; ++i, turn.next()) {
        wait_together(block.empty(turn.at), (turn.round + 1) % 2);
        const uint8_t* from = x;
        uint32_t to = block.stage(turn.at) + piece_at();
        const bool exists[2] = {column < end, column + 64 < end};
#pragma unroll 4
        for (uint32_t eight = 0; eight < tokens / 8; ++eight, to += 8 * 128) copy_eight(to, from, row_bytes, exists, 8);
        if (tokens % 8) copy_eight(to, from, row_bytes, exists, tokens % 8);
        mbarrier_arrive_after_copies(block.raw(turn.at));
        x += 2 * kWgmmaColumns, column += kWgmmaColumns;
      }
    }
  }

  // Of eight tokens, of which so many exist.
  __device__ __forceinline__ void copy_eight(uint32_t to, const uint8_t*& from, uint32_t row_bytes, const bool (&exists)[2], uint32_t tokens) const {
#pragma unroll
    for (uint32_t row = 0; row < 8; row += 4) {
      if (row + lane / 8 < tokens)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          cp_async_or_zero((to ^ 16 * row) + 128 * row + half * Block::kHalf, from + 128 * half, exists[half]);
      from = kept(from + 4 * row_bytes);  // one pointer: the compiler would have one for each half
    }
  }

  // Where piece `piece` of the 8 of a half of the columns of token `lane` / 8 stands.
  __device__ __forceinline__ uint32_t place_of(uint32_t piece) const { return 128 * (lane / 8) + 16 * (piece ^ lane / 8); }
  __device__ __forceinline__ uint32_t piece_at() const { return place_of(lane % 8); }

  // A half of the tokens, four at a time, both units of a half of their columns.
  __device__ __forceinline__ void order_x(uint32_t half) const {
    constexpr uint32_t kAtOnce = kFours < 4 ? kFours : 4;  // as registers allow
    const uint32_t of_half = half * kFours * 512;
    const bool plain = block.plain(p), sums = plain || block.sums_x(p);
    const uint32_t to = block.ring + place_of(plain ? plain_piece() : lane % 8);
    Turn<Block::kStages> turn;
#pragma unroll 1
    for (uint32_t i = 0; i < block.first.chunks + block.first.left; ++i, turn.next()) {
      wait_together(block.raw(turn.at), turn.round % 2);
      const uint32_t x_at = turn.at * Block::kStage + of_half;
#pragma unroll
      for (uint32_t first = 0; first < kFours; first += kAtOnce) {
        uint32_t x[kAtOnce][2][4];
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
          for (uint32_t columns = 0; columns < 2; ++columns)
            load_pieces(x[j][columns], x_at, first + j, columns);
        sync_warp();
        if constexpr (Block::kPlain)
          if (plain) raise(x);
#pragma unroll
        for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
          for (uint32_t columns = 0; columns < 2; ++columns) {
            const uint32_t(&v)[4] = x[j][columns];
            store_shared(((to + x_at) ^ j % 2 * 64) + 512 * (first + j) + columns * Block::kHalf, make_uint4(v[0], v[1], v[2], v[3]));
          }
      }
      if constexpr (Block::kPlain || Block::kSumsX)
        if (sums) {
          sync_warp();
          add_up(x_at, plain, turn.at * Block::kStage + Block::kXSumsAt + half * kFours * 16);
        }
      fence_proxy_async();
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.full(turn.at));
    }
  }

  // Pieces 0 .. 3 of both units of a half of the columns, of four tokens: row r of a matrix is of token r / 2 and of unit r % 2.
  __device__ __forceinline__ void load_pieces(uint32_t (&x)[4], uint32_t x_at, uint32_t four, uint32_t columns) const {
    const uint32_t row = lane % 8, from = 128 * (row / 2) + 16 * ((row % 2 * 4 + lane / 8) ^ row / 2);
    ldmatrix(x, block.memory + (((x_at + from) ^ four % 2 * 64) + 512 * four + columns * Block::kHalf));
  }

  // With plain codes instruction j of a unit has words 2i + j of its lanes: words 1 and 2 of the order of wgmma_block.h change places.
  __device__ __forceinline__ uint32_t plain_piece() const { return lane / 4 % 2 * 4 + lane % 2 * 2 + lane / 2 % 2; }

  // For plain codes, and instruction 1's by so much less as its codes are larger.
  template <uint32_t kAtOnce>
  __device__ __forceinline__ void raise(uint32_t (&x)[kAtOnce][2][4]) const {
    const uint32_t factor = lane % 2 ? kBothPowers<T, kRaise - Block::Kind::template kOddPlace<T>> : kBothPowers<T, kRaise>;
#pragma unroll
    for (uint32_t j = 0; j < kAtOnce; ++j)
#pragma unroll
      for (int i = 0; i < 8; ++i) x[j][i / 4][i % 4] = fma2(T{}, x[j][i / 4][i % 4], factor, kNothing);
  }

  // Of x in order: each token's sum over the chunk, or, with plain codes, that of its products with - 2^(bits-1). Pieces 0 and 1 are what instruction
  // 0 of a unit takes, 2 and 3 those of instruction 1; as the A operand of mma 0 and 2 are rows 0 to 7, 1 and 3 the others.
  __device__ __forceinline__ void add_up(uint32_t x_at, bool plain, uint32_t to) const {
    constexpr uint32_t kMiddle = 1u << (Block::kBits - 1), kOddMiddle = kMiddle << Block::Kind::template kOddPlace<T>;
    const uint32_t first = plain ? kSigns | kMiddle * 0x10001u : kBoth<T, 1>, second = plain ? kSigns | kOddMiddle * 0x10001u : kBoth<T, 1>;
#pragma unroll 2
    for (uint32_t four = 0; four < kFours; ++four) {
      float d[4] = {};
#pragma unroll
      for (int columns = 0; columns < 2; ++columns) {
        uint32_t x[4];
        load_pieces(x, x_at, four, columns);
        mma(T{}, d, x, first, second);
      }
      const float of_unit = d[0] + d[2], of_token = of_unit + as_float(shuffle_xor(as_bits(of_unit), 4));
      if (lane % 8 == 0) *reinterpret_cast<float*>(block.memory + to + 16 * four + lane / 2) = of_token;
    }
  }
};

}  // namespace
}  // namespace hfq
