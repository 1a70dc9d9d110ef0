// The kernel of cuda_linear for few tokens whose activations fit into shared memory, on compute capability 9.0 and later.
//
// A thread block for each multiprocessor goes through tiles of 16 rows, one after the other. One warp asks for all that comes from memory: stages of
// 1024 columns of a tile, codes and scales, by copies in bulk into a ring that all share, and activations, once. The other eight take 128 columns
// of each stage, and add up their sums after each tile. So the ring never runs dry between tiles, and copies cost next to no instructions.
//
// Two such thread blocks find room on a multiprocessor, of one kernel and the next one (let_next_kernel_start): while a kernel computes, the ring of
// its successor fills, and when it ends, that of the one behind it. What lies between two products, the end of one grid, the first
// activations, the first sums, then takes no time from the memory.
#pragma once

#include "linear_step.h"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HFQ_STREAM
#endif

namespace hfq {
namespace {

constexpr int kConsumers = 8, kStreamThreads = 32 * (kConsumers + 1);
constexpr int kStageColumns = kConsumers * kStepColumns, kStageUnits = kStageColumns / kUnitColumns;
constexpr uint32_t kLeastStages = 3, kMostStreamStages = 24;

struct StreamParams : LinearParams {
  uint32_t blocks, tiles, tile_stages;            // thread blocks; tiles of rows of the weight; stages of a tile
  uint32_t ring_stages, ring_stage_bytes;
  uint32_t pairs_bytes;                           // room for scales, or for zero points, of a tile in a stage
  uint32_t x_stride, x_bytes;                     // from a token's activations to the next one's; of all
};

// Two tiles at a time, which share loads of activations, and between whose instructions there is nothing to wait for. 8-bit codes are bytes enough.
template <class Kind>
constexpr int kStreamTiles = Kind::kUnits > 1 ? 2 : 1;

// Shared memory: the table of a codebook, sums of all warps for two rounds of tiles, barriers, activations, the ring.
template <class Kind>
struct StreamMemory {
  static constexpr uint32_t kPartialFloats = kConsumers * kStreamTiles<Kind> * 128;
  static constexpr uint32_t kTableBytes = Kind::kTable ? TableCodes::kTableBytes : 0, kBarrierBytes = 512;
  static constexpr uint32_t kPartialAt = kTableBytes, kBarriersAt = kPartialAt + 2 * kPartialFloats * 4, kXAt = kBarriersAt + kBarrierBytes;
  static_assert(8 * (2 * kMostStreamStages + 2) <= kBarrierBytes);

  uint8_t* const memory;
  uint32_t x, ring;  // shared addresses

  __device__ __forceinline__ explicit StreamMemory(const StreamParams& p)
      : memory(shared_memory()), x(shared_address(memory + kXAt)), ring(x + p.x_bytes) {}
  __device__ __forceinline__ float* partial(uint32_t round) const {
    return reinterpret_cast<float*>(memory + kPartialAt) + round % 2 * kPartialFloats;
  }
  __device__ __forceinline__ uint64_t* full(uint32_t stage) const { return reinterpret_cast<uint64_t*>(memory + kBarriersAt) + stage; }
  __device__ __forceinline__ uint64_t* empty(uint32_t stage) const { return full(kMostStreamStages + stage); }
  __device__ __forceinline__ uint64_t* summed() const { return full(2 * kMostStreamStages); }
  __device__ __forceinline__ uint64_t* x_there() const { return full(2 * kMostStreamStages + 1); }
};

// The tiles of a thread block, kTiles at a time.
template <int kTiles>
struct StreamTiles {
  uint32_t first, end;
  __device__ __forceinline__ explicit StreamTiles(const StreamParams& p) {
    const auto before = [&](uint32_t block) { return static_cast<uint32_t>(static_cast<uint64_t>(block) * p.tiles / p.blocks); };
    first = before(blockIdx.x), end = before(blockIdx.x + 1);
  }
  __device__ __forceinline__ bool some() const { return first < end; }
  __device__ __forceinline__ uint32_t now() const { return end - first < kTiles ? end - first : kTiles; }
  __device__ __forceinline__ void next() { first += kTiles; }
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

template <class Kind, bool kZeros>
struct StreamCopies {
  using Step = StepCodes<Kind>;
  static constexpr int kTiles = kStreamTiles<Kind>;
  static constexpr uint32_t kStageBytes = kConsumers * Step::kBytes;  // codes of a tile

