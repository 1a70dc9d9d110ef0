// The kernel of wide.h, for one kind of codes in each file that includes this.
//
// A warp takes 128 columns at a time (a step) of all rows of its thread block, 8 tiles of 16, or 4, and 8 or 16 tokens. So x of a step is read once
// from L2 for 128 rows or 64, and once from shared memory, into registers, for as many. Warps of a block, and blocks of a cluster, take turns with
// steps; nothing is shared between them until their sums meet.
//
// Memory of a warp: codes of one step, a place for each tile; x of one step; scales of one, as they are stored and as floats. A tile's place is
// filled again, for the next step, as soon as the tile has been multiplied, x as soon as it is in registers, scales as soon as they are floats. So
// all copies are eight (or four) tiles ahead of their use, some 3000 clocks. (Nothing comes from global memory to registers:
// linear_kernel.h says why.)
//
// What was measured on an H200 before codes were plain, with 8 tiles for all (4096 x 14336 in int4): 12.5 us with 16 tokens, 10.1 with 8, where
// memory takes 7.3. With n warps of a scheduler a tile of a step (1 KB of 4-bit codes) took what queueing says of 126 clocks of the pipe for codes,
// 107 of mma, and 260 of latency that is a warp's own: 280 clocks with two warps, 210 with three. 16 tokens left registers for twelve warps. Hence 4
// tiles, 128 registers and 16 warps wherever 8 tiles would need more registers, or memory for a table. 1 KB of codes takes 132 instructions with 16
// tokens (33 to mask codes and 8 to shift them, 16 mma, 16 for sums, a quarter of x), 93 with 8. Now 16 tokens take 11.5 us, 8 take 9.8: where both
// blocks of a multiprocessor are this kernel's, nothing hides what the next one's begin with.
#pragma once

#include <type_traits>

#include "gemm_output.h"
#include "linear_step.h"
#include "target.h"
#include "wide.h"

namespace hfq {
namespace {

// What a thread block has of sums: a warp's, [kTokens][kSumsStride] floats, and in a cluster what others have of those that it adds up, [block][its
// tokens][kRows], behind which is the barrier that counts it.
template <int kTokens_, int kRows_>
struct WideSums {
  static constexpr int kTokens = kTokens_, kRows = kRows_, kSumsStride = kRows + 4, kFours = kRows / 4;
  static constexpr int kSharedBytes = (kTokens + kMostWideSplits - 1) * kRows * 4, kSumsBytes = kSharedBytes + 16;
};

// 8-bit codes are twice the memory for the same rows, a table is 32 KB of it, and 16 tokens are twice the registers.
template <class Kind, int kTokenTiles>
constexpr int kWideTiles = Kind::kTable || Kind::kCodeBits == 8 || kTokenTiles == 2 ? 4 : 8;

template <class Block>
struct WideWarp;

// `kFlush`: scales are applied after so many units.
template <class Kind_, class T_, int kTokenTiles_, int kFlush_, bool kZeros_>
struct WideBlock : StepCodes<Kind_>, WideSums<8 * kTokenTiles_, kTileRows * kWideTiles<Kind_, kTokenTiles_>> {
  using Warp = WideWarp<WideBlock>;
  using Kind = Kind_;
  using T = T_;
  using StepCodes<Kind>::kBits;
  using StepCodes<Kind>::kBytes;
  static constexpr int kTokenTiles = kTokenTiles_, kTiles = kWideTiles<Kind, kTokenTiles>, kFlush = kFlush_;
  using Sums = WideSums<8 * kTokenTiles, kTileRows * kTiles>;
  using Sums::kRows;
  using Sums::kTokens;
  static constexpr bool kZeros = kZeros_;
  static constexpr int kGroups = kStepUnits / kFlush, kKinds = kZeros ? 2 : 1;  // of a step; of scales and zero points
  static constexpr int kNumbers = kKinds * kTiles;
  // Warps of a multiprocessor, by the registers they need, of one thread block or of several.
  static constexpr int kMostWarps = kTokenTiles == 2 && kGroups == 2 ? 12 : 16, kThreads = 32 * kMostWarps;

