// The kernel of stream.h, for one kind of codes in each file that includes this.
//
// A thread block for each multiprocessor goes through tiles of 16 rows, one or two at a time. One thread asks for all that comes from memory, by
// copies in bulk: stages of 1024 columns of these tiles, codes and scales, into a ring, and activations, once, for good. Eight warps take 128 columns
// of each stage, and add up their sums when the tiles end. So the ring never runs dry between tiles, and copies cost next to no instructions.
//
// Two such thread blocks find room on a multiprocessor, of one kernel and the next one (let_next_kernel_start): while a kernel computes, the ring of
// its successor fills, and when it ends, that of the one behind it. What lies between two products, the end of one grid, the first
// activations, the first sums, then takes no time from the memory.
//
// Activations that are too large for that are shared out: up to eight thread blocks, a cluster, have a slice of the columns each, all of the same
// tiles. Their sums meet a round later, when they have been there for long: each block adds up a part of the outputs, from all blocks' shared
// memory, in their order.
#pragma once

#include "gemm_output.h"
#include "linear_step.h"
#include "pieces.h"
#include "stream.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HFQ_STREAM
#endif

namespace hfq {
namespace {

constexpr int kStreamThreads = 32 * (kStreamWarps + 1);
static_assert(kStreamStepColumns == kStepColumns);

template <class Kind, int kTokenTiles>
struct StreamMemory {
  static constexpr int kTiles = stream_tiles(StepCodes<Kind>::kBits, kTokenTiles);
  static constexpr StreamPlaces kPlaces = stream_places(kTiles, kTokenTiles, Kind::kTable);
  static constexpr uint32_t kSums = kTiles * kTokenTiles * 128;  // of a round
  static_assert(!Kind::kTable || kPlaces.partial == TableCodes::kTableBytes);
  static_assert(8 * (2 * kMostStreamStages + 6) <= kPlaces.x - kPlaces.barriers);

  uint8_t* const memory;
  uint32_t barriers, x, x_sums, ring;  // shared addresses

  __device__ __forceinline__ explicit StreamMemory(const StreamParams& p)
      : memory(shared_memory()),
        barriers(shared_address(memory + kPlaces.barriers)),
        x(barriers + kPlaces.x - kPlaces.barriers),
        x_sums(x + p.plan.x_bytes),
        ring(x_sums + p.plan.x_sums_bytes) {}
  __device__ __forceinline__ float* partial() const { return reinterpret_cast<float*>(memory + kPlaces.partial); }
  __device__ __forceinline__ float* block_sums(uint32_t round) const {
    return reinterpret_cast<float*>(memory + kPlaces.block_sums) + round % 3 * kSums;
  }

  __device__ __forceinline__ float* x_sums_of(uint32_t group) const {
    return reinterpret_cast<float*>(memory + kPlaces.x + (x_sums - x)) + 16 * group;
  }

  __device__ __forceinline__ uint32_t barrier(uint32_t number) const { return barriers + 8 * number; }
  __device__ __forceinline__ uint32_t full(uint32_t stage) const { return barrier(stage); }
  __device__ __forceinline__ uint32_t empty(uint32_t stage) const { return barrier(kMostStreamStages + stage); }
  __device__ __forceinline__ uint32_t x_there() const { return barrier(2 * kMostStreamStages); }
  __device__ __forceinline__ uint32_t x_summed() const { return barrier(2 * kMostStreamStages + 5); }
  // All warps' sums have been stored; have been read.
  __device__ __forceinline__ uint32_t summed() const { return barrier(2 * kMostStreamStages + 1); }
  __device__ __forceinline__ uint32_t partial_read() const { return barrier(2 * kMostStreamStages + 2); }
  // All blocks have their sums of a round. Two that take turns: what one block says to two others need not come to both at the same time, so that
  // the first may arrive at the second for the next round before it has come there.
  __device__ __forceinline__ uint32_t cluster_summed(uint32_t round) const { return barrier(2 * kMostStreamStages + 3 + round % 2); }

