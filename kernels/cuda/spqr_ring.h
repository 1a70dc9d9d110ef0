// How the operands of cuda_spqr_linear arrive: each warp has a ring of stages of its own in shared memory, into which all that a step of 128
// columns needs is copied steps ahead. A stage:
//
//   codes        [tiles, 512 | 768 | 1024]         as they are stored
//   activations  [tokens, 256]                     of several tokens with 32 bytes between them: 16 lanes then read 8 bytes each from all banks
//   scales       [tiles, parts, 8, 2 | 4]          codes of scales and zero points of the group of each part
//   and lines    [tiles, parts, 4] floats          of the same groups
//
// A part is what one scale multiplies, 16 columns if groups may end behind each matrix instruction, else 32. Groups of more columns are
// copied for each of their parts, from L1 or L2: that spares kernels for each size.
//
// Nothing goes from global memory to registers in the loop: ptxas gives all such loads one scoreboard, so that the wait for the oldest is one
// for the youngest (linear_kernel.h). Lanes copy what others read, hence one barrier of the warp for each step.
#pragma once

#include "fragments.h"
#include "spqr_scales.h"

namespace hfq {
namespace {

constexpr int kStepColumns = 128;
constexpr int kWarps = 8;

template <int kBits, bool kShort, int kTokens, int kTiles>
struct SpqrRing {
  static constexpr uint32_t kParts = kStepColumns / (kShort ? kHalfColumns : kUnitColumns);
  static constexpr uint32_t kBlocks = kStepColumns / kBlockColumns<kBits>, kBytes = kBlocks * kBlockBytes<kBits>;  // of a step of one tile
  static constexpr uint32_t kRowBytes = 2 * kStepColumns, kRowStride = kTokens == 1 ? kRowBytes : kRowBytes + 32;
  static constexpr uint32_t kXAt = kTiles * kBytes;

  const SpqrLinearParams& p;
  uint32_t lane, tokens;             // of the thread block
  uint32_t x_steps;                  // steps that have columns at the lane's place
  // What the lane copies, of step 0.
  const uint8_t* codes_from[kTiles];
  const uint8_t* x_from;
  StatCopies<kParts, kTiles> stats;
  uint32_t x_tokens;                 // tokens from the lane's first one on
  // Where that goes, from the beginning of a stage.
  uint32_t x_to, stats_to;
  uint32_t stats_at;                 // codes of scales of the first tile

  __device__ __forceinline__ SpqrRing(const SpqrLinearParams& params, int64_t first_tile, int64_t first_token)
      : p(params), stats(params.weight, threadIdx.x % 32, [&](int i) { return tile_of(params, first_tile, i); }) {
    const SpqrWeight& w = p.weight;
    const int64_t blocks = (w.in_features + kBlockColumns<kBits> - 1) / kBlockColumns<kBits>;
    const uint32_t in_features = static_cast<uint32_t>(w.in_features);
    lane = kept(threadIdx.x % 32);
    tokens = static_cast<uint32_t>(p.tokens - first_token < kTokens ? p.tokens - first_token : kTokens);
    const uint8_t* x = static_cast<const uint8_t*>(p.x) + first_token * w.in_features * 2;
    if constexpr (kTokens == 1) {
      x_from = kept(x + 8 * lane), x_to = kXAt + 8 * lane, x_steps = kept(steps_behind(in_features, 4 * lane));
    } else {
      const uint32_t token = lane / 16, at = 16 * (lane % 16);
      x_from = kept(x + token * w.in_features * 2 + at), x_to = kept(kXAt + token * kRowStride + at);
      x_steps = kept(steps_behind(in_features, at / 2));
      x_tokens = kept(tokens > token ? tokens - token : 0);
    }

    stats_at = kept(kXAt + p.stage_tokens * kRowStride);
    stats_to = kept(stats_at + stats.to);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) codes_from[i] = kept(w.qweight + tile_of(p, first_tile, i) * blocks * kBlockBytes<kBits> + 16 * lane);
  }

  // An odd number of tiles: the last one is computed twice and stored once.
  static __device__ __forceinline__ int64_t tile_of(const SpqrLinearParams& p, int64_t first_tile, int i) {
    const int64_t tiles = (p.weight.out_features + kTileRows - 1) / kTileRows;
    return first_tile + i < tiles ? first_tile + i : tiles - 1;
  }

  static __device__ __forceinline__ uint32_t steps_behind(uint32_t in_features, uint32_t first) {
    return in_features > first ? (in_features - first + kStepColumns - 1) / kStepColumns : 0;
  }

