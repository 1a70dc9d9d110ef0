// The kernel of gemm.h, for one kind of codes in each file that includes this.
//
// A thread block multiplies some rows of W with up to 64 tokens, over all columns or a part of them. Its 8 warps take two tiles of 16 rows
// each; where there are too few rows for all multiprocessors, several warps take the same rows and other columns. Chunks of columns go
// through shared memory, several on the way: codes and scales, which one warp reads, and activations, which all warps of these columns do.
// A lane's activations of a unit are 16 neighbouring bytes, so one load has the operands of two instructions; the two halves of the
// 128 bytes of two units change places in odd tokens, and 8 lanes read from all banks.
//
// Scales multiply float32 sums after a group, or a chunk if that ends first. What zero points multiply, sums of activations, comes
// from matrix instructions with ones, of which each warp has its share of the tokens (all warps for all tokens would cost half
// as much again as the products).
//
// Instructions: for a unit and 64 tokens a warp issues 32 mma, 8 loads of activations, 44 instructions for 4-bit codes and, with groups of 128,
// some 20 for scales: about 105. The 32 mma take 256 clocks of its scheduler on an A100, about 160 on an H100 (which reaches its peak with
// wgmma only), so that they are the limit; with 16 tokens the bytes are: 70 instructions for 512 bytes in 100 slots (see linear_kernel.h).
#pragma once

#include "fragments.h"
#include "gemm.h"
#include "gemm_output.h"

