// The kernel of wgmma.h, for one kind of codes in each file that includes this.
//
// wgmma.m64nNk16 takes its first operand from registers: warp w of four holds rows 16 w .. 16 w + 15, in just the fragments of mma.m16n8k16.
// So four tiles of the layout are its 64 rows as they are, and codes become numbers in registers. The second operand, x, is read by the
// hardware from shared memory, [tokens][k] in rows of 128 bytes, swizzled. There x must stand in the order in which the layout has its columns:
//
//   columns 8t + 4j + {0, 1} of a unit are k = 2t, 2t + 1 of instruction j, columns 8t + 4j + {2, 3} are k = 2t + 8, 2t + 9
//   so word 4t + 2j + h of a unit of x (two columns each) goes to word 4 (2j + h) + t, in 16-byte piece 2j + h
//   and piece p of the row of token m stands in place p ^ m % 8: that is the swizzle of 128 bytes
//
// Words move, so copies are of 4 bytes: 32 lanes read 128 bytes of one token and write the 32 banks, each once. No register waits for a load.
//
// Four warps copy chunks of 128 columns to a ring of stages: x, codes, scales. The other warps have a tile each; they wait for a stage to be full,
// and say when it is empty, so that none waits for another that is behind. While the instructions of a unit run, the next one's numbers are made.
// Scales multiply float32 sums after a group, or a chunk if that ends first; sums of x for zero points come from mma with ones, as in
// gemm_kernel.h.
//
// x costs as many bytes of L2 as codes do: 64 tokens as many as 256 rows of 4 bits. So 256 rows share it; 128 tokens leave registers for 128 rows
// only. Few rows leave multiprocessors without work: then the columns are cut, the blocks that share rows are a cluster, and each adds up its
// part of the rows from all blocks' shared memory, in their order.
//
// Instructions (counted in code for sm_90a, bfloat16, 4 bits, groups of 128): for a chunk of its tile a warp takes 211 with 16 tokens and 239 with
// 64, 90 of them for codes; a copying warp 200 and 340. So a scheduler, with four tiles and one of these, issues 1040 (1300) instructions for
// 256 rows of 128 columns, whose bytes take 1130 clocks from memory and 730 (1170) from L2 (gemm_plan.cu has the rates).
#pragma once

#include <type_traits>

#include "fragments.h"
#include "gemm_output.h"
#include "wgmma.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFQ_WGMMA
#endif

