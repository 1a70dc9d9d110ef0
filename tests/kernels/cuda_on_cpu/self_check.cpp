// Small kernels that show that the emulator sees mistakes, and computes what no kernel of ours asks of it yet.
#include "../../../kernels/cuda/e4m3.h"

using namespace hfq;

namespace {

struct Params {
  const uint32_t* from;  // [128]
  uint32_t* to;          // [128]
};

// Each thread of one warp copies 16 bytes through shared memory in two groups, and stores what it sees before the waits, between, and after.
void copies(Params p) {
  const unsigned lane = threadIdx.x;
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (unsigned group = 0; group < 2; ++group) {
    cp_async(shared_address(shared + 128 * group + 4 * lane), p.from + 4 * lane);
    cp_async_commit();
  }
  const uint32_t before = shared[4 * lane];
  cp_async_wait<1>();
  const uint32_t first = shared[4 * lane], second = shared[128 + 4 * lane];
  cp_async_wait<0>();
  store(p.to + 4 * lane, before);
  store(p.to + 4 * lane + 1, first);
  store(p.to + 4 * lane + 2, second);
  store(p.to + 4 * lane + 3, shared[128 + 4 * lane]);
}

// 32 rows of 16 bytes as four matrices.
void matrices(Params p) {
  const unsigned lane = threadIdx.x;
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  for (unsigned i = 0; i < 4; ++i) shared[4 * lane + i] = load(p.from + 4 * lane + i);
  sync_warp();
  uint32_t v[4];
  ldmatrix(v, shared + 4 * lane);
  for (unsigned i = 0; i < 4; ++i) store(p.to + 4 * lane + i, v[i]);
}

void shuffle(Params p) {
  const uint32_t v = shuffle_xor(load(p.from + threadIdx.x), 5);
  for (unsigned i = 0; i < 4; ++i) store(p.to + 4 * threadIdx.x + i, v);
}

// A lane's words as the A operand, two of them as the B operand.
void product_of_bytes(Params p) {
  uint32_t a[4];
  int32_t d[4] = {};
  for (unsigned i = 0; i < 4; ++i) a[i] = load(p.from + 4 * threadIdx.x + i);
  mma(d, a, a[1], a[2]);
  for (unsigned i = 0; i < 4; ++i) store(p.to + 4 * threadIdx.x + i, static_cast<uint32_t>(d[i]));
}

// 256 codes in the first 64 words.
void e4m3_as_halves(Params p) {
  for (unsigned i = 2 * threadIdx.x; i < 2 * threadIdx.x + 2; ++i) store(reinterpret_cast<uint2*>(p.to) + i, halves_of_e4m3(load(p.from + i)));
}
void e4m3_as_halves_by_shifts(Params p) {
  for (unsigned i = 2 * threadIdx.x; i < 2 * threadIdx.x + 2; ++i) store(reinterpret_cast<uint2*>(p.to) + i, halves_by_shifts(load(p.from + i)));
}

void shuffle_from_first(Params p) {
  const uint32_t v = load(p.from + threadIdx.x);
  const int first = first_lane(v % 4 == 3);
  store(p.to + 4 * threadIdx.x, static_cast<uint32_t>(first));
  store(p.to + 4 * threadIdx.x + 1, shuffle_from(v, first));
}

void neighbour_without_barrier(Params p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned i = threadIdx.x;
  shared[i] = load(p.from + i);
  store(p.to + i, shared[(i + 1) % 32]);
}

// Each thread reads what its neighbour wrote. With a barrier it may; a shuffle is none, though lanes are side by side; and nobody may write again
// before all have read.
enum class Between { kBarrier, kShuffle, kOneBarrier };
template <Between kBetween>
void neighbours(Params p) {
  uint32_t* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const unsigned i = threadIdx.x;
  for (unsigned round = 0; round < 2; ++round) {
    shared[i] = load(p.from + i) + round;
    if (kBetween == Between::kShuffle)
      shuffle_xor(0, 1);
    else
      sync_warp();
    store(p.to + 32 * round + i, shared[(i + 1) % 32]);
    if (kBetween == Between::kBarrier) sync_warp();
  }
}

void barrier_for_some(Params) {
  if (threadIdx.x < 16) sync_block();
  if (threadIdx.x >= 16) sync_warp();
}

void reads_too_far(Params p) { store(p.to, load(p.from + 128 + threadIdx.x)); }
// By a pointer, which nothing but calls for races.h looks at.
void reads_too_far_by_itself(Params p) { store(p.to + threadIdx.x, p.from[threadIdx.x + 97]); }
void writes_what_is_read_only(Params p) { store(const_cast<uint32_t*>(p.from), 1u); }
void misaligned(Params p) { store(p.to, load(reinterpret_cast<const uint4*>(p.from + 1)).x); }
void writes_behind_shared_memory(Params) { shared_memory()[2048] = 0; }

enum class Mistake { kNone, kNoProxyFence, kNoBarrier, kNoFence, kNoWait, kMemoryChanges, kRegistersChange, kOtherDescriptor, kNotAligned };

// 16 columns of 16 numbers along k, two to a word, as the second operand with the swizzle of 128 bytes. Row r of the first one picks number
// r % 16 of each column. Warp w stores its sums 2 w. The numbers come by copies, or by stores, which their threads make known before the barrier.
template <Mistake kMistake, bool kStores = false>
void wgmma_of_columns(Params p) {
  const unsigned thread = threadIdx.x, lane = thread % 32, warp = thread / 32, n = thread / 8, k = thread % 8;
  uint8_t* tile = swizzled_memory();
  if (kMistake == Mistake::kNotAligned) tile += 128;
  const uint32_t place = shared_address(tile + n * 128 + ((k / 4) ^ n % 8) * 16 + 4 * (k % 4));
  if (kStores) {
    store_shared(place, load(p.from + thread));
    if (kMistake != Mistake::kNoProxyFence) fence_proxy_async();
  } else {
    cp_async<4>(place, p.from + thread);
    cp_async_commit();
    cp_async_wait<0>();
  }
  if (kMistake != Mistake::kNoBarrier) sync_block();
  if (kMistake != Mistake::kNoProxyFence && !kStores) fence_proxy_async();
  uint64_t descriptor = uint64_t{1} << 62 | uint64_t{1024 / 16} << 32 | shared_address(tile) / 16;
  if (kMistake == Mistake::kOtherDescriptor) descriptor += 2 * warp;
  constexpr uint32_t kOne = 0x3f80;  // bfloat16
  uint32_t a[4] = {};
  for (unsigned i = 0; i < 8; ++i)
    if (lane / 4 + i / 2 % 2 * 8 == 2 * (lane % 4) + i % 2 + i / 4 * 8) a[i / 2] |= kOne << 16 * (i % 2);
  float d[8];
  if (kMistake != Mistake::kNoFence) wgmma_fence();
  wgmma(BFloat16{}, d, a, descriptor, false);
  wgmma_commit();
  if (kMistake == Mistake::kMemoryChanges) tile[thread] ^= 1;
  if (kMistake == Mistake::kRegistersChange) a[0] ^= 1;
  if (kMistake != Mistake::kNoWait) wgmma_wait<0>(d);
  store(p.to + thread, as_bits(d[2 * warp]));
  wgmma_wait<0>(d);
}

// Three warps fill two stages in turns, the fourth one adds up what is in them.
template <Mistake kMistake>
void ring(Params p) {
  const uint32_t full = shared_address(shared_memory()), empty = full + 16;
  uint32_t* stages = reinterpret_cast<uint32_t*>(shared_memory() + 64);  // [2][96]
  if (threadIdx.x == 0)
    for (int i = 0; i < 2; ++i) mbarrier_init(full + 8 * i, 96), mbarrier_init(empty + 8 * i, kMistake == Mistake::kNoBarrier ? 2 : 1);
  sync_block();
  constexpr uint32_t kRounds = 7;
  if (threadIdx.x < 96) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      if (i >= 2 && kMistake != Mistake::kMemoryChanges) mbarrier_wait(empty + 8 * (i % 2), (i / 2 - 1) % 2);
      cp_async<4>(shared_address(stages + 96 * (i % 2) + threadIdx.x), p.from + (threadIdx.x + i) % 128);
      mbarrier_arrive_after_copies(full + 8 * (i % 2));
    }
    return;
  }
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kRounds; ++i) {
    if (kMistake != Mistake::kNoWait) mbarrier_wait(full + 8 * (i % 2), i / 2 % 2);
    for (int j = 0; j < 3; ++j) sum = 3 * sum + stages[96 * (i % 2) + 32 * j + threadIdx.x % 32];
    sync_warp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty + 8 * (i % 2));
  }
  store(p.to + threadIdx.x % 32, sum);
}

