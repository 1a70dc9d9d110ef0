// What kernels of gemm.h have in common: the place of a thread block and of its warps, activations on their way to shared memory, the pipeline, and
// the end. What a warp does with a weight's codes: gemm_kernel.h, spqr_gemm_kernel.h.
#pragma once

#include "fragments.h"
#include "gemm.h"
#include "gemm_output.h"
#include "runs.h"

namespace hfq {
namespace {

// 16 bytes of a tensor.
__device__ __forceinline__ const uint8_t* piece(const void* tensor, uint32_t number) {
  return static_cast<const uint8_t*>(tensor) + static_cast<int64_t>(number) * 16;
}

// Of one warp. Each 128 bytes of a token's activations in a stage are kPhases parts, whose order is another one in neighbouring tokens: what one load
// takes of so many of them lies in different banks.
template <class T_, int kTokens_, int kColumns_, int kPhases>
struct GemmBlock {
  using T = T_;
  static constexpr int kTokens = kTokens_, kColumns = kColumns_;  // of a chunk
  static constexpr int kRowBytes = 2 * kColumns, kRowPieces = kRowBytes / 16;  // of a chunk of one token
  static constexpr int kRowsAtOnce = kGemmThreads / kRowPieces;  // of activations, that the threads copy: of one chunk, or of several
  static constexpr int kChunksAtOnce = kRowsAtOnce > kTokens ? kRowsAtOnce / kTokens : 1;
  static constexpr int kTokenTiles = kTokens / 8;

  // What a thread computes. Made anew where it is needed after the loop: registers of the loop are for the loop.
  struct Part {
    int lane, row_warps, row_warp, column_warp;
    __device__ __forceinline__ explicit Part(const GemmParams& p) {
      const uint32_t thread = kept(threadIdx.x);
      lane = thread % 32;
      row_warps = kGemmWarps >> p.plan.column_shift;
      row_warp = thread / 32 % row_warps, column_warp = thread / 32 / row_warps;
    }
  };
  // And what its thread block does.
  struct Place : Part {
    uint32_t first_tile, split;
    uint32_t first_token, end_token, expert;  // more tokens than it takes may follow
    __device__ __forceinline__ explicit Place(const GemmParams& p) : Part(p) {
      const uint32_t block = kept(blockIdx.x);
      // Neighbouring thread blocks read the same weights for other tokens: the second finds them in L2.
      split = block / p.token_tiles % p.plan.splits;
      first_tile = block / p.token_tiles / p.plan.splits * this->row_warps * kWarpTiles;
      first_token = block % p.token_tiles * kTokens, end_token = static_cast<uint32_t>(p.tokens), expert = 0;
      if (p.routing.counts) {
        const Run run = find_run<kTokens>(p.routing, end_token, block % p.token_tiles);
        first_token = run.first, end_token = run.end, expert = run.expert;
      }
    }
  };

  const GemmParams& p;
  int lane, column_warp;
  uint32_t first_chunk, end_chunk;   // of the thread block
  uint32_t warp_end;                 // what the first chunk of a stage is less than if the warp has rows and a chunk of it
  // What the thread copies of activations next: the number of the piece of 16 bytes, which takes one register, and where it goes, in bytes from the
  // beginning of a stage.
  uint32_t x_from, x_to, x_left;     // pieces to the last column that the token has in this thread block
  int x_tokens;                      // from the thread's token to the last
  float sums[kWarpTiles][kTokenTiles][4] = {};

  __device__ __forceinline__ GemmBlock(const GemmParams& params, const Place& place) : p(params), lane(threadIdx.x % 32) {
    const Weight& w = p.weight;
    column_warp = place.column_warp;
    const uint32_t chunks = static_cast<uint32_t>((w.in_features + kColumns - 1) / kColumns);
    first_chunk = place.split * p.plan.split_chunks;
    end_chunk = first_chunk + p.plan.split_chunks < chunks ? first_chunk + p.plan.split_chunks : chunks;

    const int row = threadIdx.x / kRowPieces, of_chunk = threadIdx.x % kRowPieces;
    const int64_t token = place.first_token + row % kTokens;
    const uint32_t from = (first_chunk + row / kTokens) * kRowPieces + of_chunk, of_row = static_cast<uint32_t>(w.in_features / 8);
    const uint32_t end = of_row < end_chunk * kRowPieces ? of_row : end_chunk * kRowPieces;
    x_from = kept(static_cast<uint32_t>(token * of_row + from));
    x_to = kept(static_cast<uint32_t>(row * kRowBytes + 16 * (of_chunk ^ 8 / kPhases * (row % kPhases))));
    x_left = kept(from < end ? end - from : 0);
    x_tokens = static_cast<int>(place.end_token - token < kTokens ? place.end_token - token : kTokens);
    const uint32_t tile = place.first_tile + place.row_warp * kWarpTiles;
    warp_end = tile < tiles() && end_chunk > static_cast<uint32_t>(column_warp) ? end_chunk - column_warp : 0;
  }

  // Of the weight's rows.
  __device__ __forceinline__ uint32_t tiles() const { return static_cast<uint32_t>((p.weight.out_features + kTileRows - 1) / kTileRows); }

  // ---- from global memory to a stage

