// The kernel of cuda_spqr_linear for up to 8 tokens, for one number of bits in each file that includes this: dense low-bit and sparse outliers in one
// pass. (More: spqr_gemm.h.)
//
// As linear_kernel.h: a thread block takes one or two tiles of 16 rows and up to 8 tokens, its 8 warps every eighth step of 128 columns, whose
// operands arrive through rings in shared memory (spqr_ring.h); partial sums meet there, too, and are added in a fixed order. What differs
// comes from groups of 16 columns.
//
// Columns. The scale of a group multiplies the float32 sums of its columns, so one matrix instruction has to have columns of one group. In
// layout "fragments" lane t has the columns 8t .. 8t+7 of a unit, four for each of two instructions, which thus see both halves of the
// unit. Here lane t has
//
//     instruction j, columns 16j + 4t + {0, 1} of row g: a[0], of row g + 8: a[1]; columns 16j + 4t + {2, 3}: a[2], a[3]
//
// in the same registers: instruction j has the columns 16j .. 16j+15. Groups of 8 columns would double the matrix instructions and all
// that follows them; nobody uses them.
//
// One token would leave 7 of the 8 columns of B empty. They get its activations at other parts of the step: column n is multiplied with the
// weights of every part, and part n is what counts. Lane t takes parts 2t and 2t + 1 (of 32 columns: t) out of its registers, so that
// the sums of 8 matrix instructions lie side by side in 4 registers, in the very lane that decodes the scales of its rows and parts:
// 6 selections of 2 registers, where 8 tokens take 64 multiply-adds and 8 loads of scales from shared memory. One instruction more, with
// ones as weights, adds up the activations of all parts.
//
// With several tokens the lanes of a warp decode the scales of a step once, each for other rows and parts, into shared memory of the warp,
// from where a lane takes the numbers of its two rows in one load. Codes have 4 bits (8 where stat_bits is above 4), so that a field needs
// one logical instruction: with 3 bits that costs 1/8 bit per weight in groups of 16.
//
// Both ways add the parts of each quarter of a step to a sum of its own, and these in one order: what a token gives does not depend on others.
//
// Bytes and instructions: 16 x 16 weights of 3 bits in groups of 16 are 96 bytes, 16 of codes of scales, 2 of lines; at 14 bytes per clock
// (linear_kernel.h) that is the time of 33 instructions of a multiprocessor. For one token ptxas makes 28 that are executed: 11 for codes, 1 mma,
// 5 to decode scales, 4 for copies, the rest to pick, add up and loop; 24 for groups of 32. With up to 8 tokens it makes 39, or 36 of two tiles, 8
// of them to add up: there instructions are the limit, at some four fifths of the memory's rate.
#pragma once

#include "runs.h"
#include "spqr_outliers.h"
#include "spqr_ring.h"
#include "spqr_scales.h"

namespace hfq {
namespace {

constexpr int kThreads = 32 * kWarps;
constexpr int kHalves = kStepColumns / kHalfColumns, kQuarters = 4;  // of a step

// Thread blocks of a multiprocessor: 80 or 128 registers of a thread. For one token, 24 warps with 5 steps of 768 bytes on the way are 90 KB where
// 20 bytes per clock over a latency of 1000 clocks need 20: a thread block has little to do, and its beginning and end take their time, too.
template <int kTokens>
constexpr int kResident = kTokens == 1 ? 3 : 2;

// ---- primitives ----

// The A operand of half h of a step.
template <class T, int h, int kBits, int kBlocks>
__device__ __forceinline__ void weights_of(const Codes<kBits> (&codes)[kBlocks], uint32_t (&a)[4]) {
  constexpr int kOfBlock = kHalves / kBlocks, r = h % kOfBlock * 4;
  const Codes<kBits>& block = codes[h / kOfBlock];
  a[0] = block.template numbers<T, r>(), a[1] = block.template numbers<T, r + 2>();
  a[2] = block.template numbers<T, r + 1>(), a[3] = block.template numbers<T, r + 3>();
}

// Products are with code - middle: what lacks is middle - zero for each activation.
__device__ __forceinline__ float add_scaled(float scale, float lack, float product, float x_sum, float sum) {
  return multiply_add(scale, multiply_add(lack, x_sum, product), sum);
}

// ---- the dense part, of one warp ----

template <int kBits, class T, bool kShort>
struct OneToken {
  static constexpr int kTokens = 1, kTiles = 1, kNumberBytes = 0;
  using Ring = SpqrRing<kBits, kShort, 1, 1>;
  static constexpr int kSums = 16;          // of a warp in shared memory
  static constexpr int kOwn = kShort ? 2 : 1;  // parts of a lane

