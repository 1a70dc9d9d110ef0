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
// Instructions (counted in code for sm_90a, 4 bits, groups of 128): for a unit and 64 tokens a warp issues 32 mma, 8 loads of activations, 44
// instructions for codes, 20 for scales and 28 for copies and the loop: about 132. The 32 mma take 256 clocks of its scheduler on an A100,
// about 160 on an H100 (which reaches its peak with wgmma only), so that they are the limit. With 16 tokens 512 bytes of codes take 100
// instructions, which is what an H200 has slots for while they arrive (linear_kernel.h); an H100 has 140.
#pragma once

#include "gemm_block.h"

namespace hfq {
namespace {

template <class Kind, class T, int kTokens>
struct GemmWarp : GemmBlock<T, kTokens, kChunkColumns<Kind::kCodeBits>, 2> {
  using Base = GemmBlock<T, kTokens, kChunkColumns<Kind::kCodeBits>, 2>;
  using Params = GemmParams;
  using Part = typename Base::Part;
  using Place = typename Base::Place;
  using Base::column_warp, Base::first_chunk, Base::kRowBytes, Base::kTokenTiles, Base::lane, Base::p, Base::sums, Base::warp_end, Base::x_to;
  static constexpr int kBits = Kind::kCodeBits, kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0;
  static constexpr int kColumns = Base::kColumns, kUnits = kColumns / kUnitColumns;
  static constexpr int kBlocks = kColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile
  static constexpr uint32_t kNone = ~0u;
  static constexpr float kMiddle = 1 << (kBits - 1);

  uint32_t table;                    // of the lane
  // What is copied next: the lane's codes of the first tile, scales and zero points of group 0. Numbers of 16-byte pieces of a tensor, and where they
  // go, in bytes from the beginning of a stage.
  uint32_t codes_from, next_tile;    // pieces to the second tile; 0 if there is none
  uint32_t scale_from, scale_to;
  uint32_t scale_unit;               // to which they belong, from the first one of a stage
  // Where from the beginning of a stage the lane's operands are.
  uint32_t x_at, codes_at, scales_at;

  // A stage has activations of each column warp, then codes, scales and zero points of each warp.
  __device__ __forceinline__ GemmWarp(const GemmParams& params, const Place& place, uint32_t lookups)
      : Base(params, place), table(kept(lookups + 4 * (threadIdx.x % 32))) {
    const Weight& w = p.weight;
    const uint32_t tiles = this->tiles(), tile = place.first_tile + place.row_warp * kWarpTiles;
    const uint32_t tile_pieces = blocks() * (kBlockBytes<kBits> / 16), zeros = has_zeros() ? kUnits * kScaleBytes : 0;
    const uint32_t codes = (kTokens * kRowBytes << p.plan.column_shift) + threadIdx.x / 32 * (kWarpTiles * kBytes + kUnits * kScaleBytes + zeros);
    // An odd number of tiles: the last one is computed twice and stored once.
    const auto of_weight = [&](uint32_t t) { return static_cast<int64_t>(t < tiles ? t : tiles - 1); };
    const uint32_t of_codes = place.expert * static_cast<uint32_t>(p.routing.qweight_bytes / 16);
    codes_from = kept(static_cast<uint32_t>(of_codes + of_weight(tile) * tile_pieces + (first_chunk + column_warp) * (kBytes / 16) + lane));
    next_tile = tile + 1 < tiles ? tile_pieces : 0;

    const uint32_t pieces = pair_bytes(w.scale_dtype) / 2, i = lane / pieces, of_tile = i / kUnits;
    scale_unit = of_tile < kWarpTiles && ((i + 1) & p.flush_mask) == 0 ? column_warp * kUnits + i % kUnits : kNone;
    const uint32_t of_scales = place.expert * static_cast<uint32_t>(p.routing.scale_bytes / 16);
    scale_from = kept(static_cast<uint32_t>(of_scales + of_weight(tile + (of_tile < kWarpTiles ? of_tile : 0)) * w.groups * pieces + lane % pieces));
    scale_to = static_cast<uint32_t>(codes + kWarpTiles * kBytes + i * (kScaleBytes / kWarpTiles) + 16 * (lane % pieces));

    const int odd = lane / 4 % 2;
    x_at = static_cast<uint32_t>((column_warp * kTokens + lane / 4) * kRowBytes + 64 * odd + 16 * (lane % 4));
    codes_at = kept(static_cast<uint32_t>(codes + 16 * lane));
    scales_at = static_cast<uint32_t>(codes + kWarpTiles * kBytes + lane / 4 * pair_bytes(w.scale_dtype));
  }

  // Some kinds of codes have none, which spares registers.
  __device__ __forceinline__ bool has_zeros() const { return Kind::kMayHaveZeros && p.weight.zeros; }