namespace hfq {
namespace {

template <class Kind, class T, int kTokens>
struct WgmmaBlock {
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (Kind::kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kTiles = kTokens > 64 ? 8 : 16, kRows = kTiles * kTileRows;  // a warp of consumers for each tile of rows
  static constexpr int kProducers = 4, kThreads = 32 * (kTiles + kProducers);
  // Registers of a thread: at first as many as there are for all (ptxas' number, which has to be this one: tests/kernels/test_ptxas.py). With 64
  // tokens and more the copying warps then give some to the others.
  static constexpr int kAtFirst = kTiles == 16 ? 96 : 168;
  static constexpr int kOfConsumers = kTokens == 128 ? 224 : kTokens == 64 ? 104 : kAtFirst;
  static constexpr int kOfProducers = kTokens == 128 ? 56 : kTokens == 64 ? 64 : kAtFirst;
  static_assert(kTiles * kOfConsumers + kProducers * kOfProducers <= (kTiles + kProducers) * kAtFirst);
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;  // of a chunk
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2;

  // A stage: two halves of 64 columns of x, [kTokens][128 bytes]; codes of each tile; of each tile and unit 64 bytes of scales, and of zero
  // points; sums of x, [kUnits][kTokens].
  static constexpr int kHalf = kTokens * 128, kCodesAt = 2 * kHalf, kScalesAt = kCodesAt + kTiles * kBytes, kScaleBytes = 64;
  static constexpr int kZerosAt = kScalesAt + kTiles * kUnits * kScaleBytes, kXSumsAt = kZerosAt + kTiles * kUnits * kScaleBytes;
  static constexpr int kStage = (kXSumsAt + kUnits * kTokens * 4 + 1023) / 1024 * 1024;
  // Shared memory: the ring, the table of a codebook, barriers.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 256;
  static constexpr int kRoom = (kMostWgmmaBytes - kTableBytes - kBarrierBytes) / kStage, kStages = kRoom > 8 ? 8 : kRoom;
  static constexpr int kRing = kStages * kStage, kSharedBytes = kRing + kTableBytes + kBarrierBytes;
  static_assert(kStages >= 3 && kTokens * (kRows + 4) * 4 <= kRing && 8 * (3 * kStages + 2) <= kBarrierBytes);

  uint8_t *ring, *table;
  uint64_t *full, *empty, *summed;       // of each stage
  uint64_t *filled, *drained;            // the table; all stages, for good
  uint32_t split, first_token, first_tile;
  uint32_t chunk, chunks;                // the first one, and how many

  __device__ __forceinline__ explicit WgmmaBlock(const WgmmaParams& p) {
    ring = swizzled_memory();
    table = ring + kRing;
    full = reinterpret_cast<uint64_t*>(table + kTableBytes), empty = full + kStages, summed = empty + kStages, filled = summed + kStages;
    drained = filled + 1;
    // Neighbouring clusters read the same weights for other tokens: the second finds them in L2.
    const uint32_t splits = p.plan.splits, all = static_cast<uint32_t>((p.weight.in_features + kWgmmaColumns - 1) / kWgmmaColumns);
    split = blockIdx.x % splits;
    first_token = blockIdx.x / splits % p.token_tiles * kTokens;
    first_tile = blockIdx.x / splits / p.token_tiles * kTiles;
    chunk = split * p.plan.split_chunks;
    chunks = chunk < all ? (all - chunk < static_cast<uint32_t>(p.plan.split_chunks) ? all - chunk : p.plan.split_chunks) : 0;
  }

  __device__ __forceinline__ void init_barriers() const {
    for (int i = 0; i < kStages; ++i) {
      mbarrier_init(full + i, 32 * kProducers);
      mbarrier_init(empty + i, kTiles);
      mbarrier_init(summed + i, kTiles < kTokenTiles ? kTiles : kTokenTiles);
    }
    mbarrier_init(filled, 32 * kTiles);
    mbarrier_init(drained, kTiles);
  }
};

// A stage after the other, and in which round of the ring.
template <int kStages>
struct Turn {
  uint32_t at = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++at == kStages) at = 0, ++round;
  }
};

// ---- from global memory to stages: a warp has a half of a chunk's columns of x, of every second eight tokens, and a quarter of the tiles

template <class Block>
struct WgmmaProducer {
  static constexpr int kTiles = Block::kTiles / Block::kProducers, kBits = Block::kBits, kBlocks = Block::kBlocks;

  const WgmmaParams& p;
  int lane;
  uint32_t chunk;
  // What is copied next, and where it goes, from the beginning of a stage.
  const uint8_t *x_from, *codes_from;
  uint32_t x_to, codes_to, column, blocks;  // column: the lane's in a chunk; blocks: of the weight's columns
  uint32_t x_place[8];                      // of eight tokens
  uint32_t row_bytes, tile_bytes;
  int tokens, tiles, tile, first_tile;      // of the warp: how many exist, and the first one of the weight and of the block