  const SpqrWeight& w;
  uint32_t lane, x_at, codes_at, lines_at;
  float sums[2] = {};  // of rows g and g + 8 over the lane's quarter of each step

  __device__ __forceinline__ OneToken(const Ring& ring, uint8_t*) : w(ring.p.weight), lane(ring.lane) {
    const uint32_t codes = group_code_bytes(w), quarter = lane % 4, row = lane / 4;
    x_at = kept(Ring::kXAt + 8 * quarter + 2 * kHalfColumns * (kShort ? row : row / 2 * 2));
    codes_at = kept(ring.stats_at + kOwn * quarter * codes + row * (codes / 8));
    lines_at = kept(ring.stats_at + Ring::kParts * codes + kOwn * quarter * line_bytes(w));
  }

  // Halves h and later of a step. `picked`: products of the lane's parts in row g, then in row g + 8.
  template <int h>
  __device__ __forceinline__ void multiply(const Codes<kBits> (&codes)[Ring::kBlocks], const uint2 (&x)[kShort ? 1 : 2], float (&products)[4],
                                           float (&picked)[4]) const {
    uint32_t a[4];
    weights_of<T, h>(codes, a);
    if constexpr (kShort || h % 2 == 0) products[0] = products[1] = products[2] = products[3] = 0.0f;
    const uint2 b = x[kShort ? 0 : h % 2];
    mma(T{}, products, a, b.x, b.y);
    const bool own = h < 2 || lane % 4 == h / 2;
    if constexpr (kShort) {
      picked[h % 2] = own ? products[h % 2] : picked[h % 2];
      picked[2 + h % 2] = own ? products[2 + h % 2] : picked[2 + h % 2];
    } else if constexpr (h % 2 == 1) {
      picked[0] = own ? products[0] : picked[0];
      picked[2] = own ? products[2] : picked[2];
    }
    if constexpr (h + 1 < kHalves) multiply<h + 1>(codes, x, products, picked);
  }

  __device__ __forceinline__ void step(uint32_t stage) {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    Codes<kBits> codes[Ring::kBlocks];
#pragma unroll
    for (uint32_t i = 0; i < Ring::kBlocks; ++i) codes[i].take(stage + i * kBlockBytes<kBits> + 16 * lane, static_cast<int>(lane));
    uint2 x[kShort ? 1 : 2];
    float products[4], picked[4], x_sums[4] = {};
#pragma unroll
    for (int i = 0; i < (kShort ? 1 : 2); ++i) {
      x[i] = load_shared<uint2>(stage + x_at + 2 * kHalfColumns * i);
      mma(T{}, x_sums, ones, x[i].x, x[i].y);
    }
    multiply<0>(codes, x, products, picked);
    float4 numbers[kOwn];
    decode_groups<kBits>(w, stage + codes_at, stage + lines_at, numbers);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      sums[0] = add_scaled(numbers[i].x, numbers[i].y, picked[i], x_sums[i], sums[0]);
      sums[1] = add_scaled(numbers[i].z, numbers[i].w, picked[2 + i], x_sums[i], sums[1]);
    }
  }

  // The warp's sums, [16].
  __device__ __forceinline__ void store_sums(float* to) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float sum = sums[i];
#pragma unroll
      for (int lanes = 1; lanes < kQuarters; lanes *= 2) sum = add(sum, as_float(shuffle_xor(as_bits(sum), lanes)));
      if (lane % 4 == 0) to[8 * i + lane / 4] = sum;
    }
  }
  static __device__ __forceinline__ int place_of(int, int row, int) { return row; }
};

