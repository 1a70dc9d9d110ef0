// x for pairs of thread blocks, put once into the order in which stages have it (wgmma_block.h), so that it comes by copies in bulk.
// Else each block of rows would permute the same x through its registers: 128 tokens of 4096 x 14336 took 41.6 us so, and take 32 (H200).
#include "target.h"
#include "wgmma.h"

namespace hfq {
namespace {

constexpr int kThreads = 256, kPieces = kWgmmaColumns / 8, kBlockTokens = kThreads / kPieces;  // pieces of 16 bytes: of a token in a chunk
static_assert(kPairTokens / 2 % kBlockTokens == 0 && kStagedTokens % kBlockTokens == 0);

struct ArrangeParams {
  const uint16_t* x;     // [M, K], numbers of any dtype of 16 bits
  uint8_t* to;           // [tiles, chunks, 2, tokens, 128 bytes]: tiles of tokens, chunks of columns, their halves, tokens
  int64_t tokens;        // M
  uint32_t in_features;  // K, a multiple of 8
  uint32_t chunks;       // ceil(K / 128)
};

// A thread block has one chunk of 16 tokens, a thread 16 bytes of a token, a word of each of four pieces. `kTileTokens`: of a tile.
template <int kTileTokens>
__global__ void __launch_bounds__(kThreads) arrange_kernel(const ArrangeParams p) {
  let_next_kernel_start();
  const uint32_t chunk = blockIdx.x % p.chunks, piece = threadIdx.x % kPieces, half = piece / 8, unit = piece / 4 % 2, t = piece % 4;
  const int64_t token = static_cast<int64_t>(blockIdx.x / p.chunks) * kBlockTokens + threadIdx.x / kPieces, tile = token / kTileTokens;
  const uint32_t row = static_cast<uint32_t>(token % kTileTokens), column = chunk * kWgmmaColumns + 8 * piece;
  wait_for_previous_kernel();
  uint4 v = {};
  if (token < p.tokens && column < p.in_features) v = load_written(reinterpret_cast<const uint4*>(p.x + token * p.in_features + column));
  uint8_t* const to = p.to + (((tile * p.chunks + chunk) * 2 + half) * kTileTokens + row) * 128 + 4 * t;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) store(reinterpret_cast<uint32_t*>(to + 16 * ((4 * unit + i) ^ row % 8)), words[i]);
}

int64_t arranged_tokens(const LinearParams& p) {
  if (!takes_pairs(p)) return kStagedTokens;
  return p.tokens > kPairTokens / 2 ? kPairTokens : kPairTokens / 2;
}

}  // namespace

int64_t arranged_floats(const LinearParams& p) {
  const int64_t tokens = arranged_tokens(p);
  return divided(p.tokens, tokens) * tokens * divided(p.weight.in_features, kWgmmaColumns) * kWgmmaColumns / 2;
}

const char* launch_arrange(const LinearParams& params, cudaStream_t stream) {
  ArrangeParams p = {};
  p.x = static_cast<const uint16_t*>(params.x), p.to = reinterpret_cast<uint8_t*>(params.workspace);
  p.tokens = params.tokens, p.in_features = static_cast<uint32_t>(params.weight.in_features);
  p.chunks = static_cast<uint32_t>(divided(params.weight.in_features, kWgmmaColumns));
  // Whole tiles, so that all of x's part of the workspace is written, and nothing behind it. (2^31 blocks would be 8 TB of x.)
  const int64_t tokens = arranged_tokens(params), blocks = divided(p.tokens, tokens) * (tokens / kBlockTokens) * p.chunks;
  const auto kernel = tokens == kPairTokens       ? arrange_kernel<kPairTokens>
                      : tokens == kPairTokens / 2 ? arrange_kernel<kPairTokens / 2>
                                                  : arrange_kernel<kStagedTokens>;
  return launch_early(kernel, static_cast<unsigned>(blocks), kThreads, 0, stream, p);
}

}  // namespace hfq