  __device__ __forceinline__ WgmmaProducer(const WgmmaParams& params, const Block& block, int warp)
      : p(params), lane(threadIdx.x % 32), chunk(block.chunk) {
    const Weight& w = p.weight;
    const int64_t token = block.first_token, all = (w.out_features + kTileRows - 1) / kTileRows;
    const int word = lane % 16, half = warp % 2, rest = warp / 2 * 8;
    tokens = static_cast<int>(p.tokens - token < Block::kTokenTiles * 8 ? p.tokens - token : Block::kTokenTiles * 8) - rest;
    column = 64 * half + 2 * lane;
    row_bytes = static_cast<uint32_t>(w.in_features) * 2;
    x_from = static_cast<const uint8_t*>(p.x) + (token + rest) * row_bytes + (static_cast<int64_t>(chunk) * kWgmmaColumns + column) * 2;
    x_to = half * Block::kHalf + 128 * rest + 4 * (word / 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) x_place[i] = 128 * i + 16 * ((lane / 16 * 4 + word % 4) ^ i);
    first_tile = warp * kTiles;
    tile = block.first_tile + first_tile;
    tiles = static_cast<int>(all - tile < 0 ? 0 : all - tile < kTiles ? all - tile : kTiles);
    blocks = static_cast<uint32_t>((w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>);
    tile_bytes = blocks * kBlockBytes<kBits>;
    codes_from = w.qweight + static_cast<int64_t>(tile) * tile_bytes + static_cast<int64_t>(chunk) * Block::kBytes + 16 * lane;
    codes_to = Block::kCodesAt + first_tile * Block::kBytes + 16 * lane;
  }

  // Asks for codes of the first stages: the weight is on its way when the kernel that gives x ends.
  __device__ __forceinline__ void prefetch_codes() const {
    constexpr uint32_t kBytes = Block::kStages * Block::kBytes;
    const uint32_t left = tile_bytes - chunk * Block::kBytes;
    if (lane < tiles) prefetch(codes_from - 16 * lane + static_cast<int64_t>(lane) * tile_bytes, left < kBytes ? left : kBytes);
  }

  // The next chunk to the stage at a shared address. What is not copied, of tokens and rows that do not exist, reaches no other one's sums; codes of
  // columns behind K meet zeros. (Loops stay loops: a producer has few registers, and time.)
  __device__ __forceinline__ void copy(uint32_t stage) {
    copy_activations(stage + x_to);
    const uint8_t* from = codes_from;
    uint32_t to = stage + codes_to;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, from += tile_bytes, to += Block::kBytes)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        constexpr int kBlock = kBlockBytes<kBits>;
        if (block && chunk * kBlocks + block >= blocks) break;
        cp_async(to + block * kBlock, from + block * kBlock);
        if constexpr (kBits == 3) cp_async<8>(to + block * kBlock + 512 - 8 * lane, from + block * kBlock + 512 - 8 * lane);
      }
    codes_from += Block::kBytes;
    copy_numbers(stage + Block::kScalesAt, p.weight.scales);
    if (p.weight.zeros) copy_numbers(stage + Block::kZerosAt, p.weight.zeros);
    ++chunk;
  }

  __device__ __forceinline__ void copy_activations(uint32_t to) {
    const bool exist = chunk * kWgmmaColumns + column < static_cast<uint32_t>(p.weight.in_features);
    const uint8_t* from = x_from;
#pragma unroll 1
    for (int left = tokens; left > 0; left -= 16, from += 8 * row_bytes, to += 2048) {  // every second eight is the warp's
      if (left >= 8) {
#pragma unroll
        for (int i = 0; i < 8; ++i, from += row_bytes) cp_async_or_zero<4>(to + x_place[i], from, exist);
      } else {
#pragma unroll
        for (int i = 0; i < 7; ++i, from += row_bytes)
          if (i < left) cp_async_or_zero<4>(to + x_place[i], from, exist);
      }
    }
    x_from += 2 * kWgmmaColumns;
  }

  // Scales or zero points of the units after which they are applied, 16 bytes to a lane.
  __device__ __forceinline__ void copy_numbers(uint32_t to, const void* numbers) const {
    const Weight& w = p.weight;
    const int of_pieces = w.scale_dtype == kFloat32 ? 2 : 1, of_units = p.flush_mask == 0 ? 2 : p.flush_mask == 1 ? 1 : 0;  // powers of two
    const uint32_t last = static_cast<uint32_t>(w.groups) - 1;
#pragma unroll 1
    for (int i = lane; i < tiles << (of_pieces + of_units); i += 32) {
      const uint32_t piece = i & ((1 << of_pieces) - 1), of_tile = i >> (of_pieces + of_units), flush = i >> of_pieces & ((1 << of_units) - 1);
      const uint32_t unit = flush * (p.flush_mask + 1) + p.flush_mask;
      uint32_t group = multiply_high(2 * (chunk * Block::kUnits + unit), p.group_magic);
      group = group < last ? group : last;  // units behind K
      const int64_t from = ((static_cast<int64_t>(tile + of_tile) * w.groups + group) << of_pieces) + piece;
      const uint32_t place = to + ((first_tile + of_tile) * Block::kUnits + unit) * Block::kScaleBytes + 16 * piece;
      cp_async(place, static_cast<const uint8_t*>(numbers) + 16 * from);
    }
  }
};

// ---- from stages to sums: a warp for each tile of rows

