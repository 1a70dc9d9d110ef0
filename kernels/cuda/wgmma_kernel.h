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
// Chunks of 128 columns go through a ring of stages. A lane copies the very codes that it reads, so these need no barrier, and the numbers of
// the next chunk's first unit are made before it; x and scales wait for it. While the instructions of a unit run, the next one's numbers are made.
// Scales multiply float32 sums after a group, or a chunk if that ends first; sums of x for zero points come from mma with ones, as in
// gemm_kernel.h.
//
// x costs as many bytes of L2 as codes do, 2 tokens for each row of 4 bits. So 256 rows share it, in four groups of four warps, which also hide
// each other's waits; 128 tokens need all registers of two groups. Few rows leave multiprocessors without work: then the columns are cut, the
// blocks that share rows are a cluster, and each adds up its part of the rows from all blocks' shared memory, in their order.
#pragma once

#include "fragments.h"
#include "gemm_output.h"
#include "wgmma.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFQ_WGMMA
#endif

namespace hfq {
namespace {

template <class Kind, class T, int kTokens>
struct WgmmaWarp {
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (Kind::kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kGroups = kTokens > 64 ? 2 : 4, kWarps = 4 * kGroups, kThreads = 32 * kWarps, kRows = kWarps * kTileRows;
  static constexpr int kUnits = kWgmmaColumns / kUnitColumns;                                  // of a chunk
  static constexpr int kBlocks = kWgmmaColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kTokenTiles = kTokens / 8, kSums = kTokens / 2;
  static constexpr float kMiddle = 1 << (kBits - 1);

  // A stage: two halves of 64 columns of x, [kTokens][128 bytes]; codes of each warp; of each warp and unit 64 bytes of scales, and of zero points.
  static constexpr int kHalf = kTokens * 128, kCodesAt = 2 * kHalf, kScalesAt = kCodesAt + kWarps * kBytes, kScaleBytes = 64;
  static constexpr int kZerosAt = kScalesAt + kWarps * kUnits * kScaleBytes;
  static constexpr int kStage = (kZerosAt + kWarps * kUnits * kScaleBytes + 1023) / 1024 * 1024;
  // Shared memory: the ring, from a multiple of 1024 bytes on, which the swizzle counts from; the table of a codebook; sums of x.
  static constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kXSumBytes = kUnits * kTokens * 4;
  static constexpr int kRoom = (kMostWgmmaBytes - 1024 - kTableBytes - kXSumBytes) / kStage, kStages = kRoom > 6 ? 6 : kRoom;
  static constexpr int kRing = kStages * kStage, kSharedBytes = 1024 + kRing + kTableBytes + kXSumBytes;
  static_assert(kStages >= 3 && kTokens * (kRows + 4) * 4 <= kRing);

  const WgmmaParams& p;
  const uint8_t* table;
  int lane, warp;
  uint32_t chunk, end_chunk;             // of the thread block: the next one to copy
  // What is copied next, and where it goes, from the beginning of a stage.
  const uint8_t *x_from, *codes_from, *scales_from;
  uint32_t x_to, codes_at, scales_to;
  uint32_t columns_left;                 // from the lane's to the end of the row
  uint32_t x_step;                       // bytes of eight tokens
  int x_tokens;                          // that the warp copies, every eighth
  int scale_unit;                        // that the lane copies scales of; less than 0 if none
  uint32_t scales_at;                    // what the lane reads
  float sums[kSums] = {}, products[kSums];
  Kind codes;
  uint32_t a[2][2][4];                   // of two units, in turns

  __device__ __forceinline__ WgmmaWarp(const WgmmaParams& params, const uint8_t* lookups, uint32_t split, uint32_t first_token, uint32_t first_tile)
      : p(params), table(lookups), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
    const Weight& w = p.weight;
    const uint32_t chunks = static_cast<uint32_t>((w.in_features + kWgmmaColumns - 1) / kWgmmaColumns);
    chunk = split * p.plan.split_chunks;
    end_chunk = chunk + p.plan.split_chunks < chunks ? chunk + p.plan.split_chunks : chunks;

    // Warp i of eight takes tokens i, i + 8, ...; the second eight, if there are, take the second half.
    const uint32_t row = warp % 8, half = warp / 8, word = lane % 16, column = chunk * kWgmmaColumns + 64 * half + 2 * lane;
    const int64_t token = first_token + row;
    x_tokens = token < p.tokens ? static_cast<int>((p.tokens - token + 7) / 8 < kTokenTiles ? (p.tokens - token + 7) / 8 : kTokenTiles) : 0;
    x_from = static_cast<const uint8_t*>(p.x) + (token * w.in_features + column) * 2;
    x_step = kept(static_cast<uint32_t>(w.in_features) * 16);
    x_to = kept(half * kHalf + row * 128 + 16 * ((lane / 16 * 4 + word % 4) ^ row) + 4 * (word / 4));
    columns_left = column < w.in_features ? static_cast<uint32_t>(w.in_features) - column : 0;

    // Warps without rows compute the last tile again and store nothing.
    const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows, tile = first_tile + warp < tiles ? first_tile + warp : tiles - 1;
    codes_from = w.qweight + (tile * blocks() + static_cast<int64_t>(chunk) * kBlocks) * kBlockBytes<kBits> + 16 * lane;
    codes_at = kept(static_cast<uint32_t>(kCodesAt + warp * kBytes + 16 * lane));
    // Half of the lanes copy scales, the other half zero points, a few lanes each unit's.
    const void* numbers = lane < 16 ? w.scales : w.zeros;
    const int pieces = pair_bytes(w.scale_dtype) / 2, unit = lane % 16 / pieces, piece = lane % pieces;
    scales_from = kept(static_cast<const uint8_t*>(numbers) + (tile * w.groups * pieces + piece) * 16);
    scale_unit = kept(unit < kUnits && ((unit + 1) & p.flush_mask) == 0 && numbers ? unit : -1);
    const int scales = warp * kUnits * kScaleBytes;
    scales_to = kept(static_cast<uint32_t>((lane < 16 ? kScalesAt : kZerosAt) + scales + unit * kScaleBytes + 16 * piece));
    scales_at = kept(static_cast<uint32_t>(kScalesAt + scales + lane / 4 * pair_bytes(w.scale_dtype)));
  }