namespace hfq {
namespace {

// `load_pair` from shared memory.
__device__ __forceinline__ RawPair take_pair(const uint8_t* pair, DType dtype) {
  if (dtype == kFloat32) {
    const uint2 v = *reinterpret_cast<const uint2*>(pair);
    return {v.x, v.y};
  }
  return {*reinterpret_cast<const uint32_t*>(pair), 0};
}

template <class Kind, class T, int kTokens>
struct GemmWarp {
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (Kind::kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kColumns = kChunkColumns<kBits>, kUnits = kColumns / kUnitColumns;
  static constexpr int kBytes = kColumns / kBlockColumns<kBits> * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr int kPieces = kBytes / 16;
  static constexpr int kRowBytes = 2 * kColumns, kRowPieces = kRowBytes / 16;  // of a chunk of one token
  static constexpr int kRowsAtOnce = kGemmThreads / kRowPieces;  // of activations, that the threads copy: of one chunk, or of several
  static constexpr int kChunksAtOnce = kRowsAtOnce > kTokens ? kRowsAtOnce / kTokens : 1;
  static constexpr int kTokenTiles = kTokens / 8;
  static constexpr float kMiddle = 1 << (kBits - 1);

  const GemmParams& p;
  const uint8_t* table;
  int lane, row_warp, row_warps, column_warp;
  uint32_t first_chunk, end_chunk;     // of the thread block
  uint32_t first_tile, first_token;    // of the thread block
  uint32_t warp_end;                   // end_chunk, or 0 if the warp has no rows
  const uint8_t* qweight;              // of the warp's first tile
  uint32_t tile_bytes, next_tile;      // bytes of a tile, and from the first to the second
  int64_t scale_from;                  // of the lane's 16 bytes of scales: in group 0, and in the warp's part of a stage
  uint32_t scale_to;
  uint32_t scale_unit;                 // of a chunk, to which they belong; kUnits: none
  const uint8_t* x;                    // of the thread's first token and piece of a chunk
  uint32_t x_bytes;                    // from x to the end of its token
  int x_tokens;                        // from its token to the last, at most kTokens
  float sums[kWarpTiles][kTokenTiles][4] = {};

  __device__ __forceinline__ GemmWarp(const GemmParams& params, const uint8_t* lookups) : p(params), table(lookups), lane(threadIdx.x % 32) {
    const Weight& w = p.weight;
    const int warp = threadIdx.x / 32;
    row_warps = kGemmWarps >> p.plan.column_shift;
    row_warp = warp % row_warps, column_warp = warp / row_warps;

    // Neighbouring thread blocks read the same weights for other tokens: the second finds them in L2.
    const uint32_t token_tile = blockIdx.x % p.token_tiles, rest = blockIdx.x / p.token_tiles, split = rest % p.plan.splits;
    first_token = token_tile * kTokens;
    first_tile = rest / p.plan.splits * row_warps * kWarpTiles;
    const uint32_t chunks = static_cast<uint32_t>((w.in_features + kColumns - 1) / kColumns);
    first_chunk = split * p.plan.split_chunks;
    end_chunk = first_chunk + p.plan.split_chunks < chunks ? first_chunk + p.plan.split_chunks : chunks;

    const uint32_t tiles = static_cast<uint32_t>((w.out_features + kTileRows - 1) / kTileRows), tile = first_tile + row_warp * kWarpTiles;
    warp_end = tile < tiles ? end_chunk : 0;
    tile_bytes = static_cast<uint32_t>((w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>) * kBlockBytes<kBits>;
    // An odd number of tiles: the last one is computed twice and stored once.
    const auto of_weight = [&](uint32_t t) { return static_cast<int64_t>(t < tiles ? t : tiles - 1); };
    qweight = w.qweight + of_weight(tile) * tile_bytes;
    next_tile = tile + 1 < tiles ? tile_bytes : 0;

    const int64_t token = first_token + threadIdx.x / kRowPieces % kTokens;
    const uint32_t first_byte = threadIdx.x % kRowPieces * 16, row_bytes = static_cast<uint32_t>(2 * w.in_features);
    x_tokens = static_cast<int>(p.tokens - token < kTokens ? p.tokens - token : kTokens);
    x_bytes = first_byte < row_bytes ? row_bytes - first_byte : 0;
    x = static_cast<const uint8_t*>(p.x) + token * row_bytes + first_byte;

    const uint32_t pieces = pair_bytes(w.scale_dtype) / 2, i = lane / pieces, of_tile = i / kUnits;
    scale_unit = of_tile < kWarpTiles && ((i + 1) & p.flush_mask) == 0 ? i % kUnits : kUnits;
    scale_from = of_weight(tile + (of_tile < kWarpTiles ? of_tile : 0)) * w.groups * pieces * 16 + 16 * (lane % pieces);
    scale_to = (of_tile * kUnits + i % kUnits) * (kScaleBytes / kWarpTiles) + 16 * (lane % pieces);
  }

  // ---- parts of a stage: activations of each column warp, then codes, scales and zero points of each warp

  __device__ __forceinline__ uint32_t x_at(int of_column_warp) const { return of_column_warp * kTokens * kRowBytes; }
  __device__ __forceinline__ uint32_t codes_at() const {
    const uint32_t scales = kUnits * kScaleBytes * (p.weight.zeros ? 2 : 1);
    return x_at(1 << p.plan.column_shift) + threadIdx.x / 32 * (kWarpTiles * kBytes + scales);
  }

  // ---- from global memory to a stage

  // The chunks `chunk`, of which each column warp takes one.
  __device__ __forceinline__ void copy(uint8_t* stage, uint32_t chunk) const {
    copy_activations(stage, chunk);
    chunk += column_warp;
    if (chunk >= warp_end) return;
    uint8_t* codes = stage + codes_at();
    const uint32_t begin = chunk * kBytes;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int j = 0; j < (kPieces + 31) / 32; ++j) {
        const uint32_t at = 16 * (lane + 32 * j);
        if (at < kBytes && begin + at < tile_bytes) cp_async(codes + i * kBytes + at, qweight + i * next_tile + begin + at);
      }
    if (scale_unit == kUnits) return;
    const Weight& w = p.weight;
    const uint32_t last = static_cast<uint32_t>(w.groups) - 1;
    uint32_t group = multiply_high(2 * (chunk * kUnits + scale_unit), p.group_magic);
    group = group < last ? group : last;  // units behind K
    const int64_t from = scale_from + group * 8 * pair_bytes(w.scale_dtype);
    uint8_t* to = codes + kWarpTiles * kBytes + scale_to;
    cp_async(to, static_cast<const uint8_t*>(w.scales) + from);
    if (w.zeros) cp_async(to + kUnits * kScaleBytes, static_cast<const uint8_t*>(w.zeros) + from);
  }

  __device__ __forceinline__ void copy_activations(uint8_t* to, uint32_t chunk) const {
    const int row = threadIdx.x / kRowPieces;
    to += row * kRowBytes + 16 * (threadIdx.x % kRowPieces ^ 4 * (row % 2));
#pragma unroll 1
    for (uint32_t i = row / kTokens; i < 1u << p.plan.column_shift; i += kChunksAtOnce) {
      const uint32_t offset = (chunk + i) * kRowBytes;
      // Zeros for columns behind K, which codes of padding meet, and for tokens that nobody has asked for.
      const bool exists = chunk + i < end_chunk && offset < x_bytes;
#pragma unroll
      for (int j = 0; j < kTokens; j += kRowsAtOnce)
        cp_async_or_zero(to + j * kRowBytes, x + j * 2 * p.weight.in_features + offset, exists && j < x_tokens);
      to += kChunksAtOnce * kTokens * kRowBytes;
    }
  }

  // ---- from a stage to sums

  // The lane's activations of unit u and token tile `tile`, as the operands of two instructions.
  template <int u>
  __device__ __forceinline__ void activations(const uint8_t* x, int tile, uint32_t (&b)[2][2]) const {
    const int odd = lane / 4 % 2, swapped = u % 2 ? 1 - odd : odd;
    Kind::activations(*reinterpret_cast<const uint4*>(x + (8 * tile + lane / 4) * kRowBytes + 128 * (u / 2) + 64 * swapped + 16 * (lane % 4)), b);
  }

  // Sums of activations over the units for which scales are applied at once, of this warp's share of the tokens of its columns.
  template <int u>
  __device__ __forceinline__ void add_activations(const uint8_t* x, float* to, int tile, float (&d)[4]) const {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    uint32_t b[2][2];
    activations<u>(x, tile, b);
    mma(T{}, d, ones, b[0][0], b[0][1]);
    mma(T{}, d, ones, b[1][0], b[1][1]);
    if (((u + 1) & p.flush_mask) == 0) {
      if (lane < 4) *reinterpret_cast<float2*>(to + u * kTokens + 8 * tile + 2 * lane) = make_float2(d[0], d[1]);
#pragma unroll
      for (int c = 0; c < 4; ++c) d[c] = 0.0f;
    }
    if constexpr (u + 1 < kUnits) add_activations<u + 1>(x, to, tile, d);
  }

  // Units u and later of a chunk.
  template <int u>
  __device__ __forceinline__ void multiply(const uint8_t* x, const uint8_t* codes, const float* x_sums, Kind (&block)[kWarpTiles],
                                           float (&products)[kWarpTiles][kTokenTiles][4]) {
    uint32_t a[kWarpTiles][2][4];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if constexpr (u % Kind::kUnits == 0) block[i].take(codes + i * kBytes + u / Kind::kUnits * kBlockBytes<kBits> + 16 * lane, lane);
      block[i].template unit<T, u % Kind::kUnits>(table, a[i]);
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      uint32_t b[2][2];
      activations<u>(x, tile, b);
#pragma unroll
      for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i) mma(T{}, products[i][tile], a[i][j], b[j][0], b[j][1]);
    }
    if (((u + 1) & p.flush_mask) == 0) {
      if (p.weight.zeros && u == p.flush_mask) sync_block();  // sums of activations are there
      scale(codes + kWarpTiles * kBytes, x_sums, u, products);
      if constexpr (u + 1 < kUnits) {
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int c = 0; c < 4; ++c) products[i][tile][c] = 0.0f;
      }
    }
    if constexpr (u + 1 < kUnits) multiply<u + 1>(x, codes, x_sums, block, products);
  }