template <class Kind, class T, class Block>
struct WgmmaConsumer {
  static constexpr int kUnits = Block::kUnits, kSums = Block::kSums, kTokenTiles = Block::kTokenTiles;
  static constexpr float kMiddle = 1 << (Block::kBits - 1);

  const WgmmaParams& p;
  const Block& block;
  int lane, warp;
  uint32_t codes_at, scales_at;  // what the lane reads, from the beginning of a stage
  uint32_t table;                // of the lane
  float sums[kSums] = {}, products[kSums];
  Kind codes;
  uint32_t a[2][2][4];           // of two units, in turns

  __device__ __forceinline__ WgmmaConsumer(const WgmmaParams& params, const Block& b)
      : p(params), block(b), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    codes_at = kept(static_cast<uint32_t>(Block::kCodesAt + warp * Block::kBytes + 16 * lane));
    scales_at = kept(static_cast<uint32_t>(Block::kScalesAt + warp * kUnits * Block::kScaleBytes + lane / 4 * pair_bytes(p.weight.scale_dtype)));
    if constexpr (Kind::kTable) table = kept(shared_address(block.table) + 4 * lane);
  }

  // Numbers of unit `u`.
  template <int u>
  __device__ __forceinline__ void unpack(const uint8_t* stage) {
    if constexpr (u % Kind::kUnits == 0) codes.take(shared_address(stage) + codes_at + u / Kind::kUnits * kBlockBytes<Block::kBits>, lane);
    codes.template unit<T, u % Kind::kUnits>(table, a[u % 2]);
    Kind::order(a[u % 2]);
    // Here, and not behind the next fence, where ptxas would add one more.
#pragma unroll
    for (int i = 0; i < 8; ++i) a[u % 2][i / 4][i % 4] = kept(a[u % 2][i / 4][i % 4]);
  }

  // Sums of activations over the units for which scales are applied at once: the warp's share of the tokens.
  __device__ __forceinline__ void add_activations(uint8_t* stage, uint64_t* summed) const {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    if (warp >= kTokenTiles) return;
    float* to = reinterpret_cast<float*>(stage + Block::kXSumsAt);
    for (int tile = warp; tile < kTokenTiles; tile += Block::kTiles) {
      float d[4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t b[4];
        ldmatrix(b, stage + u / 2 * Block::kHalf + (8 * tile + lane % 8) * 128 + 16 * ((u % 2 * 4 + lane / 8) ^ lane % 8));
        mma(T{}, d, ones, b[0], b[1]);
        mma(T{}, d, ones, b[2], b[3]);
        if (((u + 1) & p.flush_mask) == 0) {
          if (lane < 4) *reinterpret_cast<float2*>(to + u * 8 * kTokenTiles + 8 * tile + 2 * lane) = make_float2(d[0], d[1]);
#pragma unroll
          for (int c = 0; c < 4; ++c) d[c] = 0.0f;
        }
      }
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(summed);
  }

  // Units u and later of the stage `turn`, of which `x` describes the activations. `more`: another one follows, whose first unit's numbers are made.
  template <int u>
  __device__ __forceinline__ void multiply(uint64_t x, const Turn<Block::kStages>& turn, bool more) {
    constexpr int kFrom = (u / 2 * Block::kHalf + u % 2 * 64) / 16;
    uint8_t* const stage = block.ring + turn.at * Block::kStage;
    // Nothing is on the way yet: no kernel that we know of has other matrix instructions between a group and its wait.
    if (u == 0 && p.weight.zeros) add_activations(stage, block.summed + turn.at);
    wgmma_fence();
    wgmma(T{}, products, a[u % 2][0], x + kFrom, (u & p.flush_mask) != 0);
    wgmma(T{}, products, a[u % 2][1], x + kFrom + 2, true);
    wgmma_commit();
    wgmma_wait<1>();
    if constexpr (u + 1 < kUnits) {
      unpack<u + 1>(stage);
    } else if (more) {
      Turn<Block::kStages> next = turn;
      next.next();
      mbarrier_wait(block.full + next.at, next.round % 2);
      unpack<0>(block.ring + next.at * Block::kStage);
    }
    // (Always so after the last unit. The compiler, which does not know, makes the numbers above before it waits.)
    if (((u + 1) & p.flush_mask) == 0) {
      if (u == p.flush_mask && p.weight.zeros) mbarrier_wait(block.summed + turn.at, turn.round % 2);
      wgmma_wait<0>(products);
      scale(stage + scales_at + u * Block::kScaleBytes, reinterpret_cast<const float*>(stage + Block::kXSumsAt) + u * 8 * kTokenTiles);
    }
    if constexpr (u + 1 < kUnits)
      multiply<u + 1>(x, turn, more);
    else
      wgmma_wait<0>();
  }

  // Adds products times their scales.
  __device__ __forceinline__ void scale(const uint8_t* pair, const float* x_sums) {
    const DType dtype = p.weight.scale_dtype;
    const Pair s = to_floats(load_pair(shared_address(pair), dtype), dtype);
    if (p.weight.zeros) {
      // Products are with code - middle: what lacks is middle - zero for each activation.
      const Pair zero = to_floats(load_pair(shared_address(pair + Block::kZerosAt - Block::kScalesAt), dtype), dtype);
      const float low = s.low * (kMiddle - zero.low), high = s.high * (kMiddle - zero.high);
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        const float2 of_x = *reinterpret_cast<const float2*>(x_sums + 8 * tile + 2 * (lane % 4));
        float* const d = sums + 4 * tile;
        d[0] += low * of_x.x, d[1] += low * of_x.y, d[2] += high * of_x.x, d[3] += high * of_x.y;
      }
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? s.low : s.high) * products[i];
  }

  // All chunks of the block.
  __device__ __forceinline__ void run() {
    // Rows of 128 bytes (swizzle 1 in bits 62, 63), 8 of them 1024 bytes from the next 8 (in 16 bytes, bits 32 to 45).
    const uint64_t x = uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (shared_address(block.ring) & 0x3ffff) / 16;
    Turn<Block::kStages> turn;
    if (block.chunks) {
      mbarrier_wait(block.full, 0);
      unpack<0>(block.ring);
    }
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next()) {
      fence_proxy_async();
      multiply<0>(x + turn.at * (Block::kStage / 16), turn, i + 1 < block.chunks);
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.empty + turn.at);
    }
  }

  // To [tokens][kRows + 4] of shared memory, in place of the stages: 8 lanes apart are 4 tokens, other banks.
  __device__ __forceinline__ void store_sums(float* partial) const {
    sync_warp();
    if (lane == 0) mbarrier_arrive(block.drained);
    mbarrier_wait(block.drained, 0);
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2, row = kTileRows * warp + lane / 4 + i / 2 % 2 * 8;
      partial[token * (Block::kRows + 4) + row] = sums[i];
    }
  }
};

