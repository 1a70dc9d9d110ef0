// The kernel of cuda_spqr_linear, for one number of bits in each file that includes this: dense low-bit and sparse outliers in one pass.
//
// As linear_kernel.h: a thread block takes a tile of 16 rows and up to 8 tokens, its 8 warps every eighth block of columns; codes go straight
// to registers, blocks ahead; partial sums meet in shared memory and are added in a fixed order. What differs comes from groups of 16 columns.
//
// Columns. The scale of a group multiplies the float32 sums of its columns, so one matrix instruction has to have columns of one group. In
// layout "fragments" lane t has the columns 8t .. 8t+7 of a unit, four for each of two instructions, which thus see both halves of the
// unit. Here lane t has
//
//     instruction j, columns 16j + 4t + {0, 1} of row g: a[0], of row g + 8: a[1]; columns 16j + 4t + {2, 3}: a[2], a[3]
//
// in the same registers: instruction j has the columns 16j .. 16j+15. Activations are two loads of 8 bytes, not one of 16: one instruction
// more for a unit, where scaling the 16-bit operands would take eight, and round weights. Groups of 8 columns would double the matrix
// instructions and all that follows them; nobody uses them.
//
// Scales. A scale and a zero point are two codes, and two lines that 16 rows of a tile share. The lanes of a warp decode those of a block once,
// each for other rows and groups, into shared memory of the warp, from where a lane takes the numbers of its two rows in one load. Were
// each lane to decode what it needs, t = 0 .. 3 would do the same work: some 25 instructions for each matrix instruction, in place of 10.
// Codes have 4 bits (8 where stat_bits is above 4), so that a field needs one logical instruction: with 3 bits that costs 1/8 bit per
// weight in groups of 16.
//
// Bytes and instructions: 16 x 16 weights of 3 bits are 96 bytes, 16 of codes of scales, 2 of lines; at 14 bytes per clock (linear_kernel.h)
// that is the time of 33 instructions of a multiprocessor. ptxas makes about 40 of them: 11 for codes, 2 mma (of weights; of ones, for zero
// points), 8 to add up, 10 for scales, the rest for activations, addresses and moves. So 3 bits in groups of 16 are limited by
// instructions, not by memory, at some four fifths of its rate; groups of 32 take about 34 instructions.
//
// Outliers. 16 threads share a row, strided, so that neighbours read neighbours; their sums are added by shuffles, in one order. That happens
// at the start, while the first codes are on their way: three loads depend on each other, of which one is hidden so.
#pragma once

#include "spqr_parts.h"

namespace hfq {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kTokens = 8;

// Thread blocks of a multiprocessor: 80 registers of a thread are enough for blocks of 64 columns, not for those of 128.
template <int kBits>
constexpr int kResident = kBits == 4 ? 3 : 2;

// Blocks of columns that a warp has on the way; even, because shared memory of scales alternates. The warps of a multiprocessor then have
// 24 KB (2 bits: 16), as linear_kernel.h reasons.
constexpr int kAhead = 2;

// Matrix instructions of a block; at most so many steps of scales.
template <int kBits>
constexpr int kHalves = kBlockColumns<kBits> / kHalfColumns;

// Bytes of shared memory: numbers of two rows for each step of two blocks, partial sums, sums of outliers.
template <int kBits>
constexpr int kNumberBytes = kWarps * 2 * kHalves<kBits> * 8 * 16;
constexpr int kPartialBytes = kWarps * 32 * 16;
constexpr int kOutlierBytes = kTileRows * kTokens * 4;

// ---- primitives ----

// What a lane decodes of a block, as it is loaded: pairs of rows in one step each.
template <int kItems>
struct RawScales {
  uint32_t codes[kItems];
  uint2 lines[kItems];  // 16-bit floats; those of 32 bits, which are rare, are loaded when they are needed and take no registers
};

// The four numbers of a group's lines.
__device__ __forceinline__ void to_floats(uint2 raw, DType dtype, float (&lines)[4]) {
  const uint32_t words[2] = {raw.x, raw.y};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    lines[i] = dtype == kFloat16 ? to_float(Float16{}, half) : to_float(BFloat16{}, half);
  }
}

// 4 bits of a word at bit 4 i, i < 4: with the exponent of 2^(23 - 4i) the mantissa counts in ones there.
template <int i>
__device__ __forceinline__ float narrow_code(uint32_t word) {
  constexpr uint32_t kExponent = (127u + 23 - 4 * i) << 23;
  return as_float(and_or<0xfu << (4 * i)>(word, kExponent)) - static_cast<float>(1 << (23 - 4 * i));
}

