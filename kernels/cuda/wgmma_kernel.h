// The kernel of wgmma.h, for one kind of codes in each file that includes this.
//
// Four warps fill a ring of stages (wgmma_block.h). The others have a tile each; they wait for a stage to be full, and say when it is empty, so that
// none waits for another that is behind. While the instructions of a unit run, the next one's numbers are made. Scales multiply float32 sums after a
// group, or a chunk if that ends first; sums of x for zero points come from mma with ones, as in gemm_kernel.h.
// (More than 64 tokens with large weights: wgmma_large.h, wgmma_pair.h.)
//
// x costs as many bytes of L2 as codes do: 64 tokens as many as 256 rows of 4 bits. So 256 rows share it; 128 tokens leave registers for 128 rows
// only, which suits small weights. Few rows leave multiprocessors without work: then the columns are cut, the blocks that share rows are a cluster,
// and each adds up its part of the rows from all blocks' shared memory, in their order.
#pragma once

#include <type_traits>

#include "gemm_output.h"
#include "wgmma_large.h"
#include "wgmma_pair.h"
#include "wgmma_staged.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HFQ_WGMMA
#endif

namespace hfq {
namespace {

// The same for all lanes, as the compiler then knows: what depends on it is not divergent.
__device__ __forceinline__ int own_warp() { return shuffle_from(threadIdx.x / 32, 0); }

// ---- from stages to sums: a warp for each tile of rows

template <class Kind, class T, class Block>
struct WgmmaConsumer {
  static constexpr int kUnits = Block::kUnits, kSums = Block::kSums, kTokenTiles = Block::kTokenTiles;
  static constexpr float kMiddle = 1 << (Block::kBits - 1);
  static constexpr int kAnyDType = -1;  // of scales: the parameters say which
  // Staged: codes are asked for before the wgmma in front is waited for, and a chunk begins with where the next one is, a chain of slow instructions,
  // in place of its last unit. (Scales of units leave no registers for that.)
  template <bool kWhole>
  static constexpr bool kEarly = Block::kStaged && kWhole;

  const WgmmaParams& p;
  const Block& block;
  int lane;
  uint32_t codes_at, scales_at;  // what the lane reads, from the beginning of a stage
  uint32_t table;                // of the lane
  float sums[kSums] = {}, products[kSums];
  Kind codes;
  uint32_t a[2][2][4];           // of two units, in turns

  __device__ __forceinline__ WgmmaConsumer(const WgmmaParams& params, const Block& b, int warp)
      : p(params), block(b), lane(threadIdx.x % 32) {
    codes_at = kept(static_cast<uint32_t>(Block::kCodesAt + warp * Block::kBytes + 16 * lane));
    scales_at = kept(static_cast<uint32_t>(Block::kScalesAt + warp * Block::kScaleBytes + lane / 4 * pair_bytes(p.weight.scale_dtype)));
    if constexpr (Kind::kTable) table = kept(block.ring + Block::kRing + 4 * lane);
  }

  // Codes of unit `u`, if a block begins with it.
  template <int u>
  __device__ __forceinline__ void take(uint32_t stage) {
    if constexpr (u % Kind::kUnits == 0) codes.take(stage + codes_at + u / Kind::kUnits * kBlockBytes<Block::kBits>, lane);
  }

  // Its numbers.
  template <int u>
  __device__ __forceinline__ void unpack() {
    codes.template unit<T, u % Kind::kUnits>(table, a[u % 2]);
    Kind::order(a[u % 2]);
    // Here, and not behind the next fence, where ptxas would add one more.
#pragma unroll
    for (int i = 0; i < 8; ++i) a[u % 2][i / 4][i % 4] = kept(a[u % 2][i / 4][i % 4]);
  }