  __device__ __forceinline__ void make_barriers(const StreamPlan& plan) const {
    for (uint32_t i = 0; i < plan.ring_stages; ++i) mbarrier_init(full(i), 1), mbarrier_init(empty(i), kStreamWarps);
    mbarrier_init(x_there(), 1);
    mbarrier_init(x_summed(), kStreamWarps);
    mbarrier_init(summed(), kStreamWarps);
    mbarrier_init(partial_read(), kStreamWarps);
    for (uint32_t i = 0; i < 2; ++i) mbarrier_init(cluster_summed(i), plan.splits * kStreamWarps);
    fence_proxy_async();
    fence_barriers();
  }
};

// The tiles of a thread block, kTiles at a time.
template <int kTiles>
struct StreamTiles {
  uint32_t first, end;
  __device__ __forceinline__ explicit StreamTiles(const StreamParams& p) {
    // The first ones have one more.
    const uint32_t cluster = blockIdx.x >> p.plan.split_bits;
    first = cluster * p.tiles_of_cluster + (cluster < p.more_tiles ? cluster : p.more_tiles);
    end = first + p.tiles_of_cluster + (cluster < p.more_tiles ? 1 : 0);
  }
  __device__ __forceinline__ bool some() const { return first < end; }
  __device__ __forceinline__ uint32_t now() const { return end - first < kTiles ? end - first : kTiles; }
  __device__ __forceinline__ void next() { first += kTiles; }
};

// The columns of a thread block: all of them, or its slice.
struct StreamSlice {
  uint32_t step, columns;  // the first step; columns that exist
  __device__ __forceinline__ explicit StreamSlice(const StreamParams& p) : step(rank(p) * p.plan.slice_steps) {
    const uint32_t left = static_cast<uint32_t>(p.weight.in_features) - step * kStepColumns, most = p.plan.slice_steps * kStepColumns;
    columns = left < most ? left : most;
  }
  static __device__ __forceinline__ uint32_t rank(const StreamParams& p) { return blockIdx.x & (p.plan.splits - 1); }
  __device__ __forceinline__ uint32_t stages() const { return (columns + kStageColumns - 1) / kStageColumns; }
  __device__ __forceinline__ uint32_t first_unit() const { return step * kStepUnits; }
  __device__ __forceinline__ uint32_t end_unit() const { return step * kStepUnits + (columns + kUnitColumns - 1) / kUnitColumns; }
};

// A stage of the ring after the other, and in which round.
struct StreamTurn {
  uint32_t at = 0, round = 0;
  __device__ __forceinline__ void next(uint32_t stages) {
    if (++at == stages) at = 0, ++round;
  }
};

// Of a unit of columns. Those behind K count to the last one.
__device__ __forceinline__ uint32_t group_of(const StreamParams& p, uint32_t unit) {
  const uint32_t group = multiply_high(2 * unit, p.group_magic), last = static_cast<uint32_t>(p.weight.groups) - 1;
  return group < last ? group : last;
}

// ---- from global memory to the ring: one thread

template <class Kind, bool kZeros, int kTokenTiles>
struct StreamCopies {
  using Step = StepCodes<Kind>;
  using Memory = StreamMemory<Kind, kTokenTiles>;
  static constexpr int kTiles = Memory::kTiles;
  static constexpr uint32_t kCodeBytes = kStreamWarps * Step::kBytes;  // of a tile in a stage

  const StreamParams& p;
  const Memory& shared;
  const StreamSlice slice;
  StreamTiles<kTiles> tiles;
  uint32_t stage = 0;  // of these tiles, which is copied next
  uint32_t tile_bytes, slice_bytes, group_bytes;
  StreamTurn turn;

  __device__ __forceinline__ StreamCopies(const StreamParams& params, const Memory& memory)
      : p(params), shared(memory), slice(params), tiles(params) {
    constexpr uint32_t kColumns = kBlockColumns<Step::kBits>;
    tile_bytes = (static_cast<uint32_t>(p.weight.in_features) + kColumns - 1) / kColumns * Step::kBlock;
    slice_bytes = (slice.columns + kColumns - 1) / kColumns * Step::kBlock;
    group_bytes = 8 * pair_bytes(p.weight.scale_dtype);
  }