// ---- from sums to memory: blocks of other columns are added, in their order, and rows are stored side by side

template <class T, class Block>
__device__ __forceinline__ void store_outputs(const WgmmaParams& p, const Block& block, const float* partial) {
  // Fours of rows; each block of the cluster takes as many.
  constexpr uint32_t kFours = Block::kRows / 4;
  const uint32_t splits = p.plan.splits, share = (kFours + splits - 1) / splits, first = block.split * share;
  const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
  for (uint32_t at = threadIdx.x; at < 8 * Block::kTokenTiles * share; at += Block::kThreads) {
    const uint32_t four = first + at % share, token = at / share;
    const int64_t n = static_cast<int64_t>(block.first_tile) * kTileRows + 4 * four, m = static_cast<int64_t>(block.first_token) + token;
    if (four >= kFours || n >= padded || m >= p.tokens) continue;
    const float4* const own = reinterpret_cast<const float4*>(partial + token * (Block::kRows + 4) + 4 * four);
    store_rows<T>(p, m, n, splits == 1 ? *own : sum_of_cluster(own, splits));
  }
}

// ---- kernel

template <class Kind, class T, int kTokens>
__global__ void __launch_bounds__(WgmmaBlock<Kind, T, kTokens>::kThreads, 1) wgmma_kernel(const WgmmaParams p) {
#ifdef HFQ_WGMMA
  using Block = WgmmaBlock<Kind, T, kTokens>;
  const Block block(p);
  float* const partial = reinterpret_cast<float*>(block.ring);
  let_next_kernel_start();
  if (threadIdx.x == 0) block.init_barriers();
  sync_block();
  const int warp = shuffle_from(threadIdx.x / 32, 0);  // the same for all lanes, as the compiler now knows: loops below are not divergent
  if (warp >= Block::kTiles) {
    if constexpr (Block::kOfProducers < Block::kAtFirst) give_registers<Block::kOfProducers>();
    WgmmaProducer<Block> mine(p, block, warp - Block::kTiles);
    mine.prefetch_codes();
    wait_for_previous_kernel();
    const uint32_t ring = shared_address(block.ring);
    Turn<Block::kStages> turn;
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next()) {
      if (turn.round) mbarrier_wait(block.empty + turn.at, (turn.round - 1) % 2);
      mine.copy(ring + turn.at * Block::kStage);
      mbarrier_arrive_after_copies(block.full + turn.at);
    }
  } else {
    if constexpr (Block::kOfConsumers > Block::kAtFirst) take_registers<Block::kOfConsumers>();
    if constexpr (Kind::kTable) {  // while the first copies are on the way
      TableCodes::fill<T>(block.table, p.weight.codebook);
      mbarrier_arrive(block.filled);
      mbarrier_wait(block.filled, 0);
    }
    wait_for_previous_kernel();  // which may read what will be overwritten
    WgmmaConsumer<Kind, T, Block> mine(p, block);
    mine.run();
    mine.store_sums(partial);
  }
  if (p.plan.splits > 1)
    sync_cluster();
  else
    sync_block();
  store_outputs<T>(p, block, partial);
  if (p.plan.splits > 1) sync_cluster_only();  // nobody's shared memory goes before all have read it