  // Sums of activations over the units for which scales are applied at once: the warp's share of the tokens.
  __device__ __forceinline__ void add_activations(uint32_t at) const {
    constexpr uint32_t kOne = kBoth<T, 1>, ones[4] = {kOne, kOne, kOne, kOne};
    const int warp = own_warp();  // again: a register less through all chunks
    if (warp >= kTokenTiles) return;
    uint8_t* const stage = block.memory + at * Block::kStage;
    float* to = reinterpret_cast<float*>(stage + Block::kXSumsAt);
    for (int tile = warp; tile < kTokenTiles; tile += Block::kTiles) {
      float d[4] = {};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        uint32_t b[4];
        ldmatrix(b, stage + u / 2 * Block::kHalf + (8 * tile + lane % 8) * 128 + 16 * ((u % 2 * 4 + lane / 8) ^ lane % 8));
        mma(T{}, d, ones, b[0], b[1]);
        mma(T{}, d, ones, b[2], b[3]);
        if (((u + 1) & p.flush_mask) == 0) {
          if (lane < 4) *reinterpret_cast<float2*>(to + u * 8 * kTokenTiles + 8 * tile + 2 * lane) = make_float2(d[0], d[1]);
#pragma unroll
          for (int c = 0; c < 4; ++c) d[c] = 0.0f;
        }
      }
    }
    sync_warp();
    if (lane == 0) mbarrier_arrive(block.summed(at));
  }

  // Units u and later of the stage `turn`, of which `x` describes the activations and `unit` is the first one, of all columns. `more`: another one
  // follows, whose first unit's numbers are made; `next` is it, or `turn` if not kEarly.
  // `kWhole`: scales, of the dtype kScales, are applied at its end only, and there are no zero points.
  template <bool kWhole, int kScales, int u>
  __device__ __forceinline__ void multiply(uint64_t x, const Turn<Block::kStages>& turn, Turn<Block::kStages> next, uint32_t unit, bool more) {
    constexpr int kFrom = (u / 2 * Block::kHalf + u % 2 * 64) / 16;
    const uint32_t stage = block.stage(turn.at);
    const bool zeros = !kWhole && p.weight.zeros;
    const uint32_t mask = kWhole ? kUnits - 1 : p.flush_mask;
    // Nothing is on the way yet: no kernel that we know of has other matrix instructions between a group and its wait.
    if (u == 0 && zeros) add_activations(turn.at);
    wgmma_fence();
    wgmma(T{}, products, a[u % 2][0], x + kFrom, (u & mask) != 0);
    wgmma(T{}, products, a[u % 2][1], x + kFrom + 2, true);
    wgmma_commit();
    if constexpr (!kEarly<kWhole>) wgmma_wait<1>();
    if constexpr (u + 1 < kUnits) {
      take<u + 1>(stage);
      if constexpr (kEarly<kWhole>) wgmma_wait<1>();
      unpack<u + 1>();
    } else if (more) {
      if constexpr (!kEarly<kWhole>) next.next();
      mbarrier_wait(block.full(next.at), next.round % 2);
      take<0>(block.stage(next.at));
      if constexpr (kEarly<kWhole>) wgmma_wait<1>();
      unpack<0>();
    }
    // (Always so after the last unit. The compiler, which does not know, makes the numbers above before it waits.)
    if (kWhole ? u + 1 == kUnits : ((u + 1) & mask) == 0) {
      const uint32_t pair = stage + scales_at + (kWhole ? 0 : scales_of(p, unit, u));
      const Pair s = load_floats(pair, kScales == kAnyDType ? p.weight.scale_dtype : static_cast<DType>(kScales));
      if (u == mask && zeros) mbarrier_wait(block.summed(turn.at), turn.round % 2);
      wgmma_wait<0>(products);
      if (zeros) add_zeros(s, pair, stage + Block::kXSumsAt + u * 32 * kTokenTiles);
#pragma unroll
      for (int i = 0; i < kSums; ++i) sums[i] += (i % 4 < 2 ? s.low : s.high) * products[i];
    }
    if constexpr (u + 1 < kUnits)
      multiply<kWhole, kScales, u + 1>(x, turn, next, unit, more);
    else
      wgmma_wait<0>();
  }

  // Products are with code - middle: what lacks is middle - zero for each activation, times the scales.
  __device__ __forceinline__ void add_zeros(const Pair& s, uint32_t pair, uint32_t x_sums) {
    const Pair zero = load_floats(pair + Block::kZerosAt - Block::kScalesAt, p.weight.scale_dtype);
    const float low = s.low * (kMiddle - zero.low), high = s.high * (kMiddle - zero.high);
#pragma unroll
    for (int tile = 0; tile < kTokenTiles; ++tile) {
      const uint2 both = load_shared<uint2>(x_sums + 32 * tile + 8 * (lane % 4));
      const float first = as_float(both.x), second = as_float(both.y);
      float* const d = sums + 4 * tile;
      d[0] += low * first, d[1] += low * second, d[2] += high * first, d[3] += high * second;
    }
  }