  // The next stage, for which there has to be room.
  __device__ __forceinline__ void copy() {
    const Weight& w = p.weight;
    const uint32_t begin = stage * kCodeBytes, left = slice_bytes - begin, bytes = left < kCodeBytes ? left : kCodeBytes;
    const uint32_t unit = slice.first_unit() + stage * kStageUnits, end_unit = slice.end_unit();
    const uint32_t last_unit = (unit + kStageUnits < end_unit ? unit + kStageUnits : end_unit) - 1;
    const uint32_t group = group_of(p, unit), of_pairs = (group_of(p, last_unit) - group + 1) * group_bytes;
    const uint32_t full = shared.full(turn.at);
    mbarrier_arrive_and_expect(full, tiles.now() * (bytes + (kZeros ? 2 : 1) * of_pairs));
    uint32_t codes = shared.ring + turn.at * p.plan.stage_bytes, pairs = codes + kTiles * kCodeBytes;
#pragma unroll 1
    for (uint32_t tile = tiles.first; tile < tiles.first + tiles.now(); ++tile, codes += kCodeBytes, pairs += p.plan.pairs_bytes) {
      const int64_t pairs_from = (static_cast<int64_t>(tile) * w.groups + group) * group_bytes;
      copy_bulk(codes, w.qweight + static_cast<int64_t>(tile) * tile_bytes + slice.step * Step::kBytes + begin, bytes, full);
      copy_bulk(pairs, static_cast<const uint8_t*>(w.scales) + pairs_from, of_pairs, full);
      if constexpr (kZeros) copy_bulk(pairs + kTiles * p.plan.pairs_bytes, static_cast<const uint8_t*>(w.zeros) + pairs_from, of_pairs, full);
    }
    turn.next(p.plan.ring_stages);
    if (++stage == slice.stages()) stage = 0, tiles.next();
  }
  // Those that find room at once: the weight is on its way when the kernel that gives activations ends.
  __device__ __forceinline__ void copy_first() {
    while (tiles.some() && turn.round == 0) copy();
  }
  __device__ __forceinline__ void copy_activations() const {
    const uint32_t bytes = 2 * slice.columns;
    const uint8_t* from = static_cast<const uint8_t*>(p.x) + 2 * slice.step * kStepColumns;
    mbarrier_arrive_and_expect(shared.x_there(), static_cast<uint32_t>(p.tokens) * bytes);
#pragma unroll 1
    for (uint32_t m = 0; m < p.tokens; ++m, from += 2 * p.weight.in_features)
      copy_bulk(shared.x + m * p.plan.x_stride, from, bytes, shared.x_there());
  }
  __device__ __forceinline__ void copy_rest() {
    while (tiles.some()) {
      mbarrier_wait(shared.empty(turn.at), (turn.round - 1) % 2);
      copy();
    }
  }
};

// ---- from the ring to outputs

// A warp's step of a stage, for multiply_step. With one token tile all of it is loaded at once, since each load takes some 30 clocks; two leave
// no registers for that, and more to do meanwhile.
template <class Kind, int kTiles, int kTokenTiles>
struct StreamOperands {
  static constexpr bool kHasXSums = true;
  using Step = StepCodes<Kind>;
  static constexpr int kBlocks = Step::kBytes / Step::kBlock;
  static constexpr bool kAtOnce = kTokenTiles == 1;

  const StreamParams& p;
  int lane;
  uint32_t codes_at, x_at[kTokenTiles], pairs_at;  // the lane's; pairs of the stage's first group
  uint32_t unit, first_group;                      // the step's first one; of the stage
  uint32_t group_bytes;
  uint32_t x_sums_at, slice_unit;                  // the lane's; of the slice's first group; the step's first unit from there
  uint32_t pair_stride = p.plan.pairs_bytes;
  Kind loaded_codes[kAtOnce ? kTiles : 1][kBlocks] = {};
  uint4 loaded_x[kStepUnits] = {};