  // Of the weight's columns.
  __device__ __forceinline__ uint32_t blocks() const {
    return static_cast<uint32_t>((p.weight.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>);
  }

  // ---- from global memory to a stage

  // The chunks `chunk`, of which each column warp takes one, and later those behind them.
  __device__ __forceinline__ void copy(uint32_t stage, uint32_t chunk) {
    this->copy_activations(stage + x_to);
    if (chunk < warp_end) {
      copy_codes(stage + codes_at, chunk + column_warp);
      if (scale_unit != kNone) copy_scales(stage + scale_to, chunk * kUnits + scale_unit);
    }
    codes_from += kBytes / 16 << p.plan.column_shift;
  }

  __device__ __forceinline__ void copy_codes(uint32_t to, uint32_t chunk) const {
    constexpr int kBlock = kBlockBytes<kBits>;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        // Columns behind K meet activations of zero: any codes will do.
        const uint32_t from = codes_from + i * next_tile + (block == 0 || chunk * kBlocks + block < blocks() ? block * (kBlock / 16) : 0);
        cp_async(to + i * kBytes + block * kBlock, piece(p.weight.qweight, from));
        if (kBlock > 512 && lane < (kBlock - 512) / 16) cp_async(to + i * kBytes + 512, piece(p.weight.qweight, from + 32));
      }
  }

  __device__ __forceinline__ void copy_scales(uint32_t to, uint32_t unit) const {
    const Weight& w = p.weight;
    const uint32_t last = static_cast<uint32_t>(w.groups) - 1;
    uint32_t group = multiply_high(2 * unit, p.group_magic);
    group = group < last ? group : last;  // units behind K
    const uint32_t from = scale_from + group * (pair_bytes(w.scale_dtype) / 2);
    cp_async(to, piece(w.scales, from));
    if (has_zeros()) cp_async(to + kUnits * kScaleBytes, piece(w.zeros, from));
  }

  // ---- from a stage to sums

  // The lane's activations of unit u and token tile `tile`, as the operands of two instructions. The halves of each 128 bytes change
  // places in odd rows: x[1] is where x[0] would have the other half.
  template <int u>
  __device__ __forceinline__ void activations(const uint32_t (&x)[2], int tile, uint32_t (&b)[2][2]) const {
    Kind::activations(load_shared<uint4>(x[u % 2] + 8 * tile * kRowBytes + u / 2 * 128), b);
  }

  // Sums of activations over the units for which scales are applied at once, of this warp's share of the tokens of its columns.
  template <int u>
  __device__ __forceinline__ void add_activations(const uint32_t (&x)[2], float* to, int tile, float (&d)[4]) const {
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
  __device__ __forceinline__ void multiply(const uint32_t (&x)[2], uint32_t stage, const float* x_sums, Kind (&block)[kWarpTiles],
                                           float (&products)[kWarpTiles][kTokenTiles][4]) {
    uint32_t a[kWarpTiles][2][4];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if constexpr (u % Kind::kUnits == 0) block[i].take(stage + codes_at + i * kBytes + u / Kind::kUnits * kBlockBytes<kBits>, lane);
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
      scale(stage + scales_at, x_sums, u, products);
      if constexpr (u + 1 < kUnits) {
#pragma unroll
        for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
          for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
            for (int c = 0; c < 4; ++c) products[i][tile][c] = 0.0f;
      }
    }
    if constexpr (u + 1 < kUnits) multiply<u + 1>(x, stage, x_sums, block, products);
  }

  // Adds products, up to unit u, times their scales.
  __device__ __forceinline__ void scale(uint32_t of_lane, const float* x_sums, int u, float (&products)[kWarpTiles][kTokenTiles][4]) {
    const DType dtype = p.weight.scale_dtype;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const uint32_t pair = of_lane + (i * kUnits + u) * (kScaleBytes / kWarpTiles);
      const Pair s = load_floats(pair, dtype);
      if (has_zeros()) {
        // Products are with code - middle: what lacks is middle - zero for each activation.
        const Pair zero = load_floats(pair + kUnits * kScaleBytes, dtype);
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

  // A stage, whose first chunk is `chunk`. `scratch`: sums of activations, [column warps][kUnits][kTokens] floats of shared memory.
  __device__ __forceinline__ void add(uint32_t stage, uint32_t chunk, uint8_t* scratch) {
    const uint32_t x[2] = {stage + x_at, stage + (x_at ^ 64)};
    float* x_sums = reinterpret_cast<float*>(scratch) + column_warp * kUnits * kTokens;
    if (has_zeros()) {
      const Part part(p);
      for (int tile = part.row_warp; tile < kTokenTiles; tile += part.row_warps) {
        float d[4] = {};
        add_activations<0>(x, x_sums, tile, d);
      }
      sync_block();  // the sums are there for all warps
    }
    if (chunk < warp_end) {
      Kind block[kWarpTiles];
      float products[kWarpTiles][kTokenTiles][4] = {};
      multiply<0>(x, stage, x_sums, block, products);
    }
  }

};

// ---- launcher ----

template <class Kind, class T>
const char* launch_dtype(const GemmParams& p, cudaStream_t stream) {
  if (p.plan.tokens == 16) return launch_gemm_warps<GemmWarp<Kind, T, 16>>(p, stream);
  if (p.plan.tokens == 32) return launch_gemm_warps<GemmWarp<Kind, T, 32>>(p, stream);
  return launch_gemm_warps<GemmWarp<Kind, T, 64>>(p, stream);
}

template <class Kind>
const char* launch_gemm_of(const GemmParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<Kind, BFloat16>(p, stream) : launch_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
