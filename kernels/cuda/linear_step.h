// What a warp computes of a product with few tokens: one or two tiles of 16 rows times 128 columns at a time, for 8 tokens or more.
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

template <int kTiles, int kTokenTiles = 1>
struct StepSums {
  float sums[kTiles][kTokenTiles][4] = {};      // scaled
  float products[kTiles][kTokenTiles][4] = {};  // of units since scales were applied
  float x[kTokenTiles][4] = {};                 // activations of the same, if there are zero points
};

// Adds products times their scales, which lie in shared memory at `at`, each kind and tile `stride` behind the one before.
template <class Kind, bool kZeros, int kTiles, int kTokenTiles>
__device__ __forceinline__ void scale_step(uint32_t at, uint32_t stride, DType dtype, StepSums<kTiles, kTokenTiles>& s) {
  constexpr float kMiddle = 1 << (StepCodes<Kind>::kBits - 1);
  constexpr int kPairs = kTiles * (kZeros ? 2 : 1);
  RawPair raw[kPairs];
  Pair pairs[kPairs];  // scales of each tile, then zero points of each
#pragma unroll
  for (int i = 0; i < kPairs; ++i) raw[i] = load_pair(at + i * stride, dtype);
  to_floats(raw, dtype, pairs);
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      float *const products = s.products[i][j], *const sums = s.sums[i][j];
      if constexpr (kZeros) {
        // Products are with code - middle: what lacks is middle - zero for each activation.
        const float low = kMiddle - pairs[kTiles + i].low, high = kMiddle - pairs[kTiles + i].high;
        products[0] += low * s.x[j][0];
        products[1] += low * s.x[j][1];
        products[2] += high * s.x[j][2];
        products[3] += high * s.x[j][3];
      }
      sums[0] += pairs[i].low * products[0];
      sums[1] += pairs[i].low * products[1];
      sums[2] += pairs[i].high * products[2];
      sums[3] += pairs[i].high * products[3];
    }
}

// Products, and activations, of the units before the next scales: zero, or what is known of them from the beginning. `operands`: of multiply_step.
template <class Kind, class T, bool kZeros, class Operands, int kTiles, int kTokenTiles>
__device__ __forceinline__ void begin_group(const Operands& operands, int u, StepSums<kTiles, kTokenTiles>& s) {
  constexpr float kOffset = -Kind::template kRawOffset<T>;
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) {
    float x[4] = {};
    if constexpr (Operands::kHasXSums && (kZeros || kOffset != 0)) {
      const float4 sums = operands.x_sums(u, j);
      x[0] = sums.x, x[1] = sums.y, x[2] = sums.z, x[3] = sums.w;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (kZeros) s.x[j][c] = x[c];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) s.products[i][j][c] = Operands::kHasXSums ? kOffset * x[c] : 0.0f;
    }
  }
}

// Units u and later of a step. What a lane needs of it comes from `operands`:
//   codes(i, block)   of tile i and a block of the step
//   x(u, j)           16 bytes, of unit u and token lane / 4 of token tile j
//   pairs(u)          where in shared memory scales of the group are that unit u ends; from one kind or tile to the next `pair_stride`
//   x_sums(u, j)      where kHasXSums: sums of activations from unit u to the next scales, as the matrix instruction with ones would give them
// `table`: of the lane.
//
// With these sums raw numbers will do: code + 128 in place of code - 8. The products begin with - 136 times the sum. Products are 30 times as large
// meanwhile; float32 sums round 2^-24 of that, where an output rounds 2^-9.
template <class Kind, class T, bool kZeros, int u, class Operands, int kTiles, int kTokenTiles>
__device__ __forceinline__ void multiply_step(const LinearParams& p, const Operands& operands, uint32_t table, Kind (&codes)[kTiles],
                                              StepSums<kTiles, kTokenTiles>& s) {
  constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
  constexpr int kBlockUnits = Kind::kUnits;
  constexpr bool kRaw = Operands::kHasXSums && Kind::template kRawOffset<T> != 0;
  if constexpr (u == 0) begin_group<Kind, T, kZeros>(operands, u, s);
  uint32_t b[kTokenTiles][2][2];
#pragma unroll
  for (int j = 0; j < kTokenTiles; ++j) Kind::activations(operands.x(u, j), b[j]);
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if constexpr (u % kBlockUnits == 0) codes[i] = operands.codes(i, u / kBlockUnits);
    uint32_t a[2][4];
    codes[i].template unit<T, u % kBlockUnits, kRaw>(table, a);
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      mma(T{}, s.products[i][j], a[0], b[j][0][0], b[j][0][1]);
      mma(T{}, s.products[i][j], a[1], b[j][1][0], b[j][1][1]);
    }
  }
  if constexpr (kZeros && !Operands::kHasXSums) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      mma(T{}, s.x[j], ones, b[j][0][0], b[j][0][1]);
      mma(T{}, s.x[j], ones, b[j][1][0], b[j][1][1]);
    }
  }
  if (u + 1 == kStepUnits || ((u + 1) & p.flush_mask) == 0) {
    scale_step<Kind, kZeros>(operands.pairs(u), operands.pair_stride, p.weight.scale_dtype, s);
    if constexpr (u + 1 < kStepUnits) begin_group<Kind, T, kZeros>(operands, u + 1, s);
  }
  if constexpr (u + 1 < kStepUnits) multiply_step<Kind, T, kZeros, u + 1>(p, operands, table, codes, s);
}

// ---- a warp's sums in shared memory, and those of all warps: [warps][kTiles][kTokenTiles][32][4]

template <int kTiles, int kTokenTiles>
__device__ __forceinline__ void store_sums(float* partial, const StepSums<kTiles, kTokenTiles>& s) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      const float* const sums = s.sums[i][j];
      *reinterpret_cast<float4*>(partial + (((warp * kTiles + i) * kTokenTiles + j) * 32 + lane) * 4) =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
}

// Number `at` of the kSums sums of each warp: those of all warps, added in their order.
template <int kWarps, int kSums>
__device__ __forceinline__ float sum_of_warps(const float* partial, int at) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[at + w * kSums];
  return sum;
}

}  // namespace
}  // namespace hfq