  // Memory of a warp. Codes [kTiles][kBytes]; x [kTokens][256 bytes]; pairs [kGroups][scales, zero points][kTiles][8]: as they are stored, in
  // places of 64 bytes, and as floats. Then its sums.
  static constexpr int kRowBytes = 2 * kStepColumns, kPairsStride = 64;
  static constexpr int kXAt = kTiles * kBytes, kPairsAt = kXAt + kTokens * kRowBytes, kPairsBytes = kGroups * kNumbers * kPairsStride;
  static constexpr int kFloatsAt = kPairsAt + kPairsBytes, kWarpBytes = kFloatsAt + kPairsBytes;
  static_assert(kWarpBytes % 128 == 0 && kTokens * Sums::kSumsStride * 4 <= kWarpBytes);
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0;
  static constexpr float kXCost = kTokenTiles == 2 ? 1.4f : 0.7f;  // of a step, in tiles
};

__device__ __forceinline__ uint32_t of_splits(const WideParams& p, uint32_t n) { return quotient(n, p.plan.splits, p.of_splits); }

// Of a thread block: its cluster, or itself, its place there, and its rows, in tiles. (%clusterid is a product with a float that the driver sets.)
struct WidePlace {
  uint32_t group, rank, first_tile;
  int tiles;

  __device__ __forceinline__ explicit WidePlace(const WideParams& p) : group(of_splits(p, blockIdx.x)), rank(blockIdx.x - group * p.plan.splits) {
    first_tile = group * p.tiles + (group < p.more ? group : p.more);
    tiles = static_cast<int>(p.tiles + (group < p.more));
  }
};

// What a warp asks global memory for, and scales as floats.
template <class Block>
struct WideCopies {
  static constexpr int kTiles = Block::kTiles, kGroups = Block::kGroups, kFlush = Block::kFlush;
  static constexpr int kBytes = Block::kBytes, kBlock = Block::kBlock, kBlocks = kBytes / kBlock;
  static constexpr bool kZeros = Block::kZeros;
  static constexpr int kPairsRounds = (Block::kNumbers * 4 + 31) / 32;  // of 32 lanes, where pairs have 64 bytes
  static constexpr int kTokenRounds = (Block::kTokens + 1) / 2;         // half a warp has a token
  static constexpr bool kAllLanes = Block::kTokens > 1;

  const WideParams& p;
  int lane, tiles;  // of the block's, those that exist
  // What is copied next: the step, and from where. Codes of a tile after the other.
  uint32_t step;
  const uint8_t *codes_from, *tile_from, *pairs_from[kPairsRounds], *x_from;
  // What the lane reads, and where what it copies goes; pairs: the first of a piece.
  uint32_t codes_at, pairs_at, floats_to, floats_at, pairs_to[kPairsRounds];

  // Asks for the first tile of the first step, before all that can wait.
  __device__ __forceinline__ WideCopies(const WideParams& params, uint32_t memory) : p(params), lane(threadIdx.x % 32) {
    const Weight& w = p.weight;
    const uint32_t warp = shuffle_from(threadIdx.x / 32, 0);  // the same for all lanes, as the compiler then knows
    const WidePlace place(p);
    const uint32_t first_tile = place.first_tile;
    tiles = place.tiles;
    step = warp * p.plan.splits + place.rank;
    codes_at = kept(memory + 16u * lane);
    codes_from = w.qweight + static_cast<uint64_t>(first_tile) * p.tile_bytes + (step * kBytes + 16 * lane);
    tile_from = codes_from;
    copy_codes(0);
    let_next_kernel_start();

    // A lane copies 16 bytes of a group: 4 or 2 pairs of a tile.
    const bool wide = p.group_bytes == 64;
#pragma unroll
    for (int i = 0; i < kPairsRounds; ++i) {
      const uint32_t at = lane + 32 * i, number = wide ? at / 4 : at / 2, tile = number % kTiles, of_tile = 16 * (wide ? at % 4 : at % 2);
      const void* const of_kind = kZeros && number >= kTiles ? w.zeros : w.scales;
      const uint64_t own = first_tile + (static_cast<int>(tile) < tiles ? tile : 0);
      const uint8_t* const from = static_cast<const uint8_t*>(of_kind) + own * p.pairs_bytes + of_tile;
      pairs_from[i] = kZeros ? from : kept(from);  // else it is made again in each step; with zero points registers are short
      pairs_to[i] = kept(memory + Block::kPairsAt + number * Block::kPairsStride + of_tile);
    }
    // Of what is stored, 32 lanes convert four times 8 pairs at a time; then the pair of a lane's rows is what it reads.
    pairs_at = kept(memory + Block::kPairsAt + lane / 8 * Block::kPairsStride + lane % 8 * (p.group_bytes / 8));
    floats_to = kept(memory + Block::kFloatsAt + 8 * lane);
    floats_at = kept(memory + Block::kFloatsAt + lane / 4 * 8);
    // (K is below 2^20.)
    x_from = static_cast<const uint8_t*>(p.x) + (lane / 16 * 2 * static_cast<uint32_t>(w.in_features) + step * Block::kRowBytes + 16 * (lane % 16));
  }

