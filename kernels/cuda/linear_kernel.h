// The kernel of cuda_linear for few tokens, for one kind of codes in each file that includes this.
//
// A thread block takes one or two tiles of 16 rows and up to 8 tokens; its 8 warps take every eighth block of columns. Codes go from global
// memory straight to registers, several loads ahead; activations come through L1, two blocks ahead. Partial sums of the warps meet in
// shared memory and are added in a fixed order.
//
// Bytes and instructions: per clock a multiprocessor gets some 14 bytes of weights from memory on an H100 (3.35 TB/s, 132 of them at
// 1.75 GHz), 20 on an H200, and issues 4 instructions. A warp's 512 bytes of 4-bit codes thus have 140 (100) issue slots, and take about
// 95 instructions: 44 for codes, 4 mma, 4 loads, the rest for scales, addresses and bounds. With 8 tokens, activations are twice the bytes of one
// tile of 4-bit codes, from L2; hence two tiles for one read of them where there are enough tiles for all multiprocessors.
#pragma once

#include "fragments.h"
#include "linear.h"

namespace hfq {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

// Blocks that a warp has on the way. 16 warps of a multiprocessor then have 24 to 32 KB, which is what 20 bytes per clock need over a
// latency of some 1000 clocks; more would cost the registers of other warps.
template <int kBits, int kTiles>
constexpr int kAhead = kBits < 4 || kTiles == 2 ? 2 : 4;

// And blocks of activations: L2 answers later than a warp comes back to its next block. (Two tiles of 3 bits have no registers left.)
template <int kBits, int kTiles>
constexpr int kActivationsAhead = kBits == 3 && kTiles == 2 ? 1 : 2;

// What a warp loads of one block of columns beside activations.
template <class Kind, bool kZeros, int kTiles>
struct Stage {
  Kind codes[kTiles];
  RawPair scales[kTiles][Kind::kUnits];
  RawPair zeros[kTiles][kZeros ? Kind::kUnits : 1];
};

template <class Kind, class T, bool kZeros, int kTiles>
struct LinearWarp {
  static constexpr int kUnits = Kind::kUnits;
  static constexpr int kBits = Kind::kWords == 6 ? 3 : 128 / (kUnits * 16);  // 128 bits of a lane for 16 codes of each unit
  static constexpr int kBytes = kBlockBytes<kBits>;

  const LinearParams& p;
  const uint8_t* table;
  int lane;
  uint32_t blocks;                 // of columns
  bool whole;                      // no group ends inside of a block
  const uint8_t* qweight[kTiles];  // the lane's first words of block 0
  const uint8_t* scales[kTiles];   // the lane's pair of group 0
  const uint8_t* zeros[kTiles];
  uint32_t group_bytes;            // from one group's pairs to the next
  const uint8_t* x;                // the lane's first activations
  uint32_t columns;                // columns from there to the end of the row; 0 if the lane's token does not exist
  float sums[kTiles][4] = {};

  __device__ __forceinline__ LinearWarp(const LinearParams& params, uint8_t* shared, int64_t first_tile, int64_t first_token)
      : p(params), table(shared), lane(threadIdx.x % 32) {
    const Weight& w = p.weight;
    const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows, token = first_token + lane / 4;
    blocks = kept(static_cast<uint32_t>((w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>));
    whole = w.groups == 1 || w.group_size % kBlockColumns<kBits> == 0;
    group_bytes = 8 * pair_bytes(w.scale_dtype);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      // An odd number of tiles: the last one is computed twice and stored once.
      const int64_t tile = first_tile + i < tiles ? first_tile + i : tiles - 1;
      const int64_t pair = tile * w.groups * group_bytes + lane / 4 * pair_bytes(w.scale_dtype);
      qweight[i] = kept(w.qweight + tile * blocks * kBytes + 16 * lane);
      scales[i] = kept(static_cast<const uint8_t*>(w.scales) + pair);
      if constexpr (kZeros) zeros[i] = kept(static_cast<const uint8_t*>(w.zeros) + pair);
    }
    const uint32_t first = 8 * (lane % 4), in_features = static_cast<uint32_t>(w.in_features);
    const bool present = token < p.tokens;
    columns = kept(present && first < in_features ? in_features - first : 0);
    x = kept(static_cast<const uint8_t*>(p.x) + ((present ? token : 0) * w.in_features + first) * 2);
  }