// Two warps in turns. All lanes of the first one wait for the second, and one of them says so: without a barrier of the warp for itself only.
template <Mistake kMistake>
void turns(Params p) {
  const uint32_t there = shared_address(shared_memory()), back = there + 8, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(there, 1), mbarrier_init(back, 1);
  sync_block();
  for (uint32_t i = 0; i < 4; ++i) {
    if (threadIdx.x < 32) {
      if (i) mbarrier_wait(back, (i - 1) % 2);
      if (kMistake != Mistake::kNoBarrier) sync_warp();
      if (lane == 0) mbarrier_arrive(there);
    } else {
      mbarrier_wait(there, i % 2);
      sync_warp();
      if (lane == 0) mbarrier_arrive(back);
    }
  }
  store(p.to + threadIdx.x, load(p.from + threadIdx.x));
}

// The last warp fills two stages in turns, each with two copies in bulk; the first one adds up what is in them. Odd rounds lack the second piece.
template <Mistake kMistake>
void bulk_ring(Params p) {
  const uint32_t full = shared_address(shared_memory()), empty = full + 16;
  uint32_t* stages = reinterpret_cast<uint32_t*>(shared_memory() + 64);  // [2][64]
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, 1);
    if (kMistake != Mistake::kNoProxyFence) fence_proxy_async();
  }
  sync_block();
  constexpr uint32_t kRounds = 7;
  if (threadIdx.x == 96) {
    for (uint32_t i = 0; i < kRounds; ++i) {
      if (i >= 2 && kMistake != Mistake::kMemoryChanges) mbarrier_wait(empty + 8 * (i % 2), (i / 2 - 1) % 2);
      const uint32_t pieces = i % 2 ? 1 : 2, at = full + 8 * (i % 2);
      const uint32_t to = shared_address(stages + 64 * (i % 2)) + (kMistake == Mistake::kNotAligned ? 4 : 0);
      mbarrier_arrive_and_expect(at, kMistake == Mistake::kNoBarrier ? 0 : 128 * pieces);
      for (uint32_t j = 0; j < pieces; ++j) copy_bulk(to + 128 * j, p.from + 4 * i + 32 * j, 128, at);
    }
  }
  if (threadIdx.x >= 32) return;
  uint32_t sum = 0;
  for (uint32_t i = 0; i < kRounds; ++i) {
    if (kMistake != Mistake::kNoWait) mbarrier_wait(full + 8 * (i % 2), i / 2 % 2);
    for (int j = 0; j < (i % 2 ? 1 : 2); ++j) sum = 3 * sum + stages[64 * (i % 2) + 32 * j + threadIdx.x];
    sync_warp();
    if (threadIdx.x == 0) mbarrier_arrive(empty + 8 * (i % 2));
  }
  store(p.to + threadIdx.x, sum);
}