  // (Copies are instructions without branches: where there is nothing to copy, zeros are written.)

  // Codes of the next tile.
  __device__ __forceinline__ void copy_codes(int tile) {
    const int left = static_cast<int>(p.code_blocks) - static_cast<int>(step * kBlocks);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const uint32_t to = codes_at + tile * kBytes + i * kBlock;
      cp_async_or_zero(to, tile_from + i * kBlock, i < left);
      if (kBlock > 512 && lane < (kBlock - 512) / 16) cp_async_or_zero(to + 512, tile_from + 512, i < left);
    }
    tile_from += p.tile_bytes;
  }

  // Scales and zero points of the next step.
  __device__ __forceinline__ void copy_pairs() {
    const uint32_t last = static_cast<uint32_t>(p.weight.groups) - 1;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      uint32_t group = multiply_high(2 * (step * kStepUnits + i * kFlush), p.group_magic);
      group = group < last ? group : last;  // of units behind K, and steps behind the last one
#pragma unroll
      for (int r = 0; r < kPairsRounds; ++r)
        if (lane + 32u * r < Block::kNumbers * (p.group_bytes / 16))
          cp_async(pairs_to[r] + i * Block::kNumbers * Block::kPairsStride, pairs_from[r] + static_cast<uint64_t>(group) * p.group_bytes);
    }
  }

  // Where a lane's units of x go: they change places with their neighbours in odd tokens, so that 8 lanes read from all banks.
  __device__ __forceinline__ uint32_t x_to() const { return (codes_at ^ lane / 16 * 64) + Block::kXAt; }
  __device__ __forceinline__ bool columns_exist() const {
    return step * kStepColumns + 8 * (lane % 16) < static_cast<uint32_t>(p.weight.in_features);
  }

  // x of the next step.
  __device__ __forceinline__ void copy_x() {
    const int left = static_cast<int>(p.tokens) - lane / 16;
    const bool exist = columns_exist();
    const uint32_t to = kept(x_to());
    const uint8_t* from = x_from;
#pragma unroll
    for (int i = 0; i < kTokenRounds; ++i, from += 4 * p.weight.in_features)
      if (kAllLanes || lane < 16) cp_async_or_zero(to + i * 2 * Block::kRowBytes, from, exist && 2 * i < left);
    x_from += p.stride * Block::kRowBytes;
  }

  // x of the first step, through registers: what is copied comes behind the weights that were asked for before.
  __device__ __forceinline__ void store_first_x() {
    const int left = static_cast<int>(p.tokens) - lane / 16;
    const bool exist = columns_exist();
    uint4 x[kTokenRounds];
    const uint8_t* from = x_from;
#pragma unroll
    for (int i = 0; i < kTokenRounds; ++i, from += 4 * p.weight.in_features)
      x[i] = exist && 2 * i < left ? load_written(reinterpret_cast<const uint4*>(from)) : uint4{};
#pragma unroll
    for (int i = 0; i < kTokenRounds; ++i)
      if (kAllLanes || lane < 16) store_shared(x_to() + i * 2 * Block::kRowBytes, x[i]);
    x_from += p.stride * Block::kRowBytes;
  }