template <int kBits, class T, bool kShort, int kTileCount>
struct SeveralTokens {
  static constexpr int kTokens = 8, kTiles = kTileCount;
  using Ring = SpqrRing<kBits, kShort, kTokens, kTiles>;
  static constexpr int kSums = kTiles * 128;
  static constexpr int kOwn = kShort ? 2 : 1;                      // parts that a lane decodes
  static constexpr int kNumberBytes = Ring::kParts * 8 * 16;  // of a warp

  const SpqrWeight& w;
  uint32_t lane, x_at, codes_at, lines_at;
  float4* numbers_to;
  uint32_t numbers_at;
  const uint32_t& tile_stats;
  float sums[kTiles][kQuarters][4] = {};

  __device__ __forceinline__ SeveralTokens(const Ring& ring, uint8_t* numbers) : w(ring.p.weight), lane(ring.lane), tile_stats(ring.p.tile_stats) {
    const uint32_t codes = group_code_bytes(w), quarter = lane / 8, row = lane % 8;
    // Columns of a matrix instruction are independent: lanes whose token does not exist take token 0, and nobody stores their sums.
    const uint32_t token = lane / 4 < ring.tokens ? lane / 4 : 0;
    x_at = Ring::kXAt + token * Ring::kRowStride + 8 * (lane % 4);
    codes_at = ring.stats_at + kOwn * quarter * codes + row * (codes / 8);
    lines_at = kept(ring.stats_at + Ring::kParts * codes + kOwn * quarter * line_bytes(w));
    // Numbers of rows g and g + 8 in part s stand at 16 (8 s + g).
    numbers_to = reinterpret_cast<float4*>(numbers) + kOwn * quarter * 8 + row;
    numbers_at = shared_address(numbers) + 16 * (lane / 4);
  }

  // Halves h and later of a tile. `x_sums`: of each part, for tokens 2t and 2t + 1; computed with the first tile.
  template <int tile, int h>
  __device__ __forceinline__ void multiply(uint32_t x, const Codes<kBits> (&codes)[Ring::kBlocks], float (&products)[4],
                                           float (&x_sums)[Ring::kParts][4]) {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    constexpr int kPart = kShort ? h : h / 2;
    uint32_t a[4];
    weights_of<T, h>(codes, a);
    if constexpr (kShort || h % 2 == 0) products[0] = products[1] = products[2] = products[3] = 0.0f;
    const uint2 b = load_shared<uint2>(x + 2 * kHalfColumns * h);
    mma(T{}, products, a, b.x, b.y);
    if constexpr (kShort || tile == 0) {
      if constexpr (kShort) x_sums[kPart][0] = x_sums[kPart][1] = x_sums[kPart][2] = x_sums[kPart][3] = 0.0f;
      mma(T{}, x_sums[kPart], ones, b.x, b.y);
    }
    if constexpr (kShort || h % 2 == 1) {
      const uint4 n = load_shared<uint4>(numbers_at + 16 * 8 * kPart);
      float(&to)[4] = sums[tile][h / 2];
      const float(&xs)[4] = x_sums[kPart];
      to[0] = add_scaled(as_float(n.x), as_float(n.y), products[0], xs[0], to[0]);
      to[1] = add_scaled(as_float(n.x), as_float(n.y), products[1], xs[1], to[1]);
      to[2] = add_scaled(as_float(n.z), as_float(n.w), products[2], xs[0], to[2]);
      to[3] = add_scaled(as_float(n.z), as_float(n.w), products[3], xs[1], to[3]);
    }
    if constexpr (h + 1 < kHalves) multiply<tile, h + 1>(x, codes, products, x_sums);
  }

