// A thread computes 8 neighbouring weights of a row, which one lane of the layout has: of a matrix instruction's operands it takes one row.
// The kernel is bound by the writes (2 or 4 bytes per weight against at most 1 read), which are 16 bytes of each thread, side by side.
#include "fragments.h"
#include "unpack.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 8;                     // of a thread
constexpr int kChunk = 32 * kColumns;           // columns of a thread block; its 8 warps take rows w and w + 8 of a tile

// ---- primitives ----

// The codes of row 8 half + g in one unit, in pairs: pair i has the codes of columns 8t + 2i and 8t + 2i + 1, in the lower and upper half.
template <int kBits>
__device__ __forceinline__ void load_codes(const uint8_t* block, int unit, int lane, int half, uint32_t (&pairs)[4]) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(block) + 4 * lane;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = 8 * unit + 4 * (i / 2) + 2 * half + i % 2;  // register; see fragments.h
    if constexpr (kBits == 8) {
      const uint32_t bytes = load(words + r / 2) >> (16 * (r % 2));
      pairs[i] = (bytes & 0xffu) | (bytes & 0xff00u) << 8;
    } else if constexpr (kBits == 3) {
      const auto word = [&](int w) { return load(w < 4 ? words + w : reinterpret_cast<const uint32_t*>(block + 512) + 2 * lane + w - 4); };
      if (r < 30) {
        pairs[i] = (word(r / 5) >> (3 * (r % 5))) & 0x00070007u;
      } else {
        pairs[i] = 0;
        for (int bit = 0; bit < 3; ++bit) pairs[i] |= ((word(3 * (r - 30) + bit) >> 15) & 0x00010001u) << bit;
      }
    } else {
      constexpr int kFields = 16 / kBits;
      pairs[i] = (load(words + r / kFields) >> (kBits * (r % kFields))) & (0x00010001u * ((1u << kBits) - 1));
    }
  }
}

// 8 neighbouring numbers to a row whose addresses are multiples of 16 bytes.
__device__ __forceinline__ void store_numbers(float* y, const float (&v)[kColumns]) {
  store(reinterpret_cast<float4*>(y), make_float4(v[0], v[1], v[2], v[3]));
  store(reinterpret_cast<float4*>(y) + 1, make_float4(v[4], v[5], v[6], v[7]));
}
template <class T>
__device__ __forceinline__ void store_halves(uint16_t* y, const float (&v)[kColumns]) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = static_cast<uint32_t>(from_float(T{}, v[2 * i + 1])) << 16 | from_float(T{}, v[2 * i]);
  store(reinterpret_cast<uint4*>(y), make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
}

// ---- kernel ----

template <int kBits, bool kE4m3>
__global__ void __launch_bounds__(kThreads) unpack_kernel(const UnpackParams p) {
  const Weight& w = p.weight;
  const uint32_t chunks = static_cast<uint32_t>((w.in_features + kChunk - 1) / kChunk);
  const int64_t first_row = static_cast<int64_t>(blockIdx.x / chunks) * kTileRows;
  const int64_t column = static_cast<int64_t>(blockIdx.x % chunks) * kChunk + threadIdx.x % 32 * kColumns;
  if (column >= w.in_features) return;
  const int64_t blocks = (w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>, block = column / kBlockColumns<kBits>;
  const int unit = static_cast<int>(column / kUnitColumns % Codes<kBits>::kUnits), t = static_cast<int>(column / kColumns % 4);
  const int64_t group = w.groups == 1 ? 0 : static_cast<uint32_t>(column) / static_cast<uint32_t>(w.group_size);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t at = first_row + threadIdx.x / 32 + 8 * half;
    if (at >= p.rows) return;
    const int64_t row = p.index ? load(p.index + at) : at;
    float v[kColumns];
    if (row < 0 || row >= w.out_features) {
      // Not to become a wild read.
#pragma unroll
      for (int i = 0; i < kColumns; ++i) v[i] = as_float(0x7fc00000u);
    } else {
      const int64_t tile = row / kTileRows, pair = 2 * ((tile * w.groups + group) * 8 + row % 8) + row / 8 % 2;
      uint32_t codes[4];
      load_codes<kBits>(w.qweight + (tile * blocks + block) * kBlockBytes<kBits>, unit, static_cast<int>(row % 8 * 4 + t), row / 8 % 2, codes);
      const float scale = load_float(w.scales, pair, w.scale_dtype);
      const float zero = w.zeros ? load_float(w.zeros, pair, w.scale_dtype) : static_cast<float>(1 << (kBits - 1));
#pragma unroll
      for (int i = 0; i < kColumns; ++i) {
        const uint32_t code = (codes[i / 2] >> (16 * (i % 2))) & 0xffffu;
        if constexpr (kE4m3)
          v[i] = to_float(Float16{}, static_cast<uint16_t>(e4m3_numbers(Float16{}, code << 8))) * scale;
        else
          v[i] = (w.codebook ? load(w.codebook + code) : static_cast<float>(code) - zero) * scale;
      }
    }
    const int64_t to = at * w.in_features + column;
    if (p.y_dtype == kFloat32)
      store_numbers(static_cast<float*>(p.y) + to, v);
    else if (p.y_dtype == kFloat16)
      store_halves<Float16>(static_cast<uint16_t*>(p.y) + to, v);
    else
      store_halves<BFloat16>(static_cast<uint16_t*>(p.y) + to, v);
  }
}

// ---- launcher ----

template <int kBits, bool kE4m3 = false>
const char* launch_bits(const UnpackParams& p, cudaStream_t stream) {
  const int64_t chunks = (p.weight.in_features + kChunk - 1) / kChunk, tiles = (p.rows + kTileRows - 1) / kTileRows;
  return launch(unpack_kernel<kBits, kE4m3>, static_cast<unsigned>(chunks * tiles), kThreads, 0, stream, p);
}

}  // namespace

const char* launch_unpack(const UnpackParams& p, cudaStream_t stream) {
  if (p.rows == 0) return nullptr;
  if (p.weight.bits == 2) return launch_bits<2>(p, stream);
  if (p.weight.bits == 3) return launch_bits<3>(p, stream);
  if (p.weight.bits == 4) return launch_bits<4>(p, stream);
  return p.weight.codebook ? launch_bits<8, true>(p, stream) : launch_bits<8>(p, stream);
}

}  // namespace hfq