  // All chunks of the block.
  template <bool kWhole, int kScales = kAnyDType>
  __device__ __forceinline__ void run_chunks() {
    const uint64_t x = x_descriptor(block.ring);
    Turn<Block::kStages> turn;
    if (block.chunks) {
      mbarrier_wait(block.full(0), 0);
      take<0>(block.ring);
      unpack<0>();
    }
#pragma unroll 1
    for (uint32_t i = 0; i < block.chunks; ++i, turn.next()) {
      Turn<Block::kStages> next = turn;
      if constexpr (kEarly<kWhole>) next.next();
      multiply<kWhole, kScales, 0>(x + turn.at * (Block::kStage / 16), turn, next, (block.chunk + i) * kUnits, i + 1 < block.chunks);
      sync_warp();
      if (lane == 0) mbarrier_arrive(block.empty(turn.at));
    }
  }

  __device__ __forceinline__ void run() {
    if (p.flush_mask == kUnits - 1 && !p.weight.zeros)
      run_whole();
    else
      run_chunks<false>();
  }

  __device__ __forceinline__ void run_whole() {
    if constexpr (Block::kStaged) {
      if (p.weight.scale_dtype == kFloat16) return run_chunks<true, kFloat16>();
      if (p.weight.scale_dtype == kBFloat16) return run_chunks<true, kBFloat16>();
    }
    run_chunks<true>();
  }

  __device__ __forceinline__ void store_sums(float* partial) const { store_tile<Block>(partial, own_warp(), sums); }
};

// ---- from sums to memory: blocks of other columns are added, in their order, and rows are stored side by side

// A warp has a token at a time, a lane four rows: several tokens at once, since a neighbour's memory takes some 1000 clocks.
template <class T, class Block>
__device__ __forceinline__ void store_outputs(const WgmmaParams& p, const Block& block, const float* partial) {
  constexpr uint32_t kFours = Block::kRows / 4, kWarps = Block::kThreads / 32, kAtOnce = 2;
  const uint32_t splits = p.plan.splits, share = (kFours + splits - 1) / splits, warp = threadIdx.x / 32;  // each block of the cluster takes as many
  const int64_t padded = (p.weight.out_features + kTileRows - 1) / kTileRows * kTileRows, left = p.tokens - block.first_token;
  const uint32_t tokens = left < Block::kTokens ? static_cast<uint32_t>(left) : Block::kTokens;
  for (uint32_t at = threadIdx.x % 32; at < share; at += 32) {
    const uint32_t four = block.split * share + at;
    const int64_t n = static_cast<int64_t>(block.first_tile) * kTileRows + 4 * four;
    if (four >= kFours || n >= padded) continue;
    for (uint32_t token = warp; token < tokens; token += kAtOnce * kWarps) {
      const float* const own = partial + token * (Block::kRows + 4) + 4 * four;
      float4 sums[kAtOnce] = {};
#pragma unroll 1
      for (uint32_t split = 0; split < splits; ++split) {
        float4 parts[kAtOnce] = {};
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) {
          const float4* const of_token = reinterpret_cast<const float4*>(own + i * kWarps * (Block::kRows + 4));
          if (token + i * kWarps < tokens) parts[i] = splits == 1 ? *of_token : load_of_block(of_token, split);
        }
#pragma unroll
        for (uint32_t i = 0; i < kAtOnce; ++i) sums[i] = plus(sums[i], parts[i]);
      }
#pragma unroll
      for (uint32_t i = 0; i < kAtOnce; ++i)
        if (token + i * kWarps < tokens) store_rows<T>(p, block.first_token + token + i * kWarps, n, sums[i]);
    }
  }
}

// ---- kernel

