// What a warp computes of a product with few tokens: one or two tiles of 16 rows times 128 columns at a time, for up to 8 tokens.
#pragma once

#include "fragments.h"
#include "linear.h"

namespace hfq {
namespace {

constexpr int kStepColumns = 128, kStepUnits = kStepColumns / kUnitColumns;

// Bytes and places of a step of `Kind`.
template <class Kind>
struct StepCodes {
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (Kind::kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kBlock = kBlockBytes<kBits>, kBytes = kStepUnits / Kind::kUnits * kBlock;  // of a block, and of a step of one tile
};

template <int kTiles>
struct StepSums {
  float sums[kTiles][4] = {};      // scaled
  float products[kTiles][4] = {};  // of units since scales were applied
  float x[4] = {};                 // activations of the same, if there are zero points
};

// Adds products times their scales, which lie in shared memory at `at`, each kind and tile `group_bytes` behind the one before.
template <class Kind, bool kZeros, int kTiles>
__device__ __forceinline__ void scale_step(uint32_t at, uint32_t group_bytes, DType dtype, StepSums<kTiles>& s) {
  constexpr float kMiddle = 1 << (StepCodes<Kind>::kBits - 1);
  constexpr int kPairs = kTiles * (kZeros ? 2 : 1);
  RawPair raw[kPairs];
  Pair pairs[kPairs];  // scales of each tile, then zero points of each
#pragma unroll
  for (int i = 0; i < kPairs; ++i) raw[i] = load_pair(at + i * group_bytes, dtype);
  to_floats(raw, dtype, pairs);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if constexpr (kZeros) {
      // Products are with code - middle: what lacks is middle - zero for each activation.
      const float low = kMiddle - pairs[kTiles + i].low, high = kMiddle - pairs[kTiles + i].high;
      s.products[i][0] += low * s.x[0];
      s.products[i][1] += low * s.x[1];
      s.products[i][2] += high * s.x[2];
      s.products[i][3] += high * s.x[3];
    }
    s.sums[i][0] += pairs[i].low * s.products[i][0];
    s.sums[i][1] += pairs[i].low * s.products[i][1];
    s.sums[i][2] += pairs[i].high * s.products[i][2];
    s.sums[i][3] += pairs[i].high * s.products[i][3];
  }
}

// Units u and later of a step. What a lane needs of it comes from `operands`:
//   codes(i, block)   of tile i and a block of the step
//   x(u)              16 bytes, of unit u
//   exists(u)         for codes that may be NaN: whether they are there
//   pairs(u)          where in shared memory scales of the group are that unit u ends; from one kind or tile to the next `pair_stride`
// `table`: of the lane.
template <class Kind, class T, bool kZeros, int kTiles, int u, class Operands>
__device__ __forceinline__ void multiply_step(const LinearParams& p, const Operands& operands, uint32_t table, Kind (&codes)[kTiles],
                                              StepSums<kTiles>& s) {
  constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
  constexpr int kBlockUnits = Kind::kUnits;
  if (u == 0 || operands.exists(u)) {
    uint32_t b[2][2];
    Kind::activations(operands.x(u), b);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (u % kBlockUnits == 0) codes[i] = operands.codes(i, u / kBlockUnits);
      uint32_t a[2][4];
      codes[i].template unit<T, u % kBlockUnits>(table, a);
      mma(T{}, s.products[i], a[0], b[0][0], b[0][1]);
      mma(T{}, s.products[i], a[1], b[1][0], b[1][1]);
    }
    if constexpr (kZeros) {
      mma(T{}, s.x, ones, b[0][0], b[0][1]);
      mma(T{}, s.x, ones, b[1][0], b[1][1]);
    }
  }
  if (u + 1 == kStepUnits || ((u + 1) & p.flush_mask) == 0) {
    scale_step<Kind, kZeros>(operands.pairs(u), operands.pair_stride, p.weight.scale_dtype, s);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) s.products[i][c] = 0.0f;
      s.x[c] = 0.0f;
    }
  }
  if constexpr (u + 1 < kStepUnits) multiply_step<Kind, T, kZeros, kTiles, u + 1>(p, operands, table, codes, s);
}

// A warp's sums to shared memory, [kTiles][32][4].
template <int kTiles>
__device__ __forceinline__ void store_sums(float* partial, int lane, const StepSums<kTiles>& s) {
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    *reinterpret_cast<float4*>(partial + (i * 32 + lane) * 4) = make_float4(s.sums[i][0], s.sums[i][1], s.sums[i][2], s.sums[i][3]);
}

// Sums of kWarps warps, [kWarps][kTiles][32][4], added in their order, to the output, by the first kWarps warps; of the first `tiles` tiles.
template <class T, int kWarps, int kTiles>
__device__ __forceinline__ void store_outputs(const LinearParams& p, const float* partial, int64_t first_tile, int tiles, int64_t first_token) {
  for (int i = threadIdx.x; i < tiles * kTileRows * 8; i += 32 * kWarps) {
    const int row = i % kTileRows, token = i / kTileRows % 8, tile = i / (kTileRows * 8);
    const int64_t n = (first_tile + tile) * kTileRows + row, m = first_token + token;
    if (n >= p.weight.out_features || m >= p.tokens) continue;
    const float* from = partial + (tile * 32 + row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += from[w * kTiles * 32 * 4];
    if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
    store(static_cast<uint16_t*>(p.y) + m * p.weight.out_features + n, from_float(T{}, sum));
  }
}

}  // namespace
}  // namespace hfq