  // Scales and zero points become floats; `change(kind, pair)` makes of them what products take.
  template <class Change>
  __device__ __forceinline__ void convert_pairs(const Change& change) const {
    constexpr int kRounds = kGroups * Block::kNumbers / 4;
    RawPair raw[kRounds];
    Pair pairs[kRounds];
#pragma unroll
    for (int i = 0; i < kRounds; ++i) raw[i] = load_pair(pairs_at + 4 * i * Block::kPairsStride, p.weight.scale_dtype);
    to_floats(raw, p.weight.scale_dtype, pairs);
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const Pair pair = change(4 * i % Block::kNumbers / kTiles, pairs[i]);
      store_shared(floats_to + 4 * i * Block::kPairsStride, make_uint2(as_bits(pair.low), as_bits(pair.high)));
    }
  }
  // Those of a lane's rows.
  __device__ __forceinline__ Pair floats_of(int group, int kind, int tile) const {
    const uint2 both = load_shared<uint2>(floats_at + ((group * Block::kKinds + kind) * kTiles + tile) * Block::kPairsStride);
    return {as_float(both.x), as_float(both.y)};
  }
};

template <class Block>
struct WideWarp : WideCopies<Block> {
  using Copies = WideCopies<Block>;
  using Kind = typename Block::Kind;
  using T = typename Block::T;
  using Copies::kBlock;
  using Copies::kBlocks;
  using Copies::kBytes;
  using Copies::kFlush;
  using Copies::kGroups;
  using Copies::kTiles;
  using Copies::kZeros;
  using Copies::codes_at;
  using Copies::codes_from;
  using Copies::floats_of;
  using Copies::lane;
  using Copies::p;
  using Copies::step;
  using Copies::tile_from;
  using Copies::tiles;
  static constexpr int kTokenTiles = Block::kTokenTiles;
  // Codes are plain where they can be, since that is the fewest instructions (fragments.h). What sums of products then lack for each activation is
  // what they begin with, or a part of what zero points change. (An instruction cuts what it adds at 2^-18 of a code times its largest activation: in
  // 4 bits one that is 100 000 times its neighbours, and whose weight is zero, leaves 1 % of what they add up to. An infinity becomes NaN.)
  static constexpr bool kPlain = Kind::template kPlain<T>, kSumsX = kZeros || kPlain;
  static constexpr bool kBegins = kPlain && !kZeros && kGroups == 1;  // (no registers for more)
  static constexpr int kOddPlace = Kind::template kOddPlace<T>, kLowerPlace = Kind::template kLowerPlace<T>;
  static constexpr float kOddFactor = two_to(-kOddPlace), kLowerFactor = two_to(kLowerPlace);
  static constexpr int kMiddle = 1 << (Block::kBits - 1);
  static constexpr float kScaleFactor = two_to(kPlain ? kPlainUnit : 0);
  // What activations are multiplied with to be added up: one; minus the middle; for zero points and plain codes, 2^-126, the smallest number that is
  // normal, since zero points would make more of what is cut.
  static constexpr uint32_t kFactor = !kPlain ? kBoth<T, 1> : kZeros ? kBothPowers<T, -126> : (0x8000u | kMiddle) * 0x10001u;
  static constexpr float kZeroFactor = two_to(kPlain ? -7 : 0);
  // Codes of the next tile are loaded before a tile is multiplied, where there are registers for them.
  static constexpr bool kManySums = kGroups * Block::kKinds == 4;
  static constexpr int kAhead = kManySums || Block::kBits == 8 ? 0 : 1;

  uint32_t x_at, table;  // what the lane reads
  float sums[kTiles][kTokenTiles][4] = {};

  // `shared`: of the block; `memory`: of the warp.
  __device__ __forceinline__ WideWarp(const WideParams& params, uint32_t shared, uint32_t memory)
      : Copies(params, memory), table(kept(shared + 4 * (threadIdx.x % 32))) {
    x_at = kept(memory + Block::kXAt + lane / 4 * Block::kRowBytes + 64 * (lane / 4 % 2) + 16 * (lane % 4));
  }

  // ---- to sums

  // What a warp holds of x while it goes through its tiles.
  struct Activations {
    uint32_t b[kStepUnits][kTokenTiles][2][2];
    float sums[kGroups][kTokenTiles][kBegins ? 4 : 2];  // over the units of a group: for zero points, or what products lack or begin with
  };