  template <int tile>
  __device__ __forceinline__ void step_of(uint32_t stage, float (&x_sums)[Ring::kParts][4]) {
    float4 numbers[kOwn];
    decode_groups<kBits>(w, stage + codes_at + tile * tile_stats, stage + lines_at + tile * tile_stats, numbers);
    if constexpr (tile > 0) sync_warp();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) numbers_to[8 * i] = numbers[i];
    sync_warp();
    Codes<kBits> codes[Ring::kBlocks];
#pragma unroll
    for (uint32_t i = 0; i < Ring::kBlocks; ++i)
      codes[i].take(stage + tile * Ring::kBytes + i * kBlockBytes<kBits> + 16 * lane, static_cast<int>(lane));
    float products[4];
    multiply<tile, 0>(stage + x_at, codes, products, x_sums);
    if constexpr (tile + 1 < kTiles) step_of<tile + 1>(stage, x_sums);
  }

  __device__ __forceinline__ void step(uint32_t stage) {
    float x_sums[Ring::kParts][4] = {};
    step_of<0>(stage, x_sums);
  }

  // The warp's sums, [tiles, 32, 4].
  __device__ __forceinline__ void store_sums(float* to) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      float sum[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] = add(add(sums[i][0][c], sums[i][1][c]), add(sums[i][2][c], sums[i][3][c]));
      *reinterpret_cast<float4*>(to + 128 * i + 4 * lane) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    }
  }
  static __device__ __forceinline__ int place_of(int tile, int row, int token) {
    return 128 * tile + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
  }
};

// ---- kernel ----

// Bytes of shared memory beside rings.
template <class Warp>
constexpr size_t kBesideRings = kWarps * Warp::kNumberBytes + Warp::kTiles * kTileRows * Warp::kTokens * 4;

// What a thread block computes. Warp: OneToken or SeveralTokens.
template <class T, class Warp>
__device__ __forceinline__ void spqr_block(const SpqrLinearParams& p, int64_t first_tile, int64_t first_token) {
  constexpr int kTiles = Warp::kTiles, kTokens = Warp::kTokens;
  uint8_t* shared = shared_memory();
  float* sparse = reinterpret_cast<float*>(shared + kWarps * Warp::kNumberBytes);  // [tiles][16][tokens]
  uint8_t* rings = shared + kBesideRings<Warp>;
  const uint32_t warp = threadIdx.x / 32;
  const typename Warp::Ring ring(p, first_tile, first_token);
  Warp mine(ring, shared + warp * Warp::kNumberBytes);
  let_next_kernel_start();
  wait_for_previous_kernel();  // for x, and whoever made the weight
  RawSpan spans[kTiles] = {};
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t row = (first_tile + i) * kTileRows + threadIdx.x / kOutlierShare;
    if (p.weight.outliers && row < p.weight.out_features)
      spans[i] = {load_written(p.weight.offsets + row), load_written(p.weight.offsets + row + 1)};
  }
  const auto fill = [&] {
    if (!p.weight.outliers) return;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) multiply_outliers<T, kTokens>(p, spans[i], first_token, ring.tokens, sparse + i * kTileRows * kTokens);
  };
  ring.run(shared_address(rings) + warp * p.ring_bytes, fill, [&](uint32_t stage) { mine.step(stage); });
  sync_warp();  // the warp's own ring is free
  mine.store_sums(reinterpret_cast<float*>(rings + warp * p.ring_bytes));
  sync_block();

  for (int i = threadIdx.x; i < kTiles * kTileRows * kTokens; i += kThreads) {
    const int row = i % kTileRows, token = i / kTileRows % kTokens, tile = i / (kTileRows * kTokens);
    const int64_t n = (first_tile + tile) * kTileRows + row, m = first_token + token;
    if (n >= p.weight.out_features || m >= p.tokens) continue;
    const uint8_t* from = rings + 4 * Warp::place_of(tile, row, token);
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += *reinterpret_cast<const float*>(from + w * p.ring_bytes);
    if (p.weight.outliers) sum += sparse[(tile * kTileRows + row) * kTokens + token];
    if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
    store(static_cast<uint16_t*>(p.y) + m * p.weight.out_features + n, from_float(T{}, sum));
  }
}

template <class T, class Warp>
__global__ void __launch_bounds__(kThreads, kResident<Warp::kTokens>) spqr_linear_kernel(const SpqrLinearParams p) {
  spqr_block<T, Warp>(p, static_cast<int64_t>(blockIdx.x) * Warp::kTiles, 0);
}