  // Adds products, up to unit u, times their scales.
  __device__ __forceinline__ void scale(const uint8_t* scales, const float* x_sums, int u, float (&products)[kWarpTiles][kTokenTiles][4]) {
    const DType dtype = p.weight.scale_dtype;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const uint8_t* pair = scales + (i * kUnits + u) * (kScaleBytes / kWarpTiles) + lane / 4 * pair_bytes(dtype);
      const Pair s = to_floats(take_pair(pair, dtype), dtype);
      if (p.weight.zeros) {
        // Products are with code - middle: what lacks is middle - zero for each activation.
        const Pair zero = to_floats(take_pair(pair + kUnits * kScaleBytes, dtype), dtype);
        const float low = kMiddle - zero.low, high = kMiddle - zero.high;
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile) {
          const float2 of_x = *reinterpret_cast<const float2*>(x_sums + u * kTokens + 8 * tile + 2 * (lane % 4));
          products[i][tile][0] += low * of_x.x;
          products[i][tile][1] += low * of_x.y;
          products[i][tile][2] += high * of_x.x;
          products[i][tile][3] += high * of_x.y;
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTokenTiles; ++tile) {
        sums[i][tile][0] += s.low * products[i][tile][0];
        sums[i][tile][1] += s.low * products[i][tile][1];
        sums[i][tile][2] += s.high * products[i][tile][2];
        sums[i][tile][3] += s.high * products[i][tile][3];
      }
    }
  }

  // A stage, whose first chunk is `chunk`. `all_x_sums`: [column warps][kUnits][kTokens] floats of shared memory.
  __device__ __forceinline__ void add(const uint8_t* stage, uint32_t chunk, float* all_x_sums) {
    const uint8_t* x = stage + x_at(column_warp);
    float* x_sums = all_x_sums + column_warp * kUnits * kTokens;
    if (p.weight.zeros)
      for (int tile = row_warp; tile < kTokenTiles; tile += row_warps) {
        float d[4] = {};
        add_activations<0>(x, x_sums, tile, d);
      }
    if (chunk + column_warp < warp_end) {
      Kind block[kWarpTiles];
      float products[kWarpTiles][kTokenTiles][4] = {};
      multiply<0>(x, stage + codes_at(), x_sums, block, products);
    } else if (p.weight.zeros) {
      sync_block();
    }
  }

  // ---- from sums to memory

  // Through shared memory: warps of other columns are added, in their order, and rows are stored side by side.
  __device__ __forceinline__ void store_sums(float* partial) const {
    const int rows = row_warps * kWarpTiles * kTileRows, stride = rows + 4;  // 8 lanes apart are 4 tokens: other banks
    sync_block();
    if (warp_end) {
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int token = column_warp * kTokens + 8 * tile + 2 * (lane % 4) + c % 2;
            partial[token * stride + (row_warp * kWarpTiles + i) * kTileRows + lane / 4 + 8 * (c / 2)] = sums[i][tile][c];
          }
    }
    sync_block();
    const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
    const int64_t split = blockIdx.x / p.token_tiles % p.plan.splits;
    for (int at = 4 * threadIdx.x; at < kTokens * rows; at += 4 * kGemmThreads) {
      const int64_t n = static_cast<int64_t>(first_tile) * kTileRows + at % rows, m = static_cast<int64_t>(first_token) + at / rows;
      if (n >= padded || m >= p.tokens) continue;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int warp = 0; warp < 1 << p.plan.column_shift; ++warp)
        sum = plus(sum, *reinterpret_cast<const float4*>(partial + (warp * kTokens + at / rows) * stride + at % rows));
      if (p.plan.splits > 1)
        store(reinterpret_cast<float4*>(p.workspace + (split * p.tokens + m) * padded + n), sum);
      else
        store_rows<T>(p, m, n, sum);
    }
  }
};