  __device__ __forceinline__ void take_x(Activations& x) const {
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        const uint32_t at = (x_at ^ u % 2 * 64) + u / 2 * 128 + i * 8 * Block::kRowBytes;
        uint32_t(&b)[2][2] = x.b[u][i];
        Kind::activations(load_shared<uint4>(at), b);
        if constexpr (kPlain) {
          const uint32_t first = b[0][1];
          b[0][1] = b[1][0], b[1][0] = first;
        }
        if constexpr (kPlain)
#pragma unroll
          for (int j = 0; j < 4; ++j) b[j / 2][j % 2] = fma2(T{}, b[j / 2][j % 2], kBothPowers<T, kRaise>, kNothing);
      }
    if constexpr (kSumsX)
#pragma unroll
      for (int group = 0; group < kGroups; ++group) sum_x(group, x);
  }

  // The B operands of both instructions of a unit are one A operand, of which tokens are the rows, and the sum of a token is that of rows g and g +
  // 8.
  __device__ __forceinline__ void sum_x(int group, Activations& x) const {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      float d[4] = {};
#pragma unroll
      for (int u = group * kFlush; u < (group + 1) * kFlush; ++u) {
        const uint32_t a[4] = {x.b[u][i][0][0], x.b[u][i][0][1], x.b[u][i][1][0], x.b[u][i][1][1]};
        mma(T{}, d, a, kFactor, kFactor);
      }
      const uint32_t sum = as_bits(d[0] + d[2]);  // of token lane / 4
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        x.sums[group][i][c] = as_float(shuffle_from(sum, 8 * (lane % 4) + 4 * c));
        if constexpr (kBegins) x.sums[group][i][c + 2] = as_float(kept(as_bits(x.sums[group][i][c] * kLowerFactor)));
      }
    }
  }

  // Zero points become what products lack for each activation: - zero with plain codes, with others, which are code - middle, middle - zero.
  __device__ __forceinline__ void convert_pairs() const {
    Copies::convert_pairs([](int kind, const Pair& pair) -> Pair {
      constexpr float kLowest = kPlain ? 0 : kMiddle;
      if (kind == 1) return {(kLowest - pair.low) * kZeroFactor, (kLowest - pair.high) * (kLowerFactor * kZeroFactor)};
      return kPlain ? Pair{pair.low * kScaleFactor, pair.high * (kScaleFactor / kLowerFactor)} : pair;
    });
  }

  // Codes of a tile, to registers.
  __device__ __forceinline__ void take_codes(int tile, Kind (&codes)[kBlocks]) const {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) codes[i].take(codes_at + tile * kBytes + i * kBlock, lane);
  }

  // Units u and later of a tile.
  template <int u>
  __device__ __forceinline__ void multiply(int tile, uint32_t table, const Activations& x, const Kind (&codes)[kBlocks],
                                           float (&products)[2][kTokenTiles][4]) {
    constexpr int kGroup = u / kFlush;
    if constexpr (u % kFlush == 0)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          products[1][i][c] = 0.0f;
          products[0][i][c] = kBegins ? x.sums[kGroup][i][c] : 0.0f;
        }
    uint32_t a[2][4];
    if constexpr (kPlain)
      codes[u / Kind::kUnits].template plain_unit<u % Kind::kUnits>(a);
    else
      codes[u / Kind::kUnits].template unit<T, u % Kind::kUnits>(table, a);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) mma(T{}, products[j][i], a[j], x.b[u][i][j][0], x.b[u][i][j][1]);
    if constexpr ((u + 1) % kFlush == 0) {
      const Pair scale = floats_of(kGroup, 0, tile), lack = kZeros ? floats_of(kGroup, 1, tile) : Pair{};
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float product = products[0][i][c] + products[1][i][c] * kOddFactor;
          if constexpr (kZeros) product += (c < 2 ? lack.low : lack.high) * x.sums[kGroup][i][c % 2];
          if constexpr (kPlain && !kZeros && !kBegins) product += (c < 2 ? 1 : kLowerFactor) * x.sums[kGroup][i][c % 2];
          sums[tile][i][c] += (c < 2 ? scale.low : scale.high) * product;
        }
    }
    if constexpr (u + 1 < kStepUnits) multiply<u + 1>(tile, table, x, codes, products);
  }

  // All steps of the warp. (One at least: behind the last one are zeros.) `prepare`: what is to be done once while the first weights are on their
  // way.
  template <class Prepare>
  __device__ __forceinline__ void run(const Prepare& prepare) {
    // A group of copies for each tile, so that the oldest of kTiles groups is always what comes next.
    this->copy_pairs();
    cp_async_commit();
#pragma unroll
    for (int tile = 1; tile < kTiles; ++tile) {
      if (tile < tiles) this->copy_codes(tile);
      cp_async_commit();
    }
    prepare();
    if constexpr (Kind::kTable) {
      TableCodes::fill<T>(shared_memory(), p.weight.codebook);
      sync_block();
    }
    wait_for_previous_kernel();
    this->store_first_x();
#pragma unroll 1
    do {
      cp_async_wait<kTiles - 1>();
      sync_warp();  // x and scales are there for all lanes
      Activations x;
      take_x(x);
      convert_pairs();
      step += p.stride;
      sync_warp();  // all have read x and pairs as they are stored, and written them as floats
      this->copy_x();
      this->copy_pairs();
      tile_from = codes_from += p.stride * kBytes;
      Kind codes[1 + kAhead][kBlocks];
      if (kAhead) take_codes(0, codes[0]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        // (A branch that also keeps the compiler from beginning with several tiles, for which there are no registers.)
        if (tile < tiles) {
          if (tile + kAhead < kTiles) {
            cp_async_wait<kTiles - 1 - kAhead>();
            if constexpr (kBlock > 512) sync_warp();  // lanes take words that others have copied
            take_codes(tile + kAhead, codes[(tile + kAhead) % (1 + kAhead)]);
          }
          float products[2][kTokenTiles][4];
          multiply<0>(tile, table, x, codes[tile % (1 + kAhead)], products);
          if constexpr (kBlock > 512) sync_warp();
          this->copy_codes(tile);
        }
        cp_async_commit();
      }
    } while (step < p.steps);
    cp_async_wait<0>();
    sync_warp();  // the warp's memory is free
  }

  // To the warp's memory, which `to` points to: [kTokens][kSumsStride]. Lanes of 2 tokens and a row each have other banks.
  __device__ __forceinline__ void store_sums(float* to) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          to[(8 * i + 2 * (lane % 4) + c % 2) * Block::kSumsStride + kTileRows * tile + lane / 4 + c / 2 * 8] = sums[tile][i][c];
  }
};