  __device__ __forceinline__ void load(Stage<Kind, kZeros, kTiles>& stage, uint32_t block) const {
    if (block >= blocks) return;
    const Weight& w = p.weight;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) stage.codes[i].load(qweight[i] + block * kBytes, lane);
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      if (whole && u + 1 < kUnits) continue;
      const uint32_t unit = block * kUnits + u, last = static_cast<uint32_t>(w.groups) - 1;
      uint32_t group = multiply_high(2 * unit, p.group_magic);
      group = group < last ? group : last;  // units behind K
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        stage.scales[i][u] = load_pair(scales[i] + group * group_bytes, w.scale_dtype);
        if constexpr (kZeros) stage.zeros[i][u] = load_pair(zeros[i] + group * group_bytes, w.scale_dtype);
      }
    }
  }

  __device__ __forceinline__ void load(uint4& activations, uint32_t unit) const {
    const uint32_t column = unit * kUnitColumns;
    activations = make_uint4(0, 0, 0, 0);
    if (column < columns) activations = hfq::load(reinterpret_cast<const uint4*>(x + 2 * column));
  }

  // Units u and later of a block. Activations make room for those of a later block, `next`, as they are used up.
  template <int u>
  __device__ __forceinline__ void multiply(const Stage<Kind, kZeros, kTiles>& stage, uint4 (&activations)[kUnits], uint32_t next,
                                           float (&products)[kTiles][4], float (&x_sums)[4]) {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    constexpr float kMiddle = 1 << (kBits - 1);
    uint32_t b[2][2];
    Kind::activations(activations[u], b);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      uint32_t a[2][4];
      stage.codes[i].template unit<T, u>(table, a);
      mma(T{}, products[i], a[0], b[0][0], b[0][1]);
      mma(T{}, products[i], a[1], b[1][0], b[1][1]);
    }
    if constexpr (kZeros) {
      mma(T{}, x_sums, ones, b[0][0], b[0][1]);
      mma(T{}, x_sums, ones, b[1][0], b[1][1]);
    }
    load(activations[u], next * kUnits + u);
    if (!whole || u + 1 == kUnits) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        const Pair scale = to_floats(stage.scales[i][u], p.weight.scale_dtype);
        if constexpr (kZeros) {
          // Products are with code - middle: what lacks is middle - zero for each activation.
          const Pair zero = to_floats(stage.zeros[i][u], p.weight.scale_dtype);
          products[i][0] += (kMiddle - zero.low) * x_sums[0];
          products[i][1] += (kMiddle - zero.low) * x_sums[1];
          products[i][2] += (kMiddle - zero.high) * x_sums[2];
          products[i][3] += (kMiddle - zero.high) * x_sums[3];
        }
        sums[i][0] += scale.low * products[i][0];
        sums[i][1] += scale.low * products[i][1];
        sums[i][2] += scale.high * products[i][2];
        sums[i][3] += scale.high * products[i][3];
#pragma unroll
        for (int c = 0; c < 4; ++c) products[i][c] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) x_sums[c] = 0.0f;
    }
    if constexpr (u + 1 < kUnits) multiply<u + 1>(stage, activations, next, products, x_sums);
  }

  // All blocks of one warp. `fill`: what is to be done once while the first loads are on their way.
  template <class Fill>
  __device__ __forceinline__ void run(const Fill& fill) {
    constexpr int kStages = kAhead<kBits, kTiles>, kEarly = kActivationsAhead<kBits, kTiles>;
    const uint32_t warp = threadIdx.x / 32;
    Stage<Kind, kZeros, kTiles> stages[kStages];
    uint4 activations[kEarly][kUnits];
#pragma unroll
    for (int s = 0; s < kStages; ++s) load(stages[s], warp + s * kWarps);
#pragma unroll
    for (int a = 0; a < kEarly; ++a)
#pragma unroll
      for (int u = 0; u < kUnits; ++u) load(activations[a][u], (warp + a * kWarps) * kUnits + u);
    fill();
    for (uint32_t first = warp; first < blocks; first += kStages * kWarps) {
#pragma unroll
      for (int s = 0; s < kStages; ++s) {
        const uint32_t block = first + s * kWarps;
        if (block < blocks) {
          float products[kTiles][4] = {}, x_sums[4] = {};
          multiply<0>(stages[s], activations[s % kEarly], block + kEarly * kWarps, products, x_sums);
          load(stages[s], block + kStages * kWarps);
        }
      }
    }
  }
};