// Two blocks. One thread of each fills its half of each of two stages, in both blocks; a warp adds up what is in its own.
template <Mistake kMistake>
void shared_ring(Params p) {
  const uint32_t full = shared_address(shared_memory()), empty = full + 16, lane = threadIdx.x % 32, block = blockIdx.x;
  uint32_t* stages = reinterpret_cast<uint32_t*>(shared_memory() + 64);  // [2][64]
  constexpr bool kAlone = kMistake == Mistake::kMemoryChanges;  // stages are filled without a look at the neighbour
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) mbarrier_init(full + 8 * i, 1), mbarrier_init(empty + 8 * i, kAlone ? 1 : 2);
    if (kMistake != Mistake::kNoProxyFence) fence_mbarrier_init();
  }
  if (kMistake == Mistake::kNoBarrier)
    sync_block();
  else
    sync_cluster_only();
  constexpr uint32_t kRounds = 7;
  if (threadIdx.x == 32)
    for (uint32_t i = 0; i < kRounds; ++i) {
      const uint32_t at = full + 8 * (i % 2);
      if (i >= 2) mbarrier_wait(empty + 8 * (i % 2), (i / 2 - 1) % 2);
      mbarrier_arrive_and_expect(at, 256);
      copy_bulk_to_blocks(shared_address(stages + 64 * (i % 2) + 32 * block), p.from + 4 * i + 32 * block, 128, at, 3);
    }
  if (threadIdx.x < 32) {
    uint32_t sum = 0;
    for (uint32_t i = 0; i < kRounds; ++i) {
      if (kMistake != Mistake::kNoWait) mbarrier_wait(full + 8 * (i % 2), i / 2 % 2);
      for (int j = 0; j < 2; ++j) sum = 3 * sum + stages[64 * (i % 2) + 32 * j + lane];
      sync_warp();
      if (lane < 2 && (!kAlone || lane == block)) mbarrier_arrive_of_block(empty + 8 * (i % 2), lane);
    }
    store(p.to + 32 * block + lane, sum);
  }
  sync_warp();
  if (kMistake != Mistake::kNoFence) sync_cluster_only();
}