// The same for tokens that are sorted by expert: what a thread block of experts_kernel.h is to one of linear_kernel.h.
template <class T, class Warp>
__global__ void __launch_bounds__(kThreads, kResident<Warp::kTokens>) spqr_experts_kernel(const SpqrExpertsParams p) {
  const Routing& r = p.routing;
  const int64_t tile = blockIdx.x / r.slots, all = p.linear.weight.out_features;
  wait_for_previous_kernel();  // counts
  const Run run = find_run<Warp::kTokens>(r, static_cast<uint32_t>(p.linear.tokens), blockIdx.x % r.slots);
  if (run.first >= run.end) return;
  if (run.expert == r.experts) return store_zeros(static_cast<uint16_t*>(p.linear.y), all, run, tile * kTileRows, kTileRows, kThreads);
  SpqrLinearParams own = p.linear;
  own.weight = of_expert(own.weight, r, p.stat_bytes, run.expert);
  if (own.bias) own.bias = static_cast<const uint8_t*>(own.bias) + run.expert * r.bias_bytes;
  own.tokens = run.end;
  spqr_block<T, Warp>(own, tile, run.first);
}

// ---- launchers ----

template <class T, class Warp>
const char* launch_warps(const SpqrLinearParams& params, cudaStream_t stream) {
  SpqrLinearParams p = params;
  const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows;
  const int64_t tokens = p.tokens < Warp::kTokens ? p.tokens : Warp::kTokens;
  const size_t shared = plan_rings<typename Warp::Ring>(p, tokens, kBesideRings<Warp>, kResident<Warp::kTokens>);
  const unsigned blocks = static_cast<unsigned>((tiles + Warp::kTiles - 1) / Warp::kTiles);
  return launch_early(spqr_linear_kernel<T, Warp>, blocks, kThreads, evenly(shared, blocks), stream, p);
}

template <int kBits, class T, bool kShort>
const char* launch_groups(const SpqrLinearParams& p, cudaStream_t stream) {
  if (p.tokens == 1) return launch_warps<T, OneToken<kBits, T, kShort>>(p, stream);
  // Activations of 8 tokens are more bytes than the weights of a tile that they meet, and come from L2: two tiles share them where there are
  // enough for all multiprocessors. (Two of 2 bits in short groups leave too few registers.)
  if constexpr (!kShort || kBits > 2) {
    const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows;
    if (tiles >= int64_t{4} * multiprocessors()) return launch_warps<T, SeveralTokens<kBits, T, kShort, 2>>(p, stream);
  }
  return launch_warps<T, SeveralTokens<kBits, T, kShort, 1>>(p, stream);
}

template <int kBits, class T>
const char* launch_dtype(const SpqrLinearParams& p, cudaStream_t stream) {
  return p.short_groups ? launch_groups<kBits, T, true>(p, stream) : launch_groups<kBits, T, false>(p, stream);
}

template <int kBits, class T, bool kShort>
const char* launch_experts(const SpqrExpertsParams& params, cudaStream_t stream) {
  using Warp = SeveralTokens<kBits, T, kShort, 1>;
  SpqrExpertsParams p = params;
  const int64_t tiles = (p.linear.weight.out_features + kTileRows - 1) / kTileRows, tokens = p.linear.tokens < 8 ? p.linear.tokens : 8;
  const size_t shared = plan_rings<typename Warp::Ring>(p.linear, tokens, kBesideRings<Warp>, kResident<Warp::kTokens>);
  return launch_early(spqr_experts_kernel<T, Warp>, static_cast<unsigned>(tiles * p.routing.slots), kThreads, shared, stream, p);
}

template <int kBits>
const char* launch_spqr_experts_of(const SpqrExpertsParams& p, cudaStream_t stream) {
  if (p.linear.x_dtype == kBFloat16)
    return p.linear.short_groups ? launch_experts<kBits, BFloat16, true>(p, stream) : launch_experts<kBits, BFloat16, false>(p, stream);
  return p.linear.short_groups ? launch_experts<kBits, Float16, true>(p, stream) : launch_experts<kBits, Float16, false>(p, stream);
}

template <int kBits>
const char* launch_spqr_linear_of(const SpqrLinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<kBits, BFloat16>(p, stream) : launch_dtype<kBits, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