  const StreamParams& p;
  const StreamMemory<Kind>& shared;
  StreamTiles<kTiles> tiles;
  uint32_t stage = 0;  // of these tiles, which is copied next
  uint32_t units, tile_bytes, group_bytes;
  StreamTurn turn;

  __device__ __forceinline__ StreamCopies(const StreamParams& params, const StreamMemory<Kind>& memory) : p(params), shared(memory), tiles(params) {
    const uint32_t columns = static_cast<uint32_t>(p.weight.in_features);
    units = (columns + kUnitColumns - 1) / kUnitColumns;
    tile_bytes = (columns + kBlockColumns<Step::kBits> - 1) / kBlockColumns<Step::kBits> * Step::kBlock;
    group_bytes = 8 * pair_bytes(p.weight.scale_dtype);
  }

  // The next stage, for which there has to be room.
  __device__ __forceinline__ void copy() {
    const Weight& w = p.weight;
    const uint32_t begin = stage * kStageBytes, left = tile_bytes - begin, bytes = left < kStageBytes ? left : kStageBytes;
    const uint32_t unit = stage * kStageUnits, last_unit = (unit + kStageUnits < units ? unit + kStageUnits : units) - 1;
    const uint32_t group = group_of(p, unit), of_pairs = (group_of(p, last_unit) - group + 1) * group_bytes;
    uint64_t* const full = shared.full(turn.at);
    mbarrier_arrive_and_expect(full, tiles.now() * (bytes + (kZeros ? 2 : 1) * of_pairs));
    uint32_t codes = shared.ring + turn.at * p.ring_stage_bytes, pairs = codes + kTiles * kStageBytes;
    for (uint32_t tile = tiles.first; tile < tiles.first + tiles.now(); ++tile, codes += kStageBytes, pairs += p.pairs_bytes) {
      const int64_t pairs_from = (static_cast<int64_t>(tile) * w.groups + group) * group_bytes;
      copy_bulk(codes, w.qweight + static_cast<int64_t>(tile) * tile_bytes + begin, bytes, full);
      copy_bulk(pairs, static_cast<const uint8_t*>(w.scales) + pairs_from, of_pairs, full);
      if constexpr (kZeros) copy_bulk(pairs + kTiles * p.pairs_bytes, static_cast<const uint8_t*>(w.zeros) + pairs_from, of_pairs, full);
    }
    turn.next(p.ring_stages);
    if (++stage == p.tile_stages) stage = 0, tiles.next();
  }
  // Those that find room at once: the weight is on its way when the kernel that gives activations ends.
  __device__ __forceinline__ void copy_first() {
    while (tiles.some() && turn.round == 0) copy();
  }
  __device__ __forceinline__ void copy_activations() const {
    const uint32_t bytes = 2 * static_cast<uint32_t>(p.weight.in_features);
    mbarrier_arrive_and_expect(shared.x_there(), static_cast<uint32_t>(p.tokens) * bytes);
    for (uint32_t m = 0; m < p.tokens; ++m)
      copy_bulk(shared.x + m * p.x_stride, static_cast<const uint8_t*>(p.x) + static_cast<int64_t>(m) * bytes, bytes, shared.x_there());
  }
  __device__ __forceinline__ void copy_rest() {
    while (tiles.some()) {
      mbarrier_wait(shared.empty(turn.at), (turn.round - 1) % 2);
      copy();
    }
  }
};

// ---- from the ring to outputs

// A warp's step of a stage, for multiply_step: all of it is loaded at once, since each load takes some 30 clocks.
template <class Kind>
struct StreamOperands {
  using Step = StepCodes<Kind>;
  static constexpr int kTiles = kStreamTiles<Kind>, kBlocks = Step::kBytes / Step::kBlock;

  const StreamParams& p;
  uint32_t pairs_at;                  // the lane's, of the stage's first group
  uint32_t unit, units, first_group;  // the step's first one; of the weight; of the stage
  uint32_t group_bytes, pair_stride;
  Kind blocks[kTiles][kBlocks];
  uint4 activations[kStepUnits];