// A copy to the neighbour, which ends.
void copy_to_block_that_ends(Params p) {
  const uint32_t there = shared_address(shared_memory());
  if (threadIdx.x == 0) mbarrier_init(there, 1), fence_mbarrier_init();
  sync_cluster_only();
  if (threadIdx.x == 0 && blockIdx.x == 0) copy_bulk_to_blocks(there + 64, p.from, 128, there, 2);
  sync_cluster_only();
}

// Each of four blocks adds up what all have pushed to it, in their order.
template <Mistake kMistake>
void sum_of_cluster(Params p) {
  const uint32_t pushed = shared_address(shared_memory()), lane = threadIdx.x, rank = blockIdx.x;
  const float4* const parts = reinterpret_cast<const float4*>(shared_memory() + 16);  // [block][8]
  if (lane == 0) {
    mbarrier_init(pushed, 1);
    if (kMistake != Mistake::kNoFence) fence_mbarrier_init();
    mbarrier_arrive_and_expect(pushed, 4 * 8 * 16);
  }
  if (kMistake != Mistake::kNoBarrier) sync_cluster_only();
  const auto value = static_cast<float>(load(p.from + lane) + blockIdx.x);
  push_to_block(shared_address(parts + 8 * rank + lane % 8), {0, value, 0, 0}, pushed, lane / 8);
  if (kMistake == Mistake::kRegistersChange) return;
  if (kMistake != Mistake::kNoWait) mbarrier_wait_for_pushed(pushed, 0);
  if (lane >= 8) return;
  float sum = 0;
  for (uint32_t i = 0; i < 4; ++i) sum = 2 * sum + parts[8 * i + lane].y;
  store(p.to + (kMistake == Mistake::kMemoryChanges ? 0 : 8 * blockIdx.x) + lane, as_bits(sum));
}

// Two blocks that are no cluster: the second one's threads read what the first one's have written, once a flag says so. (`to` begins with the flag.)
uint64_t* flag_of(Params p) { return reinterpret_cast<uint64_t*>(p.to); }
constexpr uint64_t kTag = uint64_t{9} << 32 | 7;
template <Mistake kMistake>
void flag_between_blocks(Params p) {
  constexpr bool kBackwards = kMistake == Mistake::kOtherDescriptor;
  uint32_t* const words = p.to + 64;
  const uint32_t thread = threadIdx.x;
  if ((blockIdx.x == 0) != kBackwards) {
    store(words + thread, thread + 5);
    if (kMistake != Mistake::kNoFence) sync_warp();
    if (thread == 7 && kMistake != Mistake::kMemoryChanges) raise_flag(flag_of(p), kTag);
    if (kMistake == Mistake::kNoBarrier) store(words + thread, thread + 5);
  } else {
    if (kMistake != Mistake::kNoWait && thread == 0) wait_for_flag(flag_of(p), kTag);
    if (thread == 0 && kMistake != Mistake::kNotAligned) lower_flag(flag_of(p));
    if (kMistake != Mistake::kRegistersChange) sync_warp();
    store(p.to + 2 + thread, load_written(words + (thread + 1) % 32));
  }
}