// What a thread block is made of.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
struct WgmmaParts {
  static constexpr bool kStaged = kWay == WgmmaWay::kStaged;
  using Block = WgmmaBlock<Kind, T, kTokens, kWay>;
  using Producer = std::conditional_t<kStaged, WgmmaStagedProducer<Block>, WgmmaProducer<Block>>;
  using Consumer = WgmmaConsumer<Kind, T, Block>;
};
template <class Kind, class T>
struct WgmmaParts<Kind, T, kLargeTokens, WgmmaWay::kLarge> {
  using Block = WgmmaBlock<Kind, T, kLargeTokens, WgmmaWay::kLarge>;
  using Producer = WgmmaLargeProducer<Block>;
  using Consumer = WgmmaLargeConsumer<Kind, T, Block>;
};
template <class Kind, class T>
struct WgmmaParts<Kind, T, kPairTokens, WgmmaWay::kPair> {
  using Block = WgmmaPairBlock<Kind, T>;
  using Producer = WgmmaPairProducer<Block>;
  using Consumer = WgmmaPairConsumer<Kind, T, Block>;
};

template <class Kind, class T, int kTokens, WgmmaWay kWay>
__global__ void __launch_bounds__(WgmmaParts<Kind, T, kTokens, kWay>::Block::kThreads, 1) wgmma_kernel(const WgmmaParams p) {
#ifdef HFQ_WGMMA
  using Parts = WgmmaParts<Kind, T, kTokens, kWay>;
  using Block = typename Parts::Block;
  constexpr bool kIsPair = kWay == WgmmaWay::kPair;
  const Block block(p);
  let_next_kernel_start();
  if (threadIdx.x == 0) block.init_barriers();
  if constexpr (kIsPair)
    sync_cluster_only();
  else
    sync_block();
  const int warp = own_warp();
  if (warp >= Block::kConsumers) {
    if constexpr (Block::kOfProducers < Block::kAtFirst) give_registers<Block::kOfProducers>();
    typename Parts::Producer mine(p, block, warp - Block::kConsumers);
    mine.run();
  } else {
    if constexpr (Block::kOfConsumers > Block::kAtFirst) take_registers<Block::kOfConsumers>();
    if constexpr (Kind::kTable) {  // while the first copies are on the way
      TableCodes::fill<T>(block.memory + Block::kRing, p.weight.codebook);
      mbarrier_arrive(block.filled());
      mbarrier_wait(block.filled(), 0);
    }
    wait_for_previous_kernel();  // which may read what will be overwritten
    typename Parts::Consumer mine(p, block, warp);
    mine.run();
    if constexpr (!kIsPair) {
      // In place of the stages, once nobody reads them.
      sync_warp();
      if (threadIdx.x % 32 == 0) mbarrier_arrive(block.drained());
      mbarrier_wait(block.drained(), 0);
      mine.store_sums(reinterpret_cast<float*>(block.memory));
    }
  }
  if constexpr (!kIsPair) {  // whose consumers have stored all
    if (p.plan.splits > 1)
      sync_cluster();
    else
      sync_block();
    store_outputs<T>(p, block, reinterpret_cast<const float*>(block.memory));
    if (p.plan.splits > 1) sync_cluster_only();  // nobody's shared memory goes before all have read it
  }
#endif
}

// ---- launcher

// Clusters of so many blocks that run at a time; none for want of shared memory, or because another compiler has chosen other registers.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
int active_blocks(int cluster) {
  using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
  // With fewer registers than they count on, warps would wait for them forever.
  constexpr int kRegisters = Block::kOfConsumers > Block::kAtFirst ? Block::kAtFirst : 0;
  return active_clusters<WgmmaParams, wgmma_kernel<Kind, T, kTokens, kWay>>(cluster, Block::kThreads, Block::kSharedBytes, kRegisters);
}

// What the kernel takes of a product, in `p`. False: it does not run here.
template <class Kind, class T, int kTokens, WgmmaWay kWay>
bool plan_tokens(WgmmaParams& p) {
  p.token_tiles = static_cast<uint32_t>(divided(p.tokens, kTokens));
  if constexpr (kWay == WgmmaWay::kPair) {
    // (The workspace has room for no more: most_ranges.)
    const int active = active_blocks<Kind, T, kTokens, kWay>(2), most = multiprocessors() / 2;
    p.pairs = plan_pairs(p, active < most ? active : most);
    return p.pairs.ranges > 0;
  } else {
    using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
    p.plan = plan_wgmma(p, {Block::kRows, kTokens, active_blocks<Kind, T, kTokens, kWay>});
    return p.plan.splits > 0;
  }
}