  // Of the weight's columns.
  __device__ __forceinline__ uint32_t blocks() const {
    return static_cast<uint32_t>((p.weight.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>);
  }

  // ---- from global memory to a stage

  // The next chunk.
  __device__ __forceinline__ void copy(uint8_t* stage) {
    copy_activations(stage + x_to);
    constexpr int kBlock = kBlockBytes<kBits>;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      // Columns behind K meet activations of zero: any codes will do.
      const uint8_t* from = codes_from + (block == 0 || chunk * kBlocks + block < blocks() ? block * kBlock : 0);
      cp_async(stage + codes_at + block * kBlock, from);
      if constexpr (kBits == 3) cp_async_few<8>(stage + codes_at + block * kBlock + 512 - 8 * lane, from + 512 - 8 * lane);
    }
    codes_from += kBytes;
    if (scale_unit >= 0) {
      const uint32_t last = static_cast<uint32_t>(p.weight.groups) - 1;
      uint32_t group = multiply_high(2 * (chunk * kUnits + scale_unit), p.group_magic);
      group = group < last ? group : last;  // units behind K
      cp_async(stage + scales_to, scales_from + group * 8 * pair_bytes(p.weight.scale_dtype));
    }
    ++chunk;
  }

  // What no copy fills is of tokens that do not exist; it reaches no other token's sums.
  __device__ __forceinline__ void copy_activations(uint8_t* to) {
#pragma unroll
    for (int half = 0; half < (kWarps == 8 ? 2 : 1); ++half) {
      const bool exist = columns_left > static_cast<uint32_t>(64 * half);
      const uint8_t* from = x_from + 128 * half;
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i, from += x_step)
        if (i < x_tokens) cp_async_few<4>(to + half * kHalf + 1024 * i, from, exist);
    }
    x_from += 2 * kWgmmaColumns;
    columns_left = columns_left > kWgmmaColumns ? columns_left - kWgmmaColumns : 0;
  }

  // ---- from a stage to sums

  // Numbers of unit `u`.
  template <int u>
  __device__ __forceinline__ void unpack(const uint8_t* stage) {
    if constexpr (u % Kind::kUnits == 0) codes.take(stage + codes_at + u / Kind::kUnits * kBlockBytes<kBits>, lane);
    codes.template unit<T, u % Kind::kUnits>(table, a[u % 2]);
    Kind::order(a[u % 2]);
    // Here, and not behind the next fence, where ptxas would add one more.
#pragma unroll
    for (int i = 0; i < 8; ++i) a[u % 2][i / 4][i % 4] = kept(a[u % 2][i / 4][i % 4]);
  }