// Byte i of a word.
template <int i>
__device__ __forceinline__ float wide_code(uint32_t word) {
  return as_float(permute_bytes(word, 0x4b000000u, 0x7540u | i)) - 8388608.0f;
}

// Of rows g and g + 8: scale and what a zero point lacks to the middle of the codes.
template <int kBits>
__device__ __forceinline__ float4 decode(uint32_t codes, const float (&lines)[4], const SpqrWeight& w) {
  const float middle = static_cast<float>(1 << (kBits - 1)) - lines[3];
  float c[4];
  if (w.wide_codes) {
    c[0] = wide_code<0>(codes), c[1] = wide_code<1>(codes), c[2] = wide_code<2>(codes), c[3] = wide_code<3>(codes);
  } else {
    c[0] = narrow_code<0>(codes), c[1] = narrow_code<1>(codes), c[2] = narrow_code<2>(codes), c[3] = narrow_code<3>(codes);
  }
  return make_float4(lines[1] + c[0] * lines[0], middle - c[1] * lines[2], lines[1] + c[2] * lines[0], middle - c[3] * lines[2]);
}

// The outliers of 16 rows times up to 8 tokens, into sums [16][8]. To be called by all threads of the block.
template <class T>
__device__ __forceinline__ void multiply_outliers(const SpqrLinearParams& p, int64_t first_row, int64_t first_token, float* sums) {
  constexpr uint32_t kShare = kThreads / kTileRows;
  const SpqrWeight& w = p.weight;
  const uint32_t part = threadIdx.x % kShare, row = threadIdx.x / kShare;
  const uint32_t tokens = p.tokens - first_token < kTokens ? static_cast<uint32_t>(p.tokens - first_token) : kTokens;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + first_token * w.in_features;
  float sum[kTokens] = {};
  if (first_row + row < w.out_features) {
    const Span span = outliers_of(w, first_row + row);
    for (uint32_t i = span.begin + part; i < span.end; i += kShare) {
      const uint32_t column = outlier_column(w, i);
      if (column >= w.in_features) continue;
      const float value = load_float(w.values, i, w.stat_dtype);
#pragma unroll
      for (uint32_t m = 0; m < kTokens; ++m)
        if (m < tokens) sum[m] += value * to_float(T{}, load(x + m * w.in_features + column));
    }
  }
#pragma unroll
  for (uint32_t m = 0; m < kTokens; ++m) {
    if (m >= tokens) break;
#pragma unroll
    for (int lanes = kShare / 2; lanes > 0; lanes /= 2) sum[m] += as_float(shuffle_xor(as_bits(sum[m]), lanes));
    if (part == m) sums[row * kTokens + m] = sum[m];
  }
}

// ---- the dense part, of one warp ----

// kShort: groups end behind single matrix instructions; otherwise behind units, or with blocks.
template <int kBits, class T, bool kShort>
struct SpqrWarp {
  static constexpr int kBytes = kBlockBytes<kBits>, kCount = kHalves<kBits>;
  static constexpr int kItems = kShort ? kCount / 4 : 1;  // 8 pairs of rows in `steps` steps are shared out over 32 lanes

  const SpqrLinearParams& p;
  int lane;
  uint32_t blocks;            // of columns, that are full; there may be one more
  uint32_t steps;             // of a block
  const uint8_t* qweight;     // the lane's first words of block 0
  const uint8_t* stat_codes;  // of the lane's pair of rows in group 0
  const uint8_t* stats;       // lines of group 0
  uint32_t code_bytes;        // from one group's stat_codes to the next
  uint32_t first_step;        // of a block, that the lane decodes
  const uint8_t* x;           // the lane's first activations
  uint8_t* numbers;           // of the warp, two blocks
  float sums[4] = {};

