// The dense part of spqr_gemm.h, for one number of bits in each file that includes this: tensor cores, with weights that are scaled before they are
// multiplied.
//
// spqr_linear_kernel.h multiplies the sums of each group, of 16 columns as a rule, with its scale: 8 operations for a matrix instruction, for each 8
// tokens. Here a weight becomes a number first, (code - zero) * scale in float32, rounded to 16 bits once as `dequantize` does: what that costs is
// shared by up to 64 tokens. The lanes of a warp decode the scales of a chunk once, each for other rows and groups, into shared memory of the warp:
// scale and offset of rows g and g + 8, one load of a lane for 8 weights.
//
// A lane has columns 4t .. 4t+3 of the 16 of a matrix instruction (spqr_linear_kernel.h), 8 bytes of a token's activations. Four tokens next to each
// other have them in other banks (GemmBlock, kPhases).
//
// Instructions (3 bits, 64 tokens, without copies and the loop): for 16 x 16 weights a warp issues 11 for codes, 20 to scale and round them, 6 to
// decode scales and load them, 8 mma and 4 loads of activations (two tiles share them).
#pragma once

#include "gemm_block.h"
#include "spqr_gemm.h"
#include "spqr_scales.h"

namespace hfq {
namespace {

template <int kBits_, class T, int kTokens>
struct SpqrGemmWarp : GemmBlock<T, kTokens, kChunkColumns<kBits_>, 4> {
  using Base = GemmBlock<T, kTokens, kChunkColumns<kBits_>, 4>;
  using Params = SpqrGemmParams;
  using Place = typename Base::Place;
  using Base::column_warp, Base::kRowBytes, Base::kTokenTiles, Base::lane, Base::sums, Base::warp_end, Base::x_to;
  static constexpr int kBits = kBits_, kTableBytes = 0;
  static constexpr int kColumns = Base::kColumns, kHalves = kColumns / kHalfColumns;
  static constexpr int kBlocks = kColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a chunk of one tile

  const SpqrGemmParams& q;
  // What is copied next, of each tile.
  const uint8_t* codes_from[kWarpTiles];
  StatCopies<kHalves, kWarpTiles> stats;
  // Where from the beginning of a stage the lane's operands are.
  uint32_t x_at, codes_at, stats_at, stats_to;

  // A stage has activations of each column warp, then codes and statistics of each warp.
  __device__ __forceinline__ SpqrGemmWarp(const SpqrGemmParams& params, const Place& place, uint32_t)
      : SpqrGemmWarp(params, place, of_expert(params.spqr, params.routing, params.stat_bytes, place.expert)) {}

  __device__ __forceinline__ SpqrGemmWarp(const SpqrGemmParams& params, const Place& place, const SpqrWeight& w)
      : Base(params, place), q(params), stats(w, lane, [&](int i) { return tile_of(place, i); }) {
    const uint32_t own = (kTokens * kRowBytes << q.plan.column_shift) + threadIdx.x / 32 * (kWarpTiles * (kBytes + tile_stats()));
    const int64_t blocks = (w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>;

    stats_at = own + kWarpTiles * kBytes;
    stats_to = kept(stats_at + stats.to);
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      const int64_t block = tile_of(place, i) * blocks + static_cast<int64_t>(this->first_chunk + column_warp) * kBlocks;
      codes_from[i] = kept(w.qweight + block * kBlockBytes<kBits> + 16 * lane);
    }

    const uint32_t row = lane / 4;
    x_at = kept((column_warp * kTokens + row) * kRowBytes + 32 * (row % 4) + 8 * (lane % 4));
    codes_at = kept(own + 16 * lane);
  }

  // An odd number of tiles: the last one is computed twice and stored once.
  __device__ __forceinline__ int64_t tile_of(const Place& place, int i) const {
    const uint32_t tile = place.first_tile + place.row_warp * kWarpTiles + i, tiles = this->tiles();
    return tile < tiles ? tile : tiles - 1;
  }

  // Bytes of a tile in a stage.
  __device__ __forceinline__ uint32_t tile_stats() const { return kHalves * (group_code_bytes(q.spqr) + line_bytes(q.spqr)); }

