// Products whose work is one row of chunks, a tile of outputs after the other: each cluster of thread blocks has a range of it (RangePlan), which may
// begin and end in the midst of a tile. So few tiles leave no multiprocessors idle: 4096 x 14336 with 256 tokens has 56 of 256 rows, and 66 pairs of
// blocks run at a time on an H200. (Clusters of more blocks, which could share columns, find less room still: 17 of six, 15 of eight.)
//
// What a range has of one tile is a segment. One without the tile's first chunk writes its sums to global memory. The range with the first chunk
// reads those of all others, in an order that is always the same, and so are results, and stores outputs.
//
// It waits for them, by flags, which need no zeros before: a flag is a number that no other launch has (tag_of, wgmma.cu), and is taken away by who
// has waited for it, since a graph gives the same number again.
//
// This must not be forever. Blocks are started in the order of their indices, so that one with a lower index runs or has ended,
// whatever else runs on the GPU; and a warp that waits for another block has done before all that its own block needs to write its sums, those of its
// first segment. So a block may wait for lower indices. The later chunks of a tile are at the beginning of their ranges, and its first ones at the
// end of theirs: those that are waited for have the next ranges. Hence ranges are counted from the last cluster on.
#pragma once

#include "wgmma_block.h"

namespace hfq {
namespace {

// What a range has of one tile.
struct WgmmaSegment {
  uint32_t all;            // chunks of a tile
  uint32_t tile;           // of a cluster's rows and tokens; those of the same rows are neighbours
  uint32_t chunk, chunks;  // the first one, and how many; 0: the range is over
  uint32_t left;           // of the range, behind these

  __device__ __forceinline__ void next() {
    ++tile, chunk = 0;
    take();
  }
  __device__ __forceinline__ void take() {
    chunks = left < all - chunk ? left : all - chunk;
    left -= chunks;
  }

  __device__ __forceinline__ uint32_t row_tile(const WgmmaParams& p) const { return quotient(tile, p.token_tiles, p.of_token_tiles); }
  __device__ __forceinline__ uint32_t token_tile(const WgmmaParams& p) const { return tile - row_tile(p) * p.token_tiles; }
  // Of the rows of a block.
  template <class Block>
  __device__ __forceinline__ uint32_t first_tile(const WgmmaParams& p, const Block& block) const {
    return (row_tile(p) * Block::kNeighbours + block.neighbour()) * Block::kTiles;
  }
};

// By whole warps. The compiler knows then that it is the same for all lanes, and so are turns and counts of chunks, which need no registers of each:
// 32 instructions a chunk less.
__device__ __forceinline__ WgmmaSegment first_segment(const WgmmaParams& p, uint32_t range) {
  const uint32_t begin = p.cut.first_chunk(range), end = p.cut.first_chunk(range + 1);
  WgmmaSegment s = {};
  s.all = p.cut.tile_chunks();
  s.tile = shuffle_from(p.cut.tile_of(begin), 0);
  s.chunk = shuffle_from(begin - s.tile * s.all, 0);
  s.left = shuffle_from(end - begin, 0);
  s.take();
  return s;
}

// ---- the end of a segment: sums of a warp, as they stand in registers
//
// `Block`: range(p), its own; kNeighbours of a cluster and neighbour(), which one it is; kConsumers, warps that have sums; kSums of a thread; a
// barrier, written(), of those warps. (The thread is read again where it is needed, for want of a register in wgmma_pair.h.)

// Each thread's partial sums are read by the same thread of the range that adds them.
template <class Block>
struct WgmmaPartials {
  static constexpr int kThreads = 32 * Block::kConsumers, kOfBlock = Block::kSums / 4 * kThreads;  // of kOfBlock four numbers