  __device__ __forceinline__ void load() {
    if constexpr (kAtOnce) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
        for (int block = 0; block < kBlocks; ++block) loaded_codes[tile][block] = load_codes(tile, block);
#pragma unroll
      for (int u = 0; u < kStepUnits; ++u) loaded_x[u] = load_shared<uint4>(x_at[0] + 64 * u);
    }
  }
  __device__ __forceinline__ Kind load_codes(int tile, int block) const {
    Kind codes;
    codes.take(codes_at + tile * kStreamWarps * Step::kBytes + block * Step::kBlock, lane);
    return codes;
  }
  __device__ __forceinline__ Kind codes(int tile, int block) const {
    if constexpr (kAtOnce) return loaded_codes[tile][block];
    return load_codes(tile, block);
  }
  __device__ __forceinline__ uint4 x(int u, int j) const {
    if constexpr (kAtOnce) return loaded_x[u];
    return load_shared<uint4>(x_at[j] + 64 * u);
  }
  __device__ __forceinline__ float4 x_sums(int u, int j) const {
    const uint32_t group = j * (p.plan.slice_steps * kStepUnits >> p.plan.group_bits) + ((slice_unit + u) >> p.plan.group_bits);
    const uint4 sums = load_shared<uint4>(x_sums_at + 64 * group);
    return make_float4(as_float(sums.x), as_float(sums.y), as_float(sums.z), as_float(sums.w));
  }
  __device__ __forceinline__ uint32_t pairs(int u) const { return pairs_at + (group_of(p, unit + u) - first_group) * group_bytes; }
};

template <class Kind, class T, bool kZeros, int kTokenTiles>
struct StreamConsumer {
  using Step = StepCodes<Kind>;
  using Memory = StreamMemory<Kind, kTokenTiles>;
  static constexpr int kTiles = Memory::kTiles, kThreads = 32 * kStreamWarps;
  static constexpr int kSums = Memory::kSums, kOfThread = (kSums + kThreads - 1) / kThreads;  // of a round; of a thread of these

  static constexpr bool kSumsX = kZeros || Kind::template kRawOffset<T> != 0;
  static_assert(kSumsX == needs_x_sums(Step::kBits, kZeros, Kind::kTable, std::is_same_v<T, BFloat16> ? kBFloat16 : kFloat16));

  const StreamParams& p;
  const Memory& shared;
  int lane, warp;

  __device__ __forceinline__ StreamConsumer(const StreamParams& params, const Memory& memory)
      : p(params), shared(memory), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {}

  __device__ __forceinline__ void run() const {
    const StreamSlice slice(p);
    const uint32_t pair = pair_bytes(p.weight.scale_dtype), first_unit = kept(slice.first_unit());
    const uint32_t end_unit = kept(slice.end_unit()), stages = kept(slice.stages());
    uint32_t x_at[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      // Lanes whose token does not exist take token 0 or, in other banks, 1, and nobody stores their sums.
      const uint32_t wanted = 8 * j + lane / 4, token = wanted < p.tokens ? wanted : p.tokens > 1 ? wanted % 2 : 0;
      x_at[j] = kept(shared.x + token * p.plan.x_stride + warp * 2 * kStepColumns + 16 * (lane % 4));
    }
    const uint32_t codes_at = kept(shared.ring + warp * Step::kBytes + 16 * lane);
    const uint32_t pairs_at = shared.ring + kTiles * kStreamWarps * Step::kBytes + lane / 4 * pair;
    const uint32_t x_sums_at = kept(shared.x_sums + 16 * (lane % 4));
    if constexpr (kSumsX) add_activations(slice);
    uint32_t table = 0;
    if constexpr (Kind::kTable) table = kept(shared_address(shared.memory) + 4 * lane);
    StreamTurn turn;
    uint32_t round = 0;
    StreamTiles<kTiles> tiles(p);
    for (; tiles.some(); tiles.next(), ++round) {
      StepSums<kTiles, kTokenTiles> sums;
      for (uint32_t stage = 0; stage < stages; ++stage, turn.next(p.plan.ring_stages)) {
        mbarrier_wait(shared.full(turn.at), turn.round % 2);
        const uint32_t first = first_unit + stage * kStageUnits, unit = first + warp * kStepUnits, at = turn.at * p.plan.stage_bytes;
        if (unit < end_unit) {
          StreamOperands<Kind, kTiles, kTokenTiles> operands = {
              p, lane, codes_at + at, {}, pairs_at + at, unit, group_of(p, first), 8 * pair, x_sums_at, unit - first_unit};
#pragma unroll
          for (int j = 0; j < kTokenTiles; ++j) operands.x_at[j] = x_at[j] + stage * 2 * kStageColumns;
          operands.load();
          Kind codes[kTiles];
          multiply_step<Kind, T, kZeros, 0>(p, operands, table, codes, sums);
        }
        arrive(shared.empty(turn.at));
      }
      if (round) mbarrier_wait(shared.partial_read(), (round - 1) % 2);
      store_sums(shared.partial(), sums);
      arrive(shared.summed());
      mbarrier_wait(shared.summed(), round % 2);
      float all[kOfThread] = {};
#pragma unroll
      for (int i = 0; i < kOfThread; ++i) {
        const int at = threadIdx.x + i * kThreads;
        if (at < kSums && token_of(at) < p.tokens) all[i] = sum_of_warps<kStreamWarps, kSums>(shared.partial(), at);
      }
      arrive(shared.partial_read());
      if (p.plan.splits == 1) {
        store_outputs(all, tiles);
      } else {
        give_to_cluster(all, round);
        if (round) store_of_cluster(tiles.first - kTiles, round - 1);
      }
    }
    if (p.plan.splits > 1 && round > 0) {
      mbarrier_wait_for_cluster(shared.cluster_summed(round - 1), (round - 1) / 2 % 2);
      store_of_cluster(tiles.first - kTiles, round - 1);
    }
  }