  __device__ __forceinline__ void load(uint32_t codes_at, uint32_t x_at, int lane) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) blocks[tile][i].take(codes_at + tile * kConsumers * Step::kBytes + i * Step::kBlock, lane);
#pragma unroll
    for (int u = 0; u < kStepUnits; ++u) activations[u] = load_shared<uint4>(x_at + 64 * u);
  }
  __device__ __forceinline__ const Kind& codes(int tile, int block) const { return blocks[tile][block]; }
  __device__ __forceinline__ const uint4& x(int u) const { return activations[u]; }
  // Of what was in the ring before only E4M3 can be NaN, which zero times does not take away.
  __device__ __forceinline__ bool exists(int u) const { return !Kind::kMayBeNaN || unit + u < units; }
  __device__ __forceinline__ uint32_t pairs(int u) const { return pairs_at + (group_of(p, unit + u) - first_group) * group_bytes; }
};

template <class Kind, class T, bool kZeros>
__device__ __forceinline__ void multiply_stages(const StreamParams& p, const StreamMemory<Kind>& shared) {
  using Step = StepCodes<Kind>;
  constexpr int kTiles = kStreamTiles<Kind>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t pair = pair_bytes(p.weight.scale_dtype), units = (static_cast<uint32_t>(p.weight.in_features) + kUnitColumns - 1) / kUnitColumns;
  // Lanes whose token does not exist take token 0, and nobody stores their sums.
  const uint32_t token = lane / 4 < p.tokens ? lane / 4 : 0;
  const uint32_t x_at = kept(shared.x + token * p.x_stride + warp * 2 * kStepColumns + 16 * (lane % 4));
  const uint32_t codes_at = kept(shared.ring + warp * Step::kBytes + 16 * lane);
  const uint32_t pairs_at = kept(shared.ring + kTiles * kConsumers * Step::kBytes + lane / 4 * pair);
  const uint32_t table = kept(shared_address(shared.memory) + 4 * lane);
  StreamTurn turn;
  uint32_t round = 0;
  for (StreamTiles<kTiles> tiles(p); tiles.some(); tiles.next(), ++round) {
    StepSums<kTiles> sums;
    for (uint32_t stage = 0; stage < p.tile_stages; ++stage, turn.next(p.ring_stages)) {
      mbarrier_wait(shared.full(turn.at), turn.round % 2);
      const uint32_t unit = stage * kStageUnits + warp * kStepUnits, at = turn.at * p.ring_stage_bytes;
      if (unit < units) {
        StreamOperands<Kind> operands = {p, pairs_at + at, unit, units, group_of(p, stage * kStageUnits), 8 * pair, p.pairs_bytes, {}, {}};
        operands.load(codes_at + at, x_at + stage * 2 * kStageColumns, lane);
        Kind codes[kTiles];
        multiply_step<Kind, T, kZeros, kTiles, 0>(p, operands, table, codes, sums);
      }
      sync_warp();
      if (lane == 0) mbarrier_arrive(shared.empty(turn.at));
    }
    // Sums of the next tiles go to other memory, and those of the ones behind only after a barrier at which these have been read.
    float* const partial = shared.partial(round);
    store_sums(partial + warp * kTiles * 128, lane, sums);
    sync_warp();
    if (lane == 0) mbarrier_arrive(shared.summed());
    mbarrier_wait(shared.summed(), round % 2);
    store_outputs<T, kConsumers, kTiles>(p, partial, tiles.first, tiles.now(), 0);
  }
}

template <class Kind, class T, bool kZeros>
__global__ void __launch_bounds__(kStreamThreads, 2) linear_stream_kernel(const StreamParams p) {
#ifdef HFQ_STREAM
  const StreamMemory<Kind> shared(p);
  StreamCopies<Kind, kZeros> copies(p, shared);
  const bool copies_all = threadIdx.x == 32 * kConsumers;
  let_next_kernel_start();
  if (copies_all) {
    for (uint32_t i = 0; i < p.ring_stages; ++i) mbarrier_init(shared.full(i), 1), mbarrier_init(shared.empty(i), kConsumers);
    mbarrier_init(shared.summed(), kConsumers);
    mbarrier_init(shared.x_there(), 1);
    fence_proxy_async();
    copies.copy_first();
  } else if (threadIdx.x < 32 * kConsumers) {
    if constexpr (Kind::kTable) TableCodes::fill<T>(shared.memory, p.weight.codebook);
    // Activations behind K are zero.
    const uint32_t columns = static_cast<uint32_t>(p.weight.in_features), pieces = (p.x_stride - 64) / 16 - columns / 8;
    for (uint32_t i = threadIdx.x; i < pieces * p.tokens; i += 32 * kConsumers)
      *reinterpret_cast<uint4*>(shared.memory + shared.kXAt + i / pieces * p.x_stride + 2 * columns + i % pieces * 16) = uint4{};
  }
  sync_block();
  if (threadIdx.x >= 32 * kConsumers) {
    if (copies_all) {
      wait_for_previous_kernel();
      copies.copy_activations();
      copies.copy_rest();
    }
    return;
  }
  wait_for_previous_kernel();  // which may read what will be overwritten
  mbarrier_wait(shared.x_there(), 0);
  multiply_stages<Kind, T, kZeros>(p, shared);
#endif
}

// ---- launcher

// Whether the product fits: activations, and a ring of some stages. At best two thread blocks share a multiprocessor.
template <class Kind, bool kZeros>
bool plan_stream(StreamParams& p, size_t& shared_bytes) {
  using Memory = StreamMemory<Kind>;
  const Weight& w = p.weight;
  const int64_t steps = (w.in_features + kStepColumns - 1) / kStepColumns, units = w.group_size / kUnitColumns;
  const int64_t groups = w.groups == 1 ? 1 : kStageUnits % units == 0 ? kStageUnits / units : (kStageUnits - 2 + units) / units + 1;
  p.tiles = static_cast<uint32_t>((w.out_features + kTileRows - 1) / kTileRows);
  p.tile_stages = static_cast<uint32_t>((steps + kConsumers - 1) / kConsumers);
  p.pairs_bytes = static_cast<uint32_t>((groups < w.groups ? groups : w.groups) * 8 * (w.scale_dtype == kFloat32 ? 8 : 4));
  p.ring_stage_bytes = kStreamTiles<Kind> * (kConsumers * StepCodes<Kind>::kBytes + (kZeros ? 2 : 1) * p.pairs_bytes);
  // Two tokens are read at a time: the second's 64 bytes come from the other banks.
  p.x_stride = static_cast<uint32_t>(steps) * 2 * kStepColumns + 64;
  p.x_bytes = (static_cast<uint32_t>(p.tokens) * p.x_stride + 127) / 128 * 128;
  p.flush_mask = flush_mask(w, kStepUnits);
  constexpr size_t kReserved = 1 << 10;  // of each thread block; of the device's most, too
  const size_t most = most_shared_bytes(), half = (most + kReserved) / 2 - kReserved, fixed = Memory::kXAt + p.x_bytes;
  const auto stages = [&](size_t bytes) { return bytes > fixed ? static_cast<uint32_t>((bytes - fixed) / p.ring_stage_bytes) : 0; };
  p.ring_stages = stages(half) >= kLeastStages ? stages(half) : stages(most);
  if (p.ring_stages < kLeastStages) return false;
  if (p.ring_stages > kMostStreamStages) p.ring_stages = kMostStreamStages;
  const size_t bytes = fixed + size_t{p.ring_stages} * p.ring_stage_bytes, third = (most + kReserved) / 3 - kReserved + 128;
  shared_bytes = bytes < third ? third : bytes;  // no more than two, so that they are placed evenly
  return true;
}

// Whether the kernel takes the product; `error` is what the launch says.
template <class Kind, class T, bool kZeros>
bool launch_stream(const LinearParams& params, cudaStream_t stream, const char*& error) {
  if (!wants_stream(params)) return false;
  StreamParams p = {};
  static_cast<LinearParams&>(p) = params;
  size_t shared_bytes = 0;
  constexpr auto kKernel = linear_stream_kernel<Kind, T, kZeros>;
  if (!plan_stream<Kind, kZeros>(p, shared_bytes) || facts_of(kKernel).architecture < 90) return false;
  p.blocks = static_cast<uint32_t>(multiprocessors());
  if (p.blocks > p.tiles) p.blocks = p.tiles;
  error = launch_early(kKernel, p.blocks, kStreamThreads, shared_bytes, stream, p);
  return true;
}

}  // namespace
}  // namespace hfq
