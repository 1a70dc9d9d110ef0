// What thread blocks with wgmma share.
//
// wgmma.m64nNk16 takes its first operand from registers: warp w of four holds rows 16 w .. 16 w + 15, in just the fragments of mma.m16n8k16.
// So four tiles of the layout are its 64 rows as they are, and codes become numbers in registers. The second operand, x, is read by the
// hardware from shared memory, [tokens][k] in rows of 128 bytes, swizzled. There x must stand in the order in which the layout has its columns:
//
//   columns 8t + 4j + {0, 1} of a unit are k = 2t, 2t + 1 of instruction j, columns 8t + 4j + {2, 3} are k = 2t + 8, 2t + 9
//   so word 4t + 2j + h of a unit of x (two columns each) goes to word 4 (2j + h) + t, in 16-byte piece 2j + h
//   and piece p of the row of token m stands in place p ^ m % 8: that is the swizzle of 128 bytes
//
// Four warps fill rings of stages, which have chunks of 128 columns, while the others multiply.
#pragma once

#include "fragments.h"
#include "wgmma.h"

namespace hfq {
namespace {

// How stages are filled, and which rows a block has: wgmma_staged.h, 256 rows or 128; the same with wgmma_shared.h; wgmma_pair.h.
enum class WgmmaWay { kStaged, kStagedHalf, kShared, kSharedHalf, kPair };

// x in a stage at this shared address as wgmma reads it, for its first unit. Rows of 128 bytes (swizzle 1 in bits 62, 63), 8 of them 1024 bytes from
// the next 8 (in 16 bytes, bits 32 to 45).
__device__ __forceinline__ uint64_t x_descriptor(uint32_t stage) {
  return uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | uint64_t{1} << 16 | (stage & 0x3ffff) / 16;
}

// A stage after the other, and in which round of the ring.
template <int kStages>
struct Turn {
  uint32_t at = 0, round = 0;
  __device__ __forceinline__ void next() {
    if (++at == kStages) at = 0, ++round;
  }
};

// The same for all lanes, as the compiler then knows: what depends on it is not divergent.
__device__ __forceinline__ int own_warp() { return shuffle_from(threadIdx.x / 32, 0); }

__device__ __forceinline__ uint32_t group_of(const WgmmaParams& p, uint32_t unit) {
  const uint32_t group = multiply_high(2 * unit, p.group_magic), last = static_cast<uint32_t>(p.weight.groups) - 1;
  return group < last ? group : last;  // of units behind K
}
// Where a stage that begins with a unit has the scales of unit `u` behind it, from those of the first one on.
__device__ __forceinline__ uint32_t scales_of(const WgmmaParams& p, uint32_t unit, int u) {
  return u ? (group_of(p, unit + u) - group_of(p, unit)) * 8 * pair_bytes(p.weight.scale_dtype) : 0;
}

}  // namespace
}  // namespace hfq