template <class Kind, class T, int kTokens>
__global__ void __launch_bounds__(kGemmThreads, kTokens < kMostTokens ? 2 : 1) gemm_kernel(const GemmParams p) {
  uint8_t* shared = shared_memory();
  float* x_sums = reinterpret_cast<float*>(shared + (Kind::kTable ? TableCodes::kTableBytes : 0));
  uint8_t* ring = reinterpret_cast<uint8_t*>(x_sums) + p.plan.sums_bytes;
  GemmWarp<Kind, T, kTokens> mine(p, shared);
  const uint32_t step = 1u << p.plan.column_shift, stages = p.plan.stages;

  uint32_t next = mine.first_chunk, copied = 0, used = 0;  // the next chunks to be copied, and stages of the ring
  const auto copy_next = [&] {
    if (next < mine.end_chunk) mine.copy(ring + copied * p.plan.stage_bytes, next);
    cp_async_commit();
    next += step;
    copied = copied + 1 == stages ? 0 : copied + 1;
  };
  for (uint32_t i = 1; i < stages; ++i) copy_next();
  if constexpr (Kind::kTable) TableCodes::fill<T>(shared, p.weight.codebook);

  for (uint32_t chunk = mine.first_chunk; chunk < mine.end_chunk; chunk += step) {
    if (stages == 4)
      cp_async_wait<2>();
    else if (stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    sync_block();  // this stage is there for all warps, and the one before has been read by all
    copy_next();
    mine.add(ring + used * p.plan.stage_bytes, chunk, x_sums);
    used = used + 1 == stages ? 0 : used + 1;
  }
  cp_async_wait<0>();
  mine.store_sums(reinterpret_cast<float*>(ring));
}

// ---- launcher ----

template <class Kind, class T, int kTokens>
const char* launch_tokens(const GemmParams& p, cudaStream_t stream) {
  const int64_t rows = kGemmWarps * kWarpTiles * kTileRows >> p.plan.column_shift;
  const int64_t blocks = (p.weight.out_features + rows - 1) / rows * p.plan.splits * p.token_tiles;
  return launch(gemm_kernel<Kind, T, kTokens>, static_cast<unsigned>(blocks), kGemmThreads, p.plan.shared_bytes, stream, p);
}

template <class Kind, class T>
const char* launch_dtype(const GemmParams& p, cudaStream_t stream) {
  if (p.plan.tokens == 16) return launch_tokens<Kind, T, 16>(p, stream);
  if (p.plan.tokens == 32) return launch_tokens<Kind, T, 32>(p, stream);
  return launch_tokens<Kind, T, 64>(p, stream);
}

template <class Kind>
const char* launch_gemm_of(const GemmParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<Kind, BFloat16>(p, stream) : launch_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