  // Sums of activations over the units for which scales are applied at once. `to`: [kUnits][kTokens].
  __device__ __forceinline__ void add_activations(const uint8_t* stage, float* to) const {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    for (int tile = warp; tile < kTokenTiles; tile += kWarps) {
      float d[4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t b[4];
        ldmatrix(b, stage + u / 2 * kHalf + (8 * tile + lane % 8) * 128 + 16 * ((u % 2 * 4 + lane / 8) ^ lane % 8));
        mma(T{}, d, ones, b[0], b[1]);
        mma(T{}, d, ones, b[2], b[3]);
        if (((u + 1) & p.flush_mask) == 0) {
          if (lane < 4) *reinterpret_cast<float2*>(to + u * kTokens + 8 * tile + 2 * lane) = make_float2(d[0], d[1]);
#pragma unroll
          for (int c = 0; c < 4; ++c) d[c] = 0.0f;
        }
      }
    }
  }

  // Units u and later of a chunk; `next`: the stage of the next one, whose first unit's numbers are made. `x` describes this stage's.
  template <int u>
  __device__ __forceinline__ void multiply(uint64_t x, const uint8_t* stage, const uint8_t* next, float* x_sums) {
    constexpr int kFrom = (u / 2 * kHalf + u % 2 * 64) / 16;
    wgmma_fence();
    wgmma(T{}, products, a[u % 2][0], x + kFrom, (u & p.flush_mask) != 0);
    wgmma(T{}, products, a[u % 2][1], x + kFrom + 2, true);
    wgmma_commit();
    if (u == 0 && p.weight.zeros) add_activations(stage, x_sums);
    wgmma_wait<1>();
    if constexpr (u + 1 < kUnits) {
      unpack<u + 1>(stage);
    } else {
      cp_async_wait<kStages - 2>();
      unpack<0>(next);
    }
    // (Always so after the last unit. The compiler, which does not know, makes the numbers above before it waits.)
    if (((u + 1) & p.flush_mask) == 0) {
      if (u == p.flush_mask && p.weight.zeros) sync_block();  // sums of x are there for all warps
      wgmma_wait<0>(products);
      scale(stage + scales_at + u * kScaleBytes, x_sums + u * kTokens);
    }
    if constexpr (u + 1 == kUnits) wgmma_wait<0>();
    if constexpr (u + 1 < kUnits) multiply<u + 1>(x, stage, next, x_sums);
  }