// ---- kernel

template <class Block>
__global__ void __launch_bounds__(Block::kThreads, 1) wide_kernel(const WideParams p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using T = typename Block::T;
  constexpr int kWarpFloats = Block::kWarpBytes / 4, kFours = Block::kFours;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const WidePlace place(p);
  const int tokens = static_cast<int>(p.tokens), fours = 4 * place.tiles;
  // Token t of a product is token t / splits of block t % splits.
  const int splits = p.plan.splits, rank = static_cast<int>(place.rank);
  const auto tokens_of = [&](int block) { return static_cast<int>(of_splits(p, tokens - block + splits - 1)); };
  const int own_tokens = tokens_of(rank);
  uint8_t* const shared = shared_memory();
  float* const first = reinterpret_cast<float*>(shared + Block::kTableBytes);  // of warp 0
  const float4* const others = reinterpret_cast<const float4*>(first + warps * kWarpFloats);
  const uint32_t pushed = shared_address(others) + Block::kSharedBytes;
  {
    typename Block::Warp mine(p, shared_address(shared), shared_address(first + warp * kWarpFloats));
    mine.run([&] {
      if (splits == 1) return;
      if (threadIdx.x == 0) {
        mbarrier_init(pushed, 1);
        fence_mbarrier_init();
        mbarrier_arrive_and_expect(pushed, 16 * own_tokens * fours * (splits - 1));
      }
      sync_cluster_only();
    });
    mine.store_sums(first + warp * kWarpFloats);
  }
  sync_block();

  // What the block's warps have of four rows and a token.
  const auto sum_of_warps = [&](int token, int four) {
    const float4* const at = reinterpret_cast<const float4*>(first + token * Block::kSumsStride + 4 * four);
    float4 sum = {};
#pragma unroll 4
    for (int w = 0; w < warps; ++w) sum = plus(sum, at[w * (kWarpFloats / 4)]);
    return sum;
  };
  if (splits > 1) {
    for (int i = threadIdx.x; i < tokens * kFours; i += blockDim.x) {
      const int token = i / kFours, four = i % kFours, of_block = static_cast<int>(of_splits(p, token)), block = token - of_block * splits;
      if (block == rank || four >= fours) continue;
      const float4* const to = others + (rank * tokens_of(block) + of_block) * kFours + four;
      push_to_block(shared_address(to), sum_of_warps(token, four), pushed, block);
    }
    mbarrier_wait_for_pushed(pushed, 0);
  }
  for (int i = threadIdx.x; i < own_tokens * kFours; i += blockDim.x) {
    const int of_block = i / kFours, four = i % kFours, token = of_block * splits + rank;
    if (four >= fours) continue;
    float4 sum = sum_of_warps(token, four);
    if (splits > 1) {
      const float4 own = sum;
      sum = {};
#pragma unroll 2
      for (int s = 0; s < splits; ++s)  // in the same order for all tokens
        sum = plus(sum, s == rank ? own : others[(s * own_tokens + of_block) * kFours + four]);
    }
    store_rows<T>(p, token, static_cast<int64_t>(place.first_tile) * kTileRows + 4 * four, sum);
  }
#endif
}

