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
    cp_async(shared + 128 * group + 4 * lane, p.from + 4 * lane);
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

void barrier_for_some(Params) {
  if (threadIdx.x < 16) sync_block();
  if (threadIdx.x >= 16) sync_warp();
}

void reads_too_far(Params p) { store(p.to, load(p.from + 128 + threadIdx.x)); }
void writes_what_is_read_only(Params p) { store(const_cast<uint32_t*>(p.from), 1u); }
void misaligned(Params p) { store(p.to, load(reinterpret_cast<const uint4*>(p.from + 1)).x); }
void writes_behind_shared_memory(Params) { shared_memory()[2048] = 0; }

constexpr struct {
  const char* name;
  void (*kernel)(Params);
} kKernels[] = {
    {"copies", copies},
    {"matrices", matrices},
    {"shuffle", shuffle},
    {"product_of_bytes", product_of_bytes},
    {"e4m3_as_halves", e4m3_as_halves},
    {"e4m3_as_halves_by_shifts", e4m3_as_halves_by_shifts},
    {"shuffle_from_first", shuffle_from_first},
    {"neighbour_without_barrier", neighbour_without_barrier},
    {"barrier_for_some", barrier_for_some},
    {"reads_too_far", reads_too_far},
    {"writes_what_is_read_only", writes_what_is_read_only},
    {"misaligned", misaligned},
    {"writes_behind_shared_memory", writes_behind_shared_memory},
};

}  // namespace

// Runs a kernel by its name with one warp.
extern "C" const char* self_check(const char* name, const uint32_t* from, uint32_t* to) {
  for (const auto& one : kKernels)
    if (std::strcmp(one.name, name) == 0) return launch<Params>(one.kernel, 1, 32, 2048, nullptr, {from, to});
  return "no such kernel";
}