  // Adds products times their scales.
  __device__ __forceinline__ void scale(const uint8_t* pair, const float* x_sums) {
    const DType dtype = p.weight.scale_dtype;
    const Pair s = to_floats(take_pair(pair, dtype), dtype);
    if (p.weight.zeros) {
      // Products are with code - middle: what lacks is middle - zero for each activation.
      const Pair zero = to_floats(take_pair(pair + kZerosAt - kScalesAt, dtype), dtype);
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

  // ---- from sums to memory

  // Through shared memory: blocks of other columns are added, in their order, and rows are stored side by side.
  __device__ __forceinline__ void store_sums(float* partial, uint32_t split, uint32_t first_token, uint32_t first_tile) const {
    constexpr int kStride = kRows + 4;  // 8 lanes apart are 4 tokens: other banks
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int token = 8 * (i / 4) + 2 * (lane % 4) + i % 2, row = 16 * warp + lane / 4 + i / 2 % 2 * 8;
      partial[token * kStride + row] = sums[i];
    }
    const uint32_t splits = p.plan.splits;
    if (splits > 1)
      sync_cluster();
    else
      sync_block();
    // Fours of rows; each block of the cluster takes as many.
    const uint32_t share = (kRows / 4 + splits - 1) / splits, first = split * share;
    const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
    for (uint32_t at = threadIdx.x; at < kTokens * share; at += kThreads) {
      const uint32_t four = first + at % share, token = at / share;
      const int64_t n = static_cast<int64_t>(first_tile) * kTileRows + 4 * four, m = static_cast<int64_t>(first_token) + token;
      if (four >= kRows / 4 || n >= padded || m >= p.tokens) continue;
      const float4* const own = reinterpret_cast<const float4*>(partial + token * kStride + 4 * four);
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (splits > 1)
        for (uint32_t i = 0; i < splits; ++i) sum = plus(sum, load_of_block(own, i));
      else
        sum = *own;
      store_rows<T>(p, m, n, sum);
    }
    if (splits > 1) sync_cluster();  // nobody's shared memory goes before all have read it
  }
};

template <class Kind, class T, int kTokens>
__global__ void __launch_bounds__(WgmmaWarp<Kind, T, kTokens>::kThreads, 1) wgmma_kernel(const WgmmaParams p) {
#ifdef HFQ_WGMMA
  using Warp = WgmmaWarp<Kind, T, kTokens>;
  constexpr int kStages = Warp::kStages, kStage = Warp::kStage;
  uint8_t* ring = shared_memory();
  ring += -shared_address(ring) & 1023;
  uint8_t* table = ring + Warp::kRing;
  float* x_sums = reinterpret_cast<float*>(table + Warp::kTableBytes);
  // Neighbouring clusters read the same weights for other tokens: the second finds them in L2.
  const uint32_t split = blockIdx.x % p.plan.splits, tile = blockIdx.x / p.plan.splits;
  const uint32_t first_token = tile % p.token_tiles * kTokens, first_tile = tile / p.token_tiles * Warp::kWarps;
  Warp mine(p, table, split, first_token, first_tile);
  const uint32_t chunks = mine.end_chunk > mine.chunk ? mine.end_chunk - mine.chunk : 0;

#pragma unroll
  for (int i = 0; i + 1 < kStages; ++i) {
    if (mine.chunk < mine.end_chunk) mine.copy(ring + i * kStage);
    cp_async_commit();
  }
  if constexpr (Kind::kTable) {
    TableCodes::fill<T>(table, p.weight.codebook);
    sync_block();
  }

  // Rows of 128 bytes (swizzle 1 in bits 62, 63), 8 of them 1024 bytes from the next 8 (in 16 bytes, bits 32 to 45).
  const uint64_t x = uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (shared_address(ring) & 0x3ffff) / 16;
  cp_async_wait<kStages - 2>();
  mine.template unpack<0>(ring);
  uint32_t at = 0;  // the stage of the chunk
  for (uint32_t i = 0; i < chunks; ++i) {
    fence_proxy_async();
    sync_block();  // this stage is there for all warps, and the one before, which is filled next, has been read by all
    const uint8_t* stage = ring + at * kStage;
    if (mine.chunk < mine.end_chunk) mine.copy(ring + (at == 0 ? kStages - 1 : at - 1) * kStage);
    cp_async_commit();
    const uint32_t next = at + 1 == kStages ? 0 : at + 1;
    mine.template multiply<0>(x + at * (kStage / 16), stage, ring + next * kStage, x_sums);
    at = next;
  }
  cp_async_wait<0>();
  sync_block();
  mine.store_sums(reinterpret_cast<float*>(ring), split, first_token, first_tile);
#endif
}

// ---- launcher

template <class Kind, class T, int kTokens>
const char* launch_wgmma_tokens(const WgmmaParams& params, cudaStream_t stream) {
  using Warp = WgmmaWarp<Kind, T, kTokens>;
  constexpr auto kKernel = wgmma_kernel<Kind, T, kTokens>;
  WgmmaParams p = params;
  p.token_tiles = static_cast<uint32_t>((p.tokens + kTokens - 1) / kTokens);
  const auto active = [](int blocks) { return active_clusters<WgmmaParams, kKernel>(blocks, Warp::kThreads, Warp::kSharedBytes); };
  p.plan = plan_wgmma(p, {Warp::kRows, kTokens, active});
  const int64_t blocks = (p.weight.out_features + Warp::kRows - 1) / Warp::kRows * p.token_tiles * p.plan.splits;
  return launch_clusters(kKernel, static_cast<unsigned>(blocks), p.plan.splits, Warp::kThreads, Warp::kSharedBytes, stream, p);
}

template <class Kind, class T>
const char* launch_wgmma_dtype(const WgmmaParams& p, cudaStream_t stream) {
  if (p.tokens <= 16) return launch_wgmma_tokens<Kind, T, 16>(p, stream);
  if (p.tokens <= 32) return launch_wgmma_tokens<Kind, T, 32>(p, stream);
  if (p.tokens <= 64) return launch_wgmma_tokens<Kind, T, 64>(p, stream);
  return launch_wgmma_tokens<Kind, T, 128>(p, stream);
}

template <class Kind>
const char* launch_wgmma_of(const WgmmaParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_wgmma_dtype<Kind, BFloat16>(p, stream) : launch_wgmma_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