  // The warp, when all its lanes are here.
  __device__ __forceinline__ void arrive(uint32_t barrier) const {
    sync_warp();
    if (lane == 0) mbarrier_arrive(barrier);
  }

  // Sums of activations over the units between two scales, [token tiles][groups][4 pairs of tokens][4]: those of the pair, twice.
  __device__ __forceinline__ void add_activations(const StreamSlice& slice) const {
    const uint32_t lanes = 4u << p.plan.group_bits, groups = p.plan.slice_steps * kStepUnits >> p.plan.group_bits;  // 8 columns to a lane
    const uint32_t pieces = (slice.columns + kStepColumns - 1) / kStepColumns * (kStepColumns / 8);
    for (uint32_t m = 0; m < p.tokens; ++m)
      for (uint32_t first = 32 * warp; first < pieces; first += kThreads) {
        const uint32_t piece = first + lane;
        float x[8], sum = 0.0f;
        to_floats(T{}, piece < pieces ? load_shared<uint4>(shared.x + m * p.plan.x_stride + 16 * piece) : uint4{}, x);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += x[i];
        for (uint32_t other = 1; other < lanes; other *= 2) sum += as_float(shuffle_xor(as_bits(sum), static_cast<int>(other)));
        if (piece % lanes || piece >= pieces) continue;
        float* const to = shared.x_sums_of(m / 8 * groups + piece / lanes) + m % 8 / 2 * 4 + m % 2;
        to[0] = to[2] = sum;
      }
    arrive(shared.x_summed());
    mbarrier_wait(shared.x_summed(), 0);
  }

  // Sum number `at` of a round, as warps store them.
  static __device__ __forceinline__ int row_of(int at) { return at / 16 % 8 + at / 2 % 2 * 8; }
  static __device__ __forceinline__ int token_of(int at) { return at / 128 % kTokenTiles * 8 + at / 4 % 4 * 2 + at % 2; }
  static __device__ __forceinline__ int tile_of(int at) { return at / (128 * kTokenTiles); }

  __device__ __forceinline__ void store_outputs(const float (&sums)[kOfThread], const StreamTiles<kTiles>& tiles) const {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int at = threadIdx.x + i * kThreads, m = token_of(at), tile = tile_of(at);
      const int64_t n = (static_cast<int64_t>(tiles.first) + tile) * kTileRows + row_of(at);
      if (at >= kSums || m >= p.tokens || tile >= static_cast<int>(tiles.now()) || n >= p.weight.out_features) continue;
      const float sum = p.bias ? sums[i] + load_float(p.bias, n, p.bias_dtype) : sums[i];
      store(static_cast<uint16_t*>(p.y) + m * p.weight.out_features + n, from_float(T{}, sum));
    }
  }

  // This block's sums, [kTiles][8 kTokenTiles][16 rows], to where the cluster reads them. When all have given those of the round before, all have
  // read those of three rounds ago, which these replace. Outputs are stored after the arrival, which would wait for them.
  __device__ __forceinline__ void give_to_cluster(const float (&sums)[kOfThread], uint32_t round) const {
    if (round) mbarrier_wait_for_cluster(shared.cluster_summed(round - 1), (round - 1) / 2 % 2);
    float* const to = shared.block_sums(round);
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      const int at = threadIdx.x + i * kThreads;
      if (at < kSums) to[(tile_of(at) * 8 * kTokenTiles + token_of(at)) * kTileRows + row_of(at)] = sums[i];
    }
    sync_warp();
    if (static_cast<uint32_t>(lane) < p.plan.splits) mbarrier_arrive_at_block(shared.cluster_summed(round), lane);
  }

  // This block's part of a round's outputs, four rows to a thread.
  __device__ __forceinline__ void store_of_cluster(uint32_t first_tile, uint32_t round) const {
    const uint32_t splits = p.plan.splits, share = kSums / 4 / splits;
    const StreamTiles<kTiles> all(p);
    for (uint32_t i = threadIdx.x; i < share; i += kThreads) {
      const uint32_t four = StreamSlice::rank(p) * share + i, rows = four % 4, token = four / 4 % (8 * kTokenTiles), tile = four / (32 * kTokenTiles);
      if (first_tile + tile >= all.end || token >= p.tokens) continue;
      const float4* const own = reinterpret_cast<const float4*>(shared.block_sums(round)) + four;
      const int64_t n = (static_cast<int64_t>(first_tile) + tile) * kTileRows + 4 * rows;
      if (n < p.weight.out_features) store_rows<T>(p, token, n, sum_of_cluster(own, splits));
    }
  }
};