  // The chunks `chunk`, of which each column warp takes one, and later those behind them.
  __device__ __forceinline__ void copy(uint32_t stage, uint32_t chunk) {
    this->copy_activations(stage + x_to);
    if (chunk < warp_end) {
      const uint32_t own = chunk + column_warp;
      const SpqrWeight& w = q.spqr;
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) {
        const uint32_t to = stage + codes_at + i * kBytes;
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) {
          // Columns behind K meet activations of zero and scales of zero.
          if (block == 0 || own * kColumns + block * kBlockColumns<kBits> < static_cast<uint32_t>(w.in_features))
            cp_async(to + block * kBlockBytes<kBits>, codes_from[i] + block * kBlockBytes<kBits>);
        }
        if (kBits == 3 && lane < 16) cp_async(to + 512, codes_from[i] + 512);
      }
      stats.copy(stage + stats_to, own * kHalves, q.group_magic, static_cast<uint32_t>(w.groups) - 1, tile_stats());
    }
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) codes_from[i] += kBytes << q.plan.column_shift;
  }

  // Two numbers of one row, code - middle, as weights.
  static __device__ __forceinline__ uint32_t scaled(uint32_t pair, uint32_t scale, uint32_t offset) {
    const float2 codes = unpacked(T{}, pair);
    return from_floats(T{}, multiply_add(codes.x, as_float(scale), as_float(offset)), multiply_add(codes.y, as_float(scale), as_float(offset)));
  }

  // The numbers of a chunk: a lane decodes two halves of it, for two rows of each tile.
  __device__ __forceinline__ void decode_chunk(uint32_t stage, uint32_t chunk, uint8_t* numbers) const {
    static_assert(kHalves == 8);
    const SpqrWeight& w = q.spqr;
    const uint32_t codes = group_code_bytes(w), first = 2 * (lane / 8), row = lane % 8;
    const uint32_t columns = (chunk + column_warp) * kColumns + first * kHalfColumns;
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      float4 decoded[2];
      const uint32_t from = stage + stats_at + i * tile_stats();
      decode_groups<kBits>(w, from + first * codes + row * (codes / 8), from + kHalves * codes + first * line_bytes(w), decoded);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float4 n = decoded[j];
        n.y *= n.x, n.w *= n.z;
        // Behind K codes may be any, and infinity times an activation of zero is not zero.
        if (columns + j * kHalfColumns >= static_cast<uint32_t>(w.in_features)) n = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        *reinterpret_cast<float4*>(numbers + ((i * kHalves + first + j) * 8 + row) * 16) = n;
      }
    }
  }

  // Halves h and later of a chunk. `x`: where the activations of half h % 4 are.
  template <int h>
  __device__ __forceinline__ void multiply(uint32_t stage, const uint32_t (&x)[4], uint32_t numbers, Codes<kBits> (&codes)[kWarpTiles]) {
    constexpr int kOfBlock = kHalves / kBlocks, r = h % kOfBlock * 4;
    uint32_t a[kWarpTiles][4];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) {
      if constexpr (r == 0) codes[i].take(stage + codes_at + i * kBytes + h / kOfBlock * kBlockBytes<kBits>, lane);
      const uint4 n = load_shared<uint4>(numbers + (i * kHalves + h) * 8 * 16);
      a[i][0] = scaled(codes[i].template numbers<T, r>(), n.x, n.y), a[i][1] = scaled(codes[i].template numbers<T, r + 2>(), n.z, n.w);
      a[i][2] = scaled(codes[i].template numbers<T, r + 1>(), n.x, n.y), a[i][3] = scaled(codes[i].template numbers<T, r + 3>(), n.z, n.w);
    }
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const uint2 b = load_shared<uint2>(x[h % 4] + h / 4 * 128 + 8 * tile * kRowBytes);
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) mma(T{}, sums[i][tile], a[i], b.x, b.y);
    }
    if constexpr (h + 1 < kHalves) multiply<h + 1>(stage, x, numbers, codes);
  }

  // A stage, whose first chunk is `chunk`. `scratch`: numbers of each warp.
  __device__ __forceinline__ void add(uint32_t stage, uint32_t chunk, uint8_t* scratch) {
    if (chunk >= warp_end) return;
    uint8_t* const numbers = scratch + threadIdx.x / 32 * kSpqrNumberBytes;
    decode_chunk(stage, chunk, numbers);
    sync_warp();
    const uint32_t x[4] = {stage + x_at, stage + (x_at ^ 32), stage + (x_at ^ 64), stage + (x_at ^ 96)};
    Codes<kBits> codes[kWarpTiles];
    multiply<0>(stage, x, shared_address(numbers) + 16 * (lane / 4), codes);
  }
};

// ---- launcher ----

template <int kBits, class T>
const char* launch_spqr_dtype(const SpqrGemmParams& p, cudaStream_t stream) {
  if (p.plan.tokens == 16) return launch_gemm_warps<SpqrGemmWarp<kBits, T, 16>>(p, stream);
  if (p.plan.tokens == 32) return launch_gemm_warps<SpqrGemmWarp<kBits, T, 32>>(p, stream);
  return launch_gemm_warps<SpqrGemmWarp<kBits, T, 64>>(p, stream);
}

template <int kBits>
const char* launch_spqr_gemm_of(const SpqrGemmParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_spqr_dtype<kBits, BFloat16>(p, stream) : launch_spqr_dtype<kBits, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