template <class Kind, class T, int kTokens, WgmmaWay kWay>
const char* launch_wgmma_tokens(const WgmmaParams& params, cudaStream_t stream) {
  using Block = typename WgmmaParts<Kind, T, kTokens, kWay>::Block;
  constexpr auto kKernel = wgmma_kernel<Kind, T, kTokens, kWay>;
  WgmmaParams p = params;
  if (!plan_tokens<Kind, T, kTokens, kWay>(p)) return "the kernel with wgmma does not run here";  // takes_wgmma asks before
  if constexpr (kWay == WgmmaWay::kLarge || kWay == WgmmaWay::kPair)
    if (const char* error = launch_arrange(p, stream)) return error;
  if constexpr (kWay == WgmmaWay::kPair) {
    float* const flags = p.workspace + arranged_floats(p);
    p.flags = reinterpret_cast<uint32_t*>(flags), p.partials = flags + flags_of_pairs(p);
    return launch_clusters(kKernel, 2 * p.pairs.ranges, 2, Block::kThreads, Block::kSharedBytes, stream, p);
  }
  const unsigned cluster = p.plan.splits;
  const int64_t clusters = divided(p.weight.out_features, Block::kRows) * p.token_tiles;
  return launch_clusters(kKernel, static_cast<unsigned>(clusters * cluster), cluster, Block::kThreads, Block::kSharedBytes, stream, p);
}

// `use` of what a thread block takes of this product, as types: how many tokens, the fewest that hold all, and which way. (Where it does not run,
// because another compiler has chosen other registers, takes_wgmma says no and gemm_kernel.h is taken.)
//
// Staged blocks were faster with up to 32 tokens on an H200, but for 8 bits (26 us in place of 24 for 4096 x 14336), and with 64 where scales are
// applied once for a stage and are all there is (20.1 in place of 23.7). Not so with zero points (31.3 in place of 31.1), in groups of 64 (26.0 in
// place of 25.3), for 8 bits (31.0 in place of 27.6) and codebooks (28.9 in place of 27.7).
template <class Kind, class Use>
auto with_block(const LinearParams& p, const Use& use) {
  constexpr std::integral_constant<int, 32> k32;
  constexpr std::integral_constant<int, 64> k64;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kThroughRegisters> through_registers;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kStaged> staged;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kLarge> large;
  constexpr std::integral_constant<WgmmaWay, WgmmaWay::kPair> pair;
  if (p.tokens <= 16) return use(std::integral_constant<int, 16>{}, through_registers);
  if constexpr (Kind::kCodeBits == 8) {
    if (p.tokens <= 32) return use(k32, through_registers);
  } else {
    constexpr uint32_t kUnits = kWgmmaColumns / kUnitColumns;
    if (p.tokens <= 32) return use(k32, staged);
    if constexpr (!Kind::kTable)
      if (p.tokens <= 64 && !p.weight.zeros && flush_mask(p.weight, kUnits) == kUnits - 1) return use(k64, staged);
  }
  if (p.tokens <= 64) return use(k64, through_registers);
  if (!takes_large_wgmma(p)) return use(std::integral_constant<int, 128>{}, through_registers);
  if (large_tokens(p) == kPairTokens) return use(std::integral_constant<int, kPairTokens>{}, pair);
  return use(std::integral_constant<int, kLargeTokens>{}, large);
}

template <class Kind>
bool runs_wgmma_of(const LinearParams& p) {
  WgmmaParams planned = {};
  static_cast<LinearParams&>(planned) = p;
  return with_block<Kind>(p, [&](auto tokens, auto way) {
    return p.x_dtype == kBFloat16 ? plan_tokens<Kind, BFloat16, tokens, way>(planned) : plan_tokens<Kind, Float16, tokens, way>(planned);
  });
}

template <class Kind>
const char* launch_wgmma_of(const WgmmaParams& p, cudaStream_t stream) {
  return with_block<Kind>(p, [&](auto tokens, auto way) {
    return p.x_dtype == kBFloat16 ? launch_wgmma_tokens<Kind, BFloat16, tokens, way>(p, stream)
                                  : launch_wgmma_tokens<Kind, Float16, tokens, way>(p, stream);
  });
}

}  // namespace
}  // namespace hfq