  __device__ __forceinline__ SpqrWarp(const SpqrLinearParams& params, uint8_t* shared, int64_t tile, int64_t first_token)
      : p(params), lane(threadIdx.x % 32) {
    const SpqrWeight& w = p.weight;
    const int64_t token = first_token + lane / 4;
    const int64_t stored = (w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>;
    blocks = kept(static_cast<uint32_t>(w.in_features) / kBlockColumns<kBits>);
    steps = kShort ? kCount : kBlockColumns<kBits> / p.step_columns;
    qweight = kept(w.qweight + tile * stored * kBytes + 16 * lane);
    code_bytes = w.wide_codes ? 32 : 16;
    first_step = kept(static_cast<uint32_t>(lane / 8));
    stat_codes = kept(w.stat_codes + tile * w.stat_groups * code_bytes + lane % 8 * (code_bytes / 8));
    stats = kept(static_cast<const uint8_t*>(w.stats) + tile * kTileRows / w.rows_per_stat * w.groups * (w.stat_dtype == kFloat32 ? 16 : 8));
    const uint32_t first = 4 * (lane % 4);
    // Lanes whose token does not exist read another one: no more bytes, and nobody reads what they add up.
    x = kept(static_cast<const uint8_t*>(p.x) + ((token < p.tokens ? token : first_token) * w.in_features + first) * 2);
    numbers = shared + threadIdx.x / 32 * (2 * kCount * 8 * 16);
  }

  __device__ __forceinline__ void load(Codes<kBits>& codes, uint32_t block) const {
    codes.load(qweight + block * kBytes, lane);
  }

  // The lane's activations of half h are at 2 kHalfColumns h from here; null if the warp has no such block.
  __device__ __forceinline__ const uint8_t* activations_of(uint32_t block) const {
    return block < blocks ? x + static_cast<uint64_t>(block) * (2 * kBlockColumns<kBits>) : nullptr;
  }
  __device__ __forceinline__ void load(uint2& activations, const uint8_t* from, int half) const {
    if (from) activations = hfq::load(reinterpret_cast<const uint2*>(from + 2 * kHalfColumns * half));
  }

  __device__ __forceinline__ uint32_t group_of(uint32_t block, uint32_t step) const {
    const uint32_t group = multiply_high(2 * (block * steps + step), p.group_magic), last = static_cast<uint32_t>(p.weight.groups) - 1;
    return group < last ? group : last;  // steps behind K
  }

  __device__ __forceinline__ void load(RawScales<kItems>& raw, uint32_t block) const {
    const SpqrWeight& w = p.weight;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t step = first_step + 4 * i;
      if (step >= steps) continue;
      const uint32_t group = group_of(block, step);
      raw.codes[i] = load_stat_codes(stat_codes + static_cast<uint64_t>(group) * code_bytes, w.wide_codes);
      if (w.stat_dtype != kFloat32) raw.lines[i] = hfq::load(reinterpret_cast<const uint2*>(stats) + group);
    }
  }

  // Numbers of rows g and g + 8 in step s stand at 16 (8 s + g).
  __device__ __forceinline__ void decode_scales(const RawScales<kItems>& raw, uint32_t block, uint8_t* to) const {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t step = first_step + 4 * i;
      if (step >= steps) continue;
      float lines[4];
      if (p.weight.stat_dtype == kFloat32) {
        const float4 v = hfq::load(reinterpret_cast<const float4*>(stats) + group_of(block, step));
        lines[0] = v.x, lines[1] = v.y, lines[2] = v.z, lines[3] = v.w;
      } else {
        to_floats(raw.lines[i], p.weight.stat_dtype, lines);
      }
      *reinterpret_cast<float4*>(to + 16 * (lane + 32 * i)) = decode<kBits>(raw.codes[i], lines, p.weight);
    }
  }

  // Halves h and later of a block. Activations make room for those of the warp's next block, `next`, as they are used up.
  template <int h>
  __device__ __forceinline__ void multiply(const Codes<kBits>& codes, uint2 (&activations)[kCount], const uint8_t* next, const uint8_t* scales,
                                           float (&products)[4], float (&x_sums)[4]) {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    const uint32_t a[4] = {codes.template numbers<T, 4 * h>(), codes.template numbers<T, 4 * h + 2>(), codes.template numbers<T, 4 * h + 1>(),
                           codes.template numbers<T, 4 * h + 3>()};
    mma(T{}, products, a, activations[h].x, activations[h].y);
    mma(T{}, x_sums, ones, activations[h].x, activations[h].y);
    load(activations[h], next, h);
    if (kShort || h + 1 == kCount || (h % 2 == 1 && steps > 1)) {
      const int step = kShort ? h : steps > 1 ? h / 2 : 0;
      const float4 n = *reinterpret_cast<const float4*>(scales + 16 * (8 * step + lane / 4));
      // Products are with code - middle: what lacks is middle - zero for each activation.
      sums[0] += n.x * (products[0] + n.y * x_sums[0]);
      sums[1] += n.x * (products[1] + n.y * x_sums[1]);
      sums[2] += n.z * (products[2] + n.w * x_sums[2]);
      sums[3] += n.z * (products[3] + n.w * x_sums[3]);
#pragma unroll
      for (int c = 0; c < 4; ++c) products[c] = x_sums[c] = 0.0f;
    }
    if constexpr (h + 1 < kCount) multiply<h + 1>(codes, activations, next, scales, products, x_sums);
  }

  // All blocks of the warp. `fill`: what is to be done once while the first loads are on their way.
  template <class Fill>
  __device__ __forceinline__ void run(const Fill& fill) {
    constexpr uint32_t kNext = kWarps;
    const uint32_t warp = threadIdx.x / 32;
    Codes<kBits> stages[kAhead];
    RawScales<kItems> raw = {};
    uint2 activations[kCount] = {};
#pragma unroll
    for (int s = 0; s < kAhead; ++s)
      if (warp + s * kNext < blocks) load(stages[s], warp + s * kNext);
    if (warp < blocks) load(raw, warp);
#pragma unroll
    for (int h = 0; h < kCount; ++h) load(activations[h], activations_of(warp), h);
    fill();
    float products[4] = {}, x_sums[4] = {};
    for (uint32_t first = warp; first < blocks; first += kAhead * kNext) {
#pragma unroll
      for (int s = 0; s < kAhead; ++s) {
        const uint32_t block = first + s * kNext;
        if (block < blocks) {
          // The numbers of the block before last make room: who has passed the barrier in between has read them.
          uint8_t* scales = numbers + s % 2 * (kCount * 8 * 16);
          decode_scales(raw, block, scales);
          sync_warp();
          if (block + kNext < blocks) load(raw, block + kNext);
          multiply<0>(stages[s], activations, activations_of(block + kNext), scales, products, x_sums);
          if (block + kAhead * kNext < blocks) load(stages[s], block + kAhead * kNext);
        }
      }
    }
    const uint32_t columns = static_cast<uint32_t>(p.weight.in_features) % kBlockColumns<kBits>;
    if (columns == 0 || blocks % kWarps != warp) return;
    // The last block is not full: what is behind K counts as zero.
    load(stages[0], blocks);
    load(raw, blocks);
#pragma unroll
    for (int h = 0; h < kCount; ++h) {
      const uint8_t* from = x + (static_cast<uint64_t>(blocks) * kBlockColumns<kBits> + h * kHalfColumns) * 2;
      activations[h] = make_uint2(0, 0);
      if (h * kHalfColumns + 4 * (threadIdx.x % 4) < columns) activations[h] = hfq::load(reinterpret_cast<const uint2*>(from));
    }
    sync_warp();
    decode_scales(raw, blocks, numbers);
    sync_warp();
    multiply<0>(stages[0], activations, nullptr, numbers, products, x_sums);
  }
};

