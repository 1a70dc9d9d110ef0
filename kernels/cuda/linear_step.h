// What a warp computes of a product with few tokens: one or two tiles of 16 rows times 128 columns at a time, for up to 8 tokens.
#pragma once

#include "fragments.h"
#include "linear.h"

namespace hfq {
namespace {

constexpr int kStepUnits = kStepColumns / kUnitColumns;

// Bytes and places of a step of `Kind`.
template <class Kind>
struct StepCodes {
  static constexpr int kBits = Kind::kCodeBits;
  static constexpr int kBlock = kBlockBytes<kBits>, kBytes = kStepUnits / Kind::kUnits * kBlock;  // of a block, and of a step of one tile
};

template <int kTiles>
struct StepSums {
  float sums[kTiles][4] = {};      // scaled
  float products[kTiles][4] = {};  // of units since scales were applied
  float x[4] = {};                 // activations of the same, if there are zero points
};

// Adds products times their scales, which lie in shared memory at `at`, each kind and tile `stride` behind the one before.
template <class Kind, bool kZeros, int kTiles>
__device__ __forceinline__ void scale_step(uint32_t at, uint32_t stride, DType dtype, StepSums<kTiles>& s) {
  constexpr float kMiddle = 1 << (StepCodes<Kind>::kBits - 1);
  constexpr int kPairs = kTiles * (kZeros ? 2 : 1);
  RawPair raw[kPairs];
  Pair pairs[kPairs];  // scales of each tile, then zero points of each
#pragma unroll
  for (int i = 0; i < kPairs; ++i) raw[i] = load_pair(at + i * stride, dtype);
  to_floats(raw, dtype, pairs);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    float *const products = s.products[i], *const sums = s.sums[i];
    if constexpr (kZeros) {
      // Products are with code - middle: what lacks is middle - zero for each activation.
      const float low = kMiddle - pairs[kTiles + i].low, high = kMiddle - pairs[kTiles + i].high;
      products[0] += low * s.x[0];
      products[1] += low * s.x[1];
      products[2] += high * s.x[2];
      products[3] += high * s.x[3];
    }
    sums[0] += pairs[i].low * products[0];
    sums[1] += pairs[i].low * products[1];
    sums[2] += pairs[i].high * products[2];
    sums[3] += pairs[i].high * products[3];
  }
}

// No products, and no activations, of the units before the next scales.
template <int kTiles>
__device__ __forceinline__ void begin_group(StepSums<kTiles>& s) {
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    s.x[c] = 0.0f;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) s.products[i][c] = 0.0f;
  }
}

// Units u and later of a step. What a lane needs of it comes from `operands`:
//   codes(i, block)   of tile i and a block of the step
//   x(u)              16 bytes, of unit u and token lane / 4
//   pairs(u)          where in shared memory scales of the group are that unit u ends; from one kind or tile to the next `pair_stride`
// `table`: of the lane.
template <class Kind, class T, bool kZeros, int u, class Operands, int kTiles>
__device__ __forceinline__ void multiply_step(const LinearParams& p, const Operands& operands, uint32_t table, Kind (&codes)[kTiles],
                                              StepSums<kTiles>& s) {
  constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
  constexpr int kBlockUnits = Kind::kUnits;
  if constexpr (u == 0) begin_group(s);
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
  if (u + 1 == kStepUnits || ((u + 1) & p.flush_mask) == 0) {
    scale_step<Kind, kZeros>(operands.pairs(u), operands.pair_stride, p.weight.scale_dtype, s);
    if constexpr (u + 1 < kStepUnits) begin_group(s);
  }
  if constexpr (u + 1 < kStepUnits) multiply_step<Kind, T, kZeros, u + 1>(p, operands, table, codes, s);
}

// ---- a warp's sums in shared memory, and those of all warps: [warps][kTiles][32][4]

template <int kTiles>
__device__ __forceinline__ void store_sums(float* partial, const StepSums<kTiles>& s) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const float* const sums = s.sums[i];
    *reinterpret_cast<float4*>(partial + ((warp * kTiles + i) * 32 + lane) * 4) = make_float4(sums[0], sums[1], sums[2], sums[3]);
  }
}

// Number `at` of the kSums sums of each warp: those of all warps, added in their order.
template <int kSums>
__device__ __forceinline__ float sum_of_warps(const float* partial, int at) {
  float sum = 0.0f;
#pragma unroll 4
  for (uint32_t w = 0; w < blockDim.x / 32; ++w) sum += partial[at + w * kSums];
  return sum;
}

}  // namespace
}  // namespace hfq