template <class Kind, class T, bool kZeros, int kTokenTiles>
__global__ void __launch_bounds__(kStreamThreads, 2) stream_kernel(const StreamParams p) {
#ifdef HFQ_STREAM
  const StreamMemory<Kind, kTokenTiles> shared(p);
  StreamCopies<Kind, kZeros, kTokenTiles> copies(p, shared);
  const bool copies_all = threadIdx.x == 32 * kStreamWarps, consumes = threadIdx.x < 32 * kStreamWarps;
  let_next_kernel_start();
  if (copies_all) {
    shared.make_barriers(p.plan);
    copies.copy_first();
  } else if (consumes) {
    if constexpr (Kind::kTable) TableCodes::fill<T>(shared.memory, p.weight.codebook);
    // Activations of the last step behind K are zero.
    const uint32_t columns = copies.slice.columns, pieces = ((columns + kStepColumns - 1) / kStepColumns * kStepColumns - columns) / 8;
    for (uint32_t i = threadIdx.x; i < pieces * p.tokens; i += 32 * kStreamWarps)
      *reinterpret_cast<uint4*>(shared.memory + shared.kPlaces.x + i / pieces * p.plan.x_stride + 2 * columns + i % pieces * 16) = uint4{};
  }
  sync_warp();  // the lanes beside the one that copies
  if (p.plan.splits > 1)
    sync_cluster();
  else
    sync_block();
  if (copies_all) {
    wait_for_previous_kernel();
    copies.copy_activations();
    copies.copy_rest();
  } else if (consumes) {
    wait_for_previous_kernel();  // which may read what will be overwritten
    mbarrier_wait(shared.x_there(), 0);
    StreamConsumer<Kind, T, kZeros, kTokenTiles>(p, shared).run();
  }
  sync_warp();
  if (p.plan.splits > 1) sync_cluster_only();  // nobody's shared memory goes before all have read it
#endif
}

// ---- launcher

template <class Kind, class T, bool kZeros, int kTokenTiles>
const char* launch_stream_tokens(const StreamParams& p, cudaStream_t stream) {
  constexpr auto kKernel = stream_kernel<Kind, T, kZeros, kTokenTiles>;
  const uint32_t splits = p.plan.splits;
  prefer_shared(kKernel);  // two kernels' thread blocks are to share a multiprocessor, which cannot change its share of L1 while it has one
  if (splits == 1) return launch_early(kKernel, p.clusters, kStreamThreads, p.plan.shared_bytes, stream, p);
  return launch_clusters(kKernel, p.clusters * splits, splits, kStreamThreads, p.plan.shared_bytes, stream, p);
}

template <class Kind, class T, bool kZeros>
const char* launch_stream_zeros(const StreamParams& p, cudaStream_t stream) {
  return p.tokens <= 8 ? launch_stream_tokens<Kind, T, kZeros, 1>(p, stream) : launch_stream_tokens<Kind, T, kZeros, 2>(p, stream);
}

template <class Kind, class T>
const char* launch_stream_dtype(const StreamParams& p, cudaStream_t stream) {
  if constexpr (Kind::kMayHaveZeros)
    if (p.weight.zeros) return launch_stream_zeros<Kind, T, true>(p, stream);
  return launch_stream_zeros<Kind, T, false>(p, stream);
}

template <class Kind>
const char* launch_stream_of(const StreamParams& p, cudaStream_t stream) {
  return p.x_dtype == kBFloat16 ? launch_stream_dtype<Kind, BFloat16>(p, stream) : launch_stream_dtype<Kind, Float16>(p, stream);
}

}  // namespace
}  // namespace hfq