  static __device__ __forceinline__ uint64_t* flag(const WgmmaParams& p, const Block& block, uint32_t range) {
    return p.flags + range * Block::kNeighbours + block.neighbour();
  }
  static __device__ __forceinline__ float4* of_block(const WgmmaParams& p, const Block& block, uint32_t range) {
    return reinterpret_cast<float4*>(p.partials) + int64_t{range * Block::kNeighbours + block.neighbour()} * kOfBlock;
  }
};

// By a warp that has nothing else to do: raising a flag waits until what was written has come to L2. (Only the first segment of a range can be one
// that begins in the midst of a tile.)
template <class Block>
__device__ __forceinline__ void raise_flag_of_range(const WgmmaParams& p, const Block& block) {
  if (block.first.chunk == 0) return;
  wait_for_previous_kernel();  // which may have something else there
  mbarrier_wait(block.written(), 0);
  if (threadIdx.x % 32 == 0) raise_flag(WgmmaPartials<Block>::flag(p, block, block.range(p)), p.tag);
}

template <class Block>
__device__ __forceinline__ void write_partial(const WgmmaParams& p, const Block& block, const float (&sums)[Block::kSums]) {
  using Partials = WgmmaPartials<Block>;
  float4* const to = Partials::of_block(p, block, block.range(p)) + kept(threadIdx.x);
#pragma unroll
  for (int i = 0; i < Block::kSums; i += 4) store(to + i / 4 * Partials::kThreads, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
  sync_warp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(block.written());
}

// How many of the next ranges have chunks of a segment's tile. (The same for all lanes, as the compiler then knows.)
template <class Block>
__device__ __forceinline__ uint32_t others_of(const WgmmaParams& p, const Block& block, const WgmmaSegment& segment) {
  return segment.chunks < segment.all ? shuffle_from(p.cut.last_range(segment.tile) - block.range(p), 0) : 0;
}

// The same of a range's last segment, the only one that may begin a tile and not end it.
template <class Block>
__device__ __forceinline__ uint32_t others_of_last(const WgmmaParams& p, const Block& block) {
  WgmmaSegment last = block.first;
  while (last.left) last.next();
  return last.chunk == 0 ? others_of(p, block, last) : 0;
}

// Until those from the `from`-th on have written their sums, by one warp of the block. Lanes wait for a range each: one after the other, each would
// take as long as memory does.
template <class Block>
__device__ __forceinline__ void wait_for_partials(const WgmmaParams& p, const Block& block, uint32_t from, uint32_t others) {
#pragma unroll 1
  for (; from < others; from += 32) {  // (once: more than 32 take more than 100 000 columns)
    const uint32_t other = from + threadIdx.x % 32;
    uint64_t* const flag = WgmmaPartials<Block>::flag(p, block, block.range(p) + 1 + (other < others ? other : others - 1));
    wait_for_flag(flag, p.tag);
    sync_warp();  // several may wait for the last one
    if (other < others) lower_flag(flag);
  }
  sync_warp();
}

// To sums those of the `other`-th of the next ranges, from 0 on, once this thread knows that they are written. (With all of them on the way at once.)
template <class Block>
__device__ __forceinline__ void add_partial(const WgmmaParams& p, const Block& block, uint32_t other, float (&sums)[Block::kSums]) {
  using Partials = WgmmaPartials<Block>;
  const float4* const from = Partials::of_block(p, block, block.range(p) + 1 + other) + kept(threadIdx.x);
  float4 parts[Block::kSums / 4];
#pragma unroll
  for (int i = 0; i < Block::kSums / 4; ++i) parts[i] = load_written(from + i * Partials::kThreads);
#pragma unroll
  for (int i = 0; i < Block::kSums / 4; ++i) {
    float* const d = sums + 4 * i;
    d[0] += parts[i].x, d[1] += parts[i].y, d[2] += parts[i].z, d[3] += parts[i].w;
  }
}

// Outputs, from registers, since the rings are in use: 16 rows from `row` on, and tokens from `first` on.
//
// Lane 4g + t has rows g and g + 8, of tokens 2t and 2t + 1 of eight. It gives one of the tokens to lane 4 (g ^ 1) + t for that one's other rows, and
// then one half of the rows to lane 4 (g ^ 2) + t:
//
//   rows g & ~1, g | 1, and those + 8, of token 2t + g % 2
//   rows r .. r + 3 of that token, r = 8 (g / 2 % 2) + 4 (g / 4)
//
// which are 8 bytes of each lane, and 32 of each token.
template <class T, class Block>
__device__ __forceinline__ void store_segment(const WgmmaParams& p, int lane, int64_t first_row, int64_t first_token,
                                              const float (&sums)[Block::kSums]) {
  const int64_t rows = p.weight.out_features, row = first_row + lane / 4;
  const float low = p.bias && row < rows ? load_float(p.bias, row, p.bias_dtype) : 0.0f;
  const float high = p.bias && row + 8 < rows ? load_float(p.bias, row + 8, p.bias_dtype) : 0.0f;
  const bool odd = lane & 4, upper = lane & 8;
  // Of `own` and what came for it, the lower row first: the halves with the rows that are kept, and with the others.
  const uint32_t lower_rows = odd ? 0x1054 : 0x5410, upper_rows = odd ? 0x3276 : 0x7632;
  const uint32_t kept_rows = upper ? upper_rows : lower_rows, given_rows = upper ? lower_rows : upper_rows;
  const int64_t n = row - lane / 4 + (upper ? 8 : 0) + lane / 16 * 4;
  const int64_t token = first_token + 2 * (lane % 4) + (odd ? 1 : 0);
  const int left = static_cast<int>(p.tokens - token < Block::kTokens ? p.tokens - token : Block::kTokens);
  const int exist = static_cast<int>(rows - n < 4 ? rows - n : 4);
  const auto each = [&](const auto& store_four) {
    uint16_t* y = static_cast<uint16_t*>(p.y) + token * rows + n;
#pragma unroll
    for (int i = 0; i < Block::kSums / 4; ++i, y += 8 * rows) {
      const float* const d = sums + 4 * i;
      const uint32_t first = from_floats(T{}, d[0] + low, d[2] + high), second = from_floats(T{}, d[1] + low, d[3] + high);
      const uint32_t own = odd ? second : first, others = shuffle_xor(odd ? first : second, 4);
      const uint32_t keeps = permute_bytes(own, others, kept_rows), came = shuffle_xor(permute_bytes(own, others, given_rows), 8);
      if (8 * i < left) store_four(y, upper ? uint2{came, keeps} : uint2{keeps, came});
    }
  };
  // Instructions that run once have to come from memory: those of the usual case stand together.
  if (rows % 4 == 0) {
    each([&](uint16_t* y, const uint2& four) {
      if (exist > 0) store(reinterpret_cast<uint2*>(y), four);
    });
  } else {
    each([&](uint16_t* y, const uint2& four) {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < exist) store(y + i, static_cast<uint16_t>((i < 2 ? four.x : four.y) >> 16 * (i % 2)));
    });
  }
}

// All of it, for a warp whose rows begin with this tile of the block's. `add`: to the sums those of so many other ranges.
template <class T, class Block, class Add>
__device__ __forceinline__ void end_segment(const WgmmaParams& p, const Block& block, const WgmmaSegment& segment, int lane, int tile,
                                            float (&sums)[Block::kSums], const Add& add) {
  if (segment.chunk > 0) {
    write_partial(p, block, sums);
    return;
  }
  if (segment.chunks < segment.all) add(others_of(p, block, segment));
  const int64_t row = (static_cast<int64_t>(segment.first_tile(p, block)) + tile) * kTileRows;
  store_segment<T, Block>(p, lane, row, static_cast<int64_t>(segment.token_tile(p)) * Block::kTokens, sums);
}

}  // namespace
}  // namespace hfq
