// Codes as they are stored to those of layout "fragments": a thread gathers the codes of one 32-bit word.
#include "fragments.h"
#include "packing.h"

namespace hfq {
namespace {

constexpr int kThreads = 256;

// ---- primitives ----

// 0 behind the weight.
template <int kBits>
__device__ __forceinline__ uint32_t code_of(const ToFragmentsParams& p, int64_t row, int64_t column) {
  if (row >= p.rows || column >= p.columns) return 0;
  const int64_t bit = column * kBits;
  const int shift = static_cast<int>(bit % 8);
  const uint8_t* const from = p.qweight + row * p.row_bytes + bit / 8;
  uint32_t codes = load(from);
  if constexpr (8 % kBits != 0)
    if (shift + kBits > 8) codes |= static_cast<uint32_t>(load(from + 1)) << 8;
  return codes >> shift & ((1u << kBits) - 1);
}

// The place of a lane's codes in its block (fragments.h).
template <int kBits, bool kHalves>
struct Lane {
  const ToFragmentsParams& p;
  int64_t row, column;  // of the tile's row g; of the block
  int t;

  // Code e of register r.
  __device__ __forceinline__ uint32_t code(int r, int e) const {
    const int unit = r / 8, j = r / 4 % 2, h = r / 2 % 2, q = r % 2;
    const int at = kUnitColumns * unit + (kHalves ? 16 * j + 4 * t : 8 * t + 4 * j) + 2 * q + e;
    return code_of<kBits>(p, row + 8 * h, column + at);
  }
  __device__ __forceinline__ uint32_t word(int w) const {
    constexpr int kFields = kBits == 3 ? 5 : 16 / kBits;
    uint32_t word = 0;
#pragma unroll
    for (int field = 0; field < kFields; ++field)
#pragma unroll
      for (int e = 0; e < 2; ++e) word |= code(kFields * w + field, e) << (kBits == 8 ? 16 * field + 8 * e : kBits * field + 16 * e);
    if constexpr (kBits == 3)
#pragma unroll
      for (int e = 0; e < 2; ++e) word |= (code(30 + w / 3, e) >> (w % 3) & 1u) << (15 + 16 * e);
    return word;
  }
};

// ---- kernel ----

template <int kBits, bool kHalves>
__global__ void __launch_bounds__(kThreads) to_fragments_kernel(const ToFragmentsParams p) {
  constexpr int kWords = kBlockBytes<kBits> / 4;
  const int64_t blocks = (p.columns + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>, tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= tiles * blocks * kWords) return;
  const int word = static_cast<int>(at % kWords);
  // Of 3 bits the last two words of all lanes lie behind the first four of all.
  const bool upper = word >= 128;
  const int lane = upper ? (word - 128) / 2 : word / 4, w = upper ? 4 + word % 2 : word % 4;
  const int64_t block = at / kWords % blocks, tile = at / kWords / blocks;
  const Lane<kBits, kHalves> place = {p, tile * kTileRows + lane / 4, block * kBlockColumns<kBits>, lane % 4};
  store(reinterpret_cast<uint32_t*>(p.tiles) + at, place.word(w));
}

// ---- launcher ----

template <int kBits>
const char* launch_bits(const ToFragmentsParams& p, cudaStream_t stream) {
  const int64_t blocks = (p.columns + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>, tiles = (p.rows + kTileRows - 1) / kTileRows;
  const int64_t words = tiles * blocks * (kBlockBytes<kBits> / 4);
  if (words == 0) return nullptr;
  const auto kernel = p.halves ? to_fragments_kernel<kBits, true> : to_fragments_kernel<kBits, false>;
  return launch(kernel, static_cast<unsigned>((words + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

}  // namespace

const char* launch_to_fragments(const ToFragmentsParams& p, cudaStream_t stream) {
  if (p.bits == 2) return launch_bits<2>(p, stream);
  if (p.bits == 3) return launch_bits<3>(p, stream);
  return p.bits == 4 ? launch_bits<4>(p, stream) : launch_bits<8>(p, stream);
}

}  // namespace hfq