// ---- launcher

template <class Block>
const char* launch_wide_block(const LinearParams& params, cudaStream_t stream) {
  WideParams p = {};
  static_cast<LinearParams&>(p) = params;
  const int64_t tiles = divided(p.weight.out_features, kTileRows), steps = divided(p.weight.in_features, kStepColumns);
  const auto active = [](int splits) {
    constexpr size_t kAlone = 120 << 10;  // more than half of a multiprocessor's shared memory
    return active_clusters<WideParams, wide_kernel<Block>>(splits, Block::kThreads / 2, kAlone, 0);
  };
  const WideShape shape = {Block::kTiles, Block::kMostWarps, Block::kWarpBytes, Block::kTableBytes, Block::kSumsBytes, Block::kXCost, active};
  p.plan = plan_wide(tiles, steps, shape);
  if (p.plan.groups == 0) return "the kernel for up to 16 tokens does not run here";
  p.tiles = static_cast<uint32_t>(tiles / p.plan.groups), p.more = static_cast<uint32_t>(tiles % p.plan.groups);
  p.steps = static_cast<uint32_t>(steps), p.stride = p.plan.splits * p.plan.warps;
  p.code_blocks = static_cast<uint32_t>(divided(p.weight.in_features, kBlockColumns<Block::kBits>));
  p.tile_bytes = p.code_blocks * Block::kBlock;
  p.group_bytes = 8 * pair_bytes(p.weight.scale_dtype);
  p.pairs_bytes = static_cast<uint32_t>(p.weight.groups) * p.group_bytes;
  p.of_splits = reciprocal(p.plan.splits);
  const size_t needed = Block::kTableBytes + p.plan.warps * Block::kWarpBytes + (p.plan.splits > 1 ? Block::kSumsBytes : 0);
  const size_t shared_bytes = p.plan.room ? limited(needed, p.plan.room) : needed;
  const unsigned blocks = p.plan.groups * p.plan.splits, threads = 32 * p.plan.warps;
  if (p.plan.splits == 1) return launch_early(wide_kernel<Block>, blocks, threads, shared_bytes, stream, p);
  return launch_clusters(wide_kernel<Block>, blocks, p.plan.splits, threads, shared_bytes, stream, p);
}

template <class Kind, class T, int kTokenTiles, int kFlush>
const char* launch_wide_flush(const LinearParams& p, cudaStream_t stream) {
  if constexpr (Kind::kMayHaveZeros)
    if (p.weight.zeros) return launch_wide_block<WideBlock<Kind, T, kTokenTiles, kFlush, true>>(p, stream);
  return launch_wide_block<WideBlock<Kind, T, kTokenTiles, kFlush, false>>(p, stream);
}

template <class Kind, class T>
const char* launch_wide_tokens(const LinearParams& p, cudaStream_t stream) {
  if constexpr (!std::is_same<Kind, E4m3Codes>::value) {
    const bool whole = flush_mask(p.weight, kStepUnits) == kStepUnits - 1;
    if (!whole) return p.tokens <= 8 ? launch_wide_flush<Kind, T, 1, 2>(p, stream) : launch_wide_flush<Kind, T, 2, 2>(p, stream);
  }
  return p.tokens <= 8 ? launch_wide_flush<Kind, T, 1, 4>(p, stream) : launch_wide_flush<Kind, T, 2, 4>(p, stream);
}

template <class Kind>
const char* launch_wide_of(const LinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_wide_tokens<Kind, BFloat16>(p, stream) : launch_wide_tokens<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