#endif
}

// ---- launcher

// No splits: the kernel does not run here, for want of shared memory or because another compiler has chosen other registers.
template <class Kind, class T, int kTokens>
WgmmaPlan plan_tokens(const LinearParams& p) {
  using Block = WgmmaBlock<Kind, T, kTokens>;
  const auto active = [](int blocks) {
    // With fewer registers than they count on, warps would wait for them forever.
    constexpr int kRegisters = Block::kOfConsumers > Block::kAtFirst ? Block::kAtFirst : 0;
    return active_clusters<WgmmaParams, wgmma_kernel<Kind, T, kTokens>>(blocks, Block::kThreads, Block::kSharedBytes, kRegisters);
  };
  return plan_wgmma(p, {Block::kRows, kTokens, active});
}

template <class Kind, class T, int kTokens>
const char* launch_wgmma_tokens(const WgmmaParams& params, cudaStream_t stream) {
  using Block = WgmmaBlock<Kind, T, kTokens>;
  constexpr auto kKernel = wgmma_kernel<Kind, T, kTokens>;
  WgmmaParams p = params;
  p.token_tiles = static_cast<uint32_t>((p.tokens + kTokens - 1) / kTokens);
  p.plan = plan_tokens<Kind, T, kTokens>(p);
  if (p.plan.splits == 0) return "the kernel with wgmma does not run here";  // takes_wgmma asks before
  const int64_t blocks = (p.weight.out_features + Block::kRows - 1) / Block::kRows * p.token_tiles * p.plan.splits;
  return launch_clusters(kKernel, static_cast<unsigned>(blocks), p.plan.splits, Block::kThreads, Block::kSharedBytes, stream, p);
}

// `use` of the smallest number of tokens of a thread block that a kernel has for so many tokens, as a type.
template <class Use>
auto with_block_tokens(int64_t tokens, const Use& use) {
  if (tokens <= 16) return use(std::integral_constant<int, 16>{});
  if (tokens <= 32) return use(std::integral_constant<int, 32>{});
  if (tokens <= 64) return use(std::integral_constant<int, 64>{});
  return use(std::integral_constant<int, 128>{});
}

template <class Kind>
bool runs_wgmma_of(const LinearParams& p) {
  return with_block_tokens(p.tokens, [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    return (p.x_dtype == kBFloat16 ? plan_tokens<Kind, BFloat16, kTokens>(p) : plan_tokens<Kind, Float16, kTokens>(p)).splits > 0;
  });
}

template <class Kind>
const char* launch_wgmma_of(const WgmmaParams& p, cudaStream_t stream) {
  return with_block_tokens(p.tokens, [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    return p.x_dtype == kBFloat16 ? launch_wgmma_tokens<Kind, BFloat16, kTokens>(p, stream) : launch_wgmma_tokens<Kind, Float16, kTokens>(p, stream);
  });
}

}  // namespace
}  // namespace hfq