// ---- kernel ----

template <int kBits, class T, bool kShort>
__global__ void __launch_bounds__(kThreads, kResident<kBits>) spqr_linear_kernel(const SpqrLinearParams p) {
  uint8_t* shared = shared_memory();
  float* partial = reinterpret_cast<float*>(shared + kNumberBytes<kBits>);                        // [kWarps][32][4]
  float* sparse = reinterpret_cast<float*>(shared + kNumberBytes<kBits> + kPartialBytes);         // [16][8]
  // Neighbouring thread blocks read the same weights for other tokens: the second finds them in L2.
  const int64_t tile = blockIdx.x / p.token_tiles, first_token = static_cast<int64_t>(blockIdx.x % p.token_tiles) * kTokens;
  const int64_t first_row = tile * kTileRows;

  SpqrWarp<kBits, T, kShort> mine(p, shared, tile, first_token);
  mine.run([&] {
    if (p.weight.outliers) multiply_outliers<T>(p, first_row, first_token, sparse);
  });
  *reinterpret_cast<float4*>(partial + 4 * threadIdx.x) = make_float4(mine.sums[0], mine.sums[1], mine.sums[2], mine.sums[3]);
  sync_block();

  if (threadIdx.x >= kTileRows * kTokens) return;
  const int row = threadIdx.x % kTileRows, token = threadIdx.x / kTileRows;
  const int64_t n = first_row + row, m = first_token + token;
  if (n >= p.weight.out_features || m >= p.tokens) return;
  const float* from = partial + (row % 8 * 4 + token / 2) * 4 + row / 8 * 2 + token % 2;
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += from[w * 32 * 4];
  if (p.weight.outliers) sum += sparse[row * kTokens + token];
  if (p.bias) sum += load_float(p.bias, n, p.bias_dtype);
  store(static_cast<uint16_t*>(p.y) + m * p.weight.out_features + n, from_float(T{}, sum));
}

// ---- launcher ----

template <int kBits, class T>
const char* launch_dtype(const SpqrLinearParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows;
  const unsigned blocks = static_cast<unsigned>(tiles * p.token_tiles);
  const auto kernel = p.step_columns == kHalfColumns ? spqr_linear_kernel<kBits, T, true> : spqr_linear_kernel<kBits, T, false>;
  return launch(kernel, blocks, kThreads, kNumberBytes<kBits> + kPartialBytes + kOutlierBytes, stream, p);
}

template <int kBits>
const char* launch_spqr_linear_of(const SpqrLinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<kBits, BFloat16>(p, stream) : launch_dtype<kBits, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