// What a thread block computes: kTiles tiles of rows for up to 8 tokens.
template <class Kind, class T, bool kZeros, int kTiles>
__device__ __forceinline__ void linear_block(const LinearParams& p, int64_t first_tile, int64_t first_token) {
  constexpr int kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0;
  uint8_t* shared = shared_memory();
  float* partial = reinterpret_cast<float*>(shared + kTableBytes);  // [kWarps][kTiles][32][4]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  LinearWarp<Kind, T, kZeros, kTiles> mine(p, shared, first_tile, first_token);
  mine.run([&] {
    if constexpr (Kind::kTable) {
      TableCodes::fill<T>(shared, p.weight.codebook);
      sync_block();
    }
  });

#pragma unroll
  for (int i = 0; i < kTiles; ++i)
    *reinterpret_cast<float4*>(partial + ((warp * kTiles + i) * 32 + lane) * 4) =
        make_float4(mine.sums[i][0], mine.sums[i][1], mine.sums[i][2], mine.sums[i][3]);
  sync_block();

  for (int i = threadIdx.x; i < kTiles * kTileRows * 8; i += kThreads) {
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

template <class Kind, class T, bool kZeros, int kTiles>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const LinearParams p) {
  // Neighbouring thread blocks read the same weights for other tokens: the second finds them in L2.
  const int64_t first_tile = static_cast<int64_t>(blockIdx.x / p.token_tiles) * kTiles, first_token = blockIdx.x % p.token_tiles * 8;
  linear_block<Kind, T, kZeros, kTiles>(p, first_tile, first_token);
}

// ---- launcher ----

// Bytes of shared memory of a thread block.
template <class Kind, int kTiles>
constexpr size_t kLinearShared = (Kind::kTable ? TableCodes::kTableBytes : 0) + kWarps * kTiles * 32 * 4 * sizeof(float);

template <class Kind, class T, bool kZeros, int kTiles>
const char* launch_tiles(const LinearParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows;
  const unsigned blocks = static_cast<unsigned>((tiles + kTiles - 1) / kTiles * p.token_tiles);
  return launch(linear_kernel<Kind, T, kZeros, kTiles>, blocks, kThreads, kLinearShared<Kind, kTiles>, stream, p);
}

template <class Kind, class T, bool kZeros>
const char* launch_zeros(const LinearParams& p, cudaStream_t stream) {
  // Two tiles share activations, and take fewer instructions for each: measured on an H100 (4096 x 14336, one token) 17 instead of 20 us, with
  // 3 bits 15 and 18. 8-bit codes are read at full speed with one tile; two are 33 us instead of 28.
  // Two tiles of zero points for each unit of a large block leave too few registers.
  if constexpr (!kZeros || Kind::kUnits < 4) {
    const bool enough_tiles = p.weight.out_features >= int64_t{4} * kTileRows * multiprocessors();
    if ((Kind::kUnits > 1 || p.tokens > 2) && enough_tiles) return launch_tiles<Kind, T, kZeros, 2>(p, stream);
  }
  return launch_tiles<Kind, T, kZeros, 1>(p, stream);
}

template <class Kind, class T>
const char* launch_dtype(const LinearParams& p, cudaStream_t stream) {
  if constexpr (!Kind::kTable)
    if (p.weight.zeros) return launch_zeros<Kind, T, true>(p, stream);
  return launch_zeros<Kind, T, false>(p, stream);
}

template <class Kind>
const char* launch_linear_of(const LinearParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_dtype<Kind, BFloat16>(p, stream) : launch_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