// The same, but that the second block's first thread copies what was written.
template <Mistake kMistake>
void copy_behind_flag(Params p) {
  const uint32_t* const words = p.to + 64;
  const uint32_t thread = threadIdx.x, full = shared_address(shared_memory()), copied = full + 128;
  if (blockIdx.x == 0) {
    store(p.to + 64 + thread, thread + 5);
    sync_warp();
    if (thread == 7) raise_flag(flag_of(p), kTag);
    return;
  }
  if (thread == 0) mbarrier_init(full, 1), fence_proxy_async();
  if (kMistake == Mistake::kNoFence) fence_proxy_async_global();  // too early
  wait_for_flag(flag_of(p), kTag);
  sync_warp();
  if (thread == 0) {
    lower_flag(flag_of(p));
    if (kMistake == Mistake::kNone) fence_proxy_async_global();
    mbarrier_arrive_and_expect(full, 128);
    copy_bulk(copied, words, 128, full);
  }
  mbarrier_wait(full, 0);
  store(p.to + 2 + thread, load_shared<uint32_t>(copied + 4 * thread));
}

// Starts before the kernel has ended that gives `from` and reads what was in `to`.
template <Mistake kMistake>
void early(Params p) {
  if (kMistake == Mistake::kMemoryChanges) store(p.to + threadIdx.x, 0u);
  uint32_t v = kMistake == Mistake::kNoWait ? load_written(p.from + threadIdx.x) : 0;
  wait_for_previous_kernel();
  if (kMistake == Mistake::kNone) v = load_written(p.from + threadIdx.x);
  if (kMistake == Mistake::kNoFence) v = load(p.from + threadIdx.x);
  store(p.to + threadIdx.x, v);
}