  // Of the chunks of a stage.
  __device__ __forceinline__ void copy_activations(uint32_t to) {
    constexpr uint32_t kStep = kChunksAtOnce * kRowPieces;
    const uint32_t end = kRowPieces << p.plan.column_shift, rows = kRowsAtOnce * static_cast<uint32_t>(p.weight.in_features / 8);
    // 8-bit codes and 16 tokens: half of the threads begin with the second chunk.
    uint32_t at = threadIdx.x / kRowPieces / kTokens * kRowPieces, from = 0;
#pragma unroll 2
    for (; at < end; at += kStep, from += kStep) {
#pragma unroll
      for (int j = 0; j < kTokens / kRowsAtOnce || j == 0; ++j)
        // Zeros for columns behind K, which codes of padding meet, and for tokens that nobody has asked for.
        cp_async_or_zero(to + j * kRowsAtOnce * kRowBytes, piece(p.x, x_from + j * rows + from), from < x_left && j * kRowsAtOnce < x_tokens);
      to += kChunksAtOnce * kTokens * kRowBytes;
    }
    x_from += end;
    x_left = x_left > end ? x_left - end : 0;
  }

  // ---- from sums to memory

  // Through shared memory: warps of other columns are added, in their order, and rows are stored side by side.
  __device__ __forceinline__ void store_sums(float* partial) const {
    const Place place(p);
    const int rows = place.row_warps * kWarpTiles * kTileRows, stride = rows + 4;  // 8 lanes apart are 4 tokens: other banks
    const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows;
    LinearParams own = p;
    if (own.bias) own.bias = static_cast<const uint8_t*>(own.bias) + place.expert * p.routing.bias_bytes;
    sync_block();
    if (place.first_tile + place.row_warp * kWarpTiles < padded / kTileRows) {
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i)
#pragma unroll
        for (int tile = 0; tile < kTokenTiles; ++tile)
#pragma unroll
          for (int c = 0; c < 4; ++c) {
            const int token = place.column_warp * kTokens + 8 * tile + 2 * (place.lane % 4) + c % 2;
            partial[token * stride + (place.row_warp * kWarpTiles + i) * kTileRows + place.lane / 4 + 8 * (c / 2)] = sums[i][tile][c];
          }
    }
    sync_block();
    for (int at = 4 * threadIdx.x; at < kTokens * rows; at += 4 * kGemmThreads) {
      const int64_t n = static_cast<int64_t>(place.first_tile) * kTileRows + at % rows, m = static_cast<int64_t>(place.first_token) + at / rows;
      if (n >= padded || m >= place.end_token) continue;
      float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      for (int warp = 0; warp < 1 << p.plan.column_shift; ++warp)
        sum = plus(sum, *reinterpret_cast<const float4*>(partial + (warp * kTokens + at / rows) * stride + at % rows));
      if (p.plan.splits > 1)
        store(reinterpret_cast<float4*>(p.workspace + (place.split * p.tokens + m) * padded + n), sum);
      else
        store_rows<T>(own, m, n, plus_extra(p, m * padded + n, sum));
    }
  }
};

// ---- kernel ----

template <class Warp>
__global__ void __launch_bounds__(kGemmThreads, Warp::kTokens < kMostTokens ? 2 : 1) gemm_kernel(const typename Warp::Params p) {
  uint8_t* shared = shared_memory();
  uint8_t* scratch = shared + Warp::kTableBytes;
  uint8_t* partial = scratch + p.plan.sums_bytes;
  const uint32_t ring = kept(shared_address(partial));
  const typename Warp::Place place(p);
  if (place.first_token >= place.end_token) return;  // behind the last run
  if (p.routing.counts && place.expert == p.routing.experts) {
    const Run none = {place.expert, place.first_token, place.end_token};
    return store_zeros(static_cast<uint16_t*>(p.y), p.weight.out_features, none, static_cast<int64_t>(place.first_tile) * kTileRows,
                       place.row_warps * kWarpTiles * kTileRows, kGemmThreads);
  }
  Warp mine(p, place, shared_address(shared));
  const uint32_t step = 1u << p.plan.column_shift, stages = p.plan.stages;

  for (uint32_t i = 0; i + 1 < stages; ++i) {
    const uint32_t chunk = mine.first_chunk + i * step;
    if (chunk < mine.end_chunk) mine.copy(ring + i * p.plan.stage_bytes, chunk);
    cp_async_commit();
  }
  if constexpr (Warp::kTableBytes > 0) TableCodes::fill<typename Warp::T>(shared, p.weight.codebook);

  uint32_t at = 0;  // the stage of `chunk`
  for (uint32_t chunk = mine.first_chunk; chunk < mine.end_chunk; chunk += step) {
    if (stages == 4)
      cp_async_wait<2>();
    else if (stages == 3)
      cp_async_wait<1>();
    else
      cp_async_wait<0>();
    sync_block();  // this stage is there for all warps, and the one before, which is filled next, has been read by all
    const uint32_t next = chunk + (stages - 1) * step;
    if (next < mine.end_chunk) mine.copy(ring + (at == 0 ? stages - 1 : at - 1) * p.plan.stage_bytes, next);
    cp_async_commit();
    mine.add(ring + at * p.plan.stage_bytes, chunk, scratch);
    at = at + 1 == stages ? 0 : at + 1;
  }
  cp_async_wait<0>();
  mine.store_sums(reinterpret_cast<float*>(partial));
}

// ---- launcher ----

template <class Warp>
const char* launch_gemm_warps(const typename Warp::Params& p, cudaStream_t stream) {
  const int64_t rows = kGemmWarps * kWarpTiles * kTileRows >> p.plan.column_shift;
  const int64_t blocks = (p.weight.out_features + rows - 1) / rows * p.plan.splits * p.token_tiles;
  return launch(gemm_kernel<Warp>, static_cast<unsigned>(blocks), kGemmThreads, p.plan.shared_bytes, stream, p);
}

}  // namespace
}  // namespace hfq