  // `stage`: in shared memory.
  __device__ __forceinline__ void copy(uint32_t stage, uint32_t step) const {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const uint8_t* from = codes_from[i] + static_cast<uint64_t>(step) * kBytes;
      const uint32_t to = stage + 16 * lane + i * kBytes;
      cp_async(to, from);
      if (kBits == 3 && lane < 16) cp_async(to + 512, from + 512);
      // Of two blocks the last step may have one. Columns behind K meet activations of zero: any codes will do.
      if constexpr (kBlocks == 2)
        cp_async_or_zero(to + 512, from + 512, step * kStepColumns + kStepColumns / 2 < static_cast<uint32_t>(p.weight.in_features));
    }
    // What is behind K counts as zero.
    const uint8_t* x = x_from + static_cast<uint64_t>(step) * kRowBytes;
    const bool exists = step < x_steps;
    if constexpr (kTokens == 1) {
      cp_async_or_zero<8>(stage + x_to, x, exists);
    } else {
#pragma unroll
      for (uint32_t m = 0; m < kTokens; m += 2)
        if (m < x_tokens) cp_async_or_zero(stage + x_to + m * kRowStride, x + m * static_cast<uint64_t>(p.row_bytes), exists);
    }
    stats.copy(stage + stats_to, step * kParts, p.group_magic, p.last_group, p.tile_stats);
  }

  // `multiply(stage)` for each step of the warp, one after the other. `fill`: what is to be done once while the first copies are on their way.
  template <class Fill, class Multiply>
  __device__ __forceinline__ void run(uint32_t first, const Fill& fill, const Multiply& multiply) const {
    const uint32_t warp = threadIdx.x / 32, ring = kTokens == 1 ? kept(first) : first;  // several tokens have no register left
    const uint32_t bytes = p.stage_bytes, end = kept(ring + p.stages * bytes);
    uint32_t at = ring, step = warp;  // what is copied next
    for (; at + bytes != end; at += bytes, step += kWarps) {
      if (step < p.steps) copy(at, step);
      cp_async_commit();
    }
    fill();
    for (; step < p.last_step; step += kWarps) {
      // All but the groups behind the one that is needed now.
      if (p.stages == 6)
        cp_async_wait<4>();
      else if (p.stages == 4)
        cp_async_wait<2>();
      else if (p.stages == 3)
        cp_async_wait<1>();
      else
        cp_async_wait<0>();
      sync_warp();  // the stage is there for all lanes, and all have read the one that is refilled
      if (step < p.steps) copy(at, step);
      cp_async_commit();
      at = at + bytes == end ? ring : at + bytes;
      multiply(at);
    }
  }
};

// Sets the stages of the rings of thread blocks of which `resident` share a multiprocessor. Returns the bytes of shared memory of a thread
// block, `fixed` of which are no rings.
template <class Ring>
size_t plan_rings(SpqrLinearParams& p, int64_t tokens, size_t fixed, int resident) {
  const SpqrWeight& w = p.weight;
  const size_t stats = Ring::kParts * ((w.wide_codes ? 32 : 16) + (w.stat_dtype == kFloat32 ? 16 : 8));
  const size_t tiles = Ring::kXAt / Ring::kBytes, stage = Ring::kXAt + static_cast<size_t>(tokens) * Ring::kRowStride + tiles * stats;
  const size_t steps = static_cast<size_t>((w.in_features + kWarps * kStepColumns - 1) / (kWarps * kStepColumns));  // of a warp, at most
  const auto bytes = [&](size_t stages) { return fixed + kWarps * (stages < steps ? stages : steps) * stage; };
  constexpr size_t kReserved = 1 << 10;  // of each thread block; of the device's most, too
  const auto most = [&] {
    for (; resident > 0; --resident)
      for (const uint32_t stages : {6u, 4u, 3u})
        if (bytes(stages) <= (most_shared_bytes() + kReserved) / resident - kReserved) return stages;
    return 2u;
  };
  p.stages = most();
  p.last_group = static_cast<uint32_t>(w.groups - 1);
  p.row_bytes = static_cast<uint32_t>(2 * w.in_features);
  p.steps = static_cast<uint32_t>((w.in_features + kStepColumns - 1) / kStepColumns);
  p.last_step = p.steps + (p.stages - 1) * kWarps;
  p.tile_stats = static_cast<uint32_t>(stats);
  p.stage_bytes = static_cast<uint32_t>(stage);
  p.stage_tokens = static_cast<uint32_t>(tokens);
  p.ring_bytes = static_cast<uint32_t>((bytes(p.stages) - fixed) / kWarps);
  return bytes(p.stages);
}

}  // namespace
}  // namespace hfq