constexpr struct {
  const char* name;
  void (*kernel)(Params);
  unsigned threads = 32, cluster = 1;
  bool early = false;
  unsigned clusters = 1;
} kKernels[] = {
    {"wgmma", wgmma_of_columns<Mistake::kNone>, 128},
    {"wgmma_no_proxy_fence", wgmma_of_columns<Mistake::kNoProxyFence>, 128},
    {"wgmma_of_stores", wgmma_of_columns<Mistake::kNone, true>, 128},
    {"wgmma_of_stores_no_proxy_fence", wgmma_of_columns<Mistake::kNoProxyFence, true>, 128},
    {"wgmma_no_barrier", wgmma_of_columns<Mistake::kNoBarrier>, 128},
    {"wgmma_no_fence", wgmma_of_columns<Mistake::kNoFence>, 128},
    {"wgmma_no_wait", wgmma_of_columns<Mistake::kNoWait>, 128},
    {"wgmma_memory_changes", wgmma_of_columns<Mistake::kMemoryChanges>, 128},
    {"wgmma_registers_change", wgmma_of_columns<Mistake::kRegistersChange>, 128},
    {"wgmma_other_descriptor", wgmma_of_columns<Mistake::kOtherDescriptor>, 128},
    {"wgmma_not_aligned", wgmma_of_columns<Mistake::kNotAligned>, 128},
    {"ring", ring<Mistake::kNone>, 128},
    {"ring_too_many_expected", ring<Mistake::kNoBarrier>, 128},
    {"ring_no_wait", ring<Mistake::kNoWait>, 128},
    {"ring_filled_too_early", ring<Mistake::kMemoryChanges>, 128},
    {"turns", turns<Mistake::kNone>, 64},
    {"turns_that_are_missed", turns<Mistake::kNoBarrier>, 64},
    {"bulk_ring", bulk_ring<Mistake::kNone>, 128},
    {"bulk_ring_nothing_expected", bulk_ring<Mistake::kNoBarrier>, 128},
    {"bulk_ring_no_wait", bulk_ring<Mistake::kNoWait>, 128},
    {"bulk_ring_filled_too_early", bulk_ring<Mistake::kMemoryChanges>, 128},
    {"bulk_ring_no_fence", bulk_ring<Mistake::kNoProxyFence>, 128},
    {"bulk_ring_not_aligned", bulk_ring<Mistake::kNotAligned>, 128},
    {"shared_ring", shared_ring<Mistake::kNone>, 64, 2},
    {"shared_ring_no_fence", shared_ring<Mistake::kNoProxyFence>, 64, 2},
    {"shared_ring_no_barrier", shared_ring<Mistake::kNoBarrier>, 64, 2},
    {"shared_ring_no_wait", shared_ring<Mistake::kNoWait>, 64, 2},
    {"shared_ring_filled_too_early", shared_ring<Mistake::kMemoryChanges>, 64, 2},
    {"shared_ring_that_ends", shared_ring<Mistake::kNoFence>, 64, 2},
    {"copy_to_block_that_ends", copy_to_block_that_ends, 32, 2},
    {"sum_of_cluster", sum_of_cluster<Mistake::kNone>, 32, 4},
    {"sum_of_cluster_no_barrier", sum_of_cluster<Mistake::kNoBarrier>, 32, 4},
    {"sum_of_cluster_no_fence", sum_of_cluster<Mistake::kNoFence>, 32, 4},
    {"sum_of_cluster_no_wait", sum_of_cluster<Mistake::kNoWait>, 32, 4},
    {"sum_of_cluster_that_ends", sum_of_cluster<Mistake::kRegistersChange>, 32, 4},
    {"sum_of_cluster_to_one_place", sum_of_cluster<Mistake::kMemoryChanges>, 32, 4},
    {"flag", flag_between_blocks<Mistake::kNone>, 32, 1, false, 2},
    {"flag_of_later_block", flag_between_blocks<Mistake::kOtherDescriptor>, 32, 1, false, 2},
    {"flag_that_nobody_raises", flag_between_blocks<Mistake::kMemoryChanges>, 32, 1, false, 2},
    {"flag_not_lowered", flag_between_blocks<Mistake::kNotAligned>, 32, 1, false, 2},
    {"flag_without_wait", flag_between_blocks<Mistake::kNoWait>, 32, 1, false, 2},
    {"flag_for_one_thread", flag_between_blocks<Mistake::kRegistersChange>, 32, 1, false, 2},
    {"flag_of_one_thread", flag_between_blocks<Mistake::kNoFence>, 32, 1, false, 2},
    {"flag_copy", copy_behind_flag<Mistake::kNone>, 32, 1, false, 2},
    {"flag_copy_no_proxy_fence", copy_behind_flag<Mistake::kNoProxyFence>, 32, 1, false, 2},
    {"flag_copy_early_fence", copy_behind_flag<Mistake::kNoFence>, 32, 1, false, 2},
    {"flag_before_the_last_write", flag_between_blocks<Mistake::kNoBarrier>, 32, 1, false, 2},
    {"early", early<Mistake::kNone>, 32, 1, true},
    {"early_write", early<Mistake::kMemoryChanges>, 32, 1, true},
    {"early_read", early<Mistake::kNoWait>, 32, 1, true},
    {"early_constant", early<Mistake::kNoFence>, 32, 1, true},
    {"copies", copies},
    {"matrices", matrices},
    {"shuffle", shuffle},
    {"product_of_bytes", product_of_bytes},
    {"e4m3_as_halves", e4m3_as_halves},
    {"e4m3_as_halves_by_shifts", e4m3_as_halves_by_shifts},
    {"shuffle_from_first", shuffle_from_first},
    {"neighbour_without_barrier", neighbour_without_barrier},
    {"neighbours", neighbours<Between::kBarrier>},
    {"neighbours_shuffle", neighbours<Between::kShuffle>},
    {"neighbours_one_barrier", neighbours<Between::kOneBarrier>},
    {"barrier_for_some", barrier_for_some},
    {"reads_too_far", reads_too_far},
    {"reads_too_far_by_itself", reads_too_far_by_itself},
    {"writes_what_is_read_only", writes_what_is_read_only},
    {"misaligned", misaligned},
    {"writes_behind_shared_memory", writes_behind_shared_memory},
};

}  // namespace

// Runs a kernel by its name.
extern "C" const char* self_check(const char* name, const uint32_t* from, uint32_t* to) {
  for (const auto& one : kKernels)
    if (std::strcmp(one.name, name) == 0) {
      const size_t shared_bytes = one.threads > 32 ? 4096 : 2048;
      going_on.clear();
      const Params params = {from, to};
      return cuda_on_cpu::run_blocks(one.clusters * one.cluster, one.cluster, one.threads, shared_bytes, one.early, [&] { one.kernel(params); });
    }
  return "no such kernel";
}
