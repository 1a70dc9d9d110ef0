#include "fibers.h"

#include <dlfcn.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "races.h"

namespace cuda_on_cpu {

int multiprocessors = 1;
size_t most_shared_bytes = 227 << 10;  // of an H100
int compute_capability = 80;

namespace {

constexpr size_t kStack = 256 << 10;
constexpr uint8_t kPoison = 0xff;  // NaN in every format
constexpr uint32_t kSharedBase = 0x400;  // where shared memory begins, as on compute capability 9.0

enum class State { kReady, kInBlockBarrier, kInClusterBarrier, kInMbarrier, kInWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

constexpr uint32_t kNobody = ~0u;
struct Copies {
  std::vector<Copy> all;
  uint32_t barrier;  // at which the thread arrives then, or kNobody
};

struct Block;

struct Fiber {
  ucontext_t context;  // from which it begins
  jmp_buf place;       // where it goes on
  bool begun;
  State state;
  unsigned thread;
  Block* block;
  uint32_t fenced;             // the last copy that it has made known to wgmma
  bool behind_flag;            // knows of other blocks' writes, which it has not made known to copies
  std::vector<uint32_t> stored;  // words that it has not made known
  uint32_t barrier;            // at which it waits
  bool waited;                 // for the kernel in front
  std::vector<Copy> copies;    // not committed
  std::vector<Copies> groups;  // committed, oldest first
  uint32_t committed, finished;  // groups so far
};

struct Warp {
  const char* name = nullptr;  // of what its lanes do together
  void* operands[32];
  int arrived = 0;
  // What goes on beside its threads.
  using Later = std::vector<std::function<void()>>;
  Later begun;                // not committed
  std::vector<Later> groups;  // committed, oldest first
  size_t started = 0;         // so far
  uint32_t committed = 0;     // groups so far
  bool fenced = false;
};

struct Mbarrier {
  uint32_t count, left, phase;
  int64_t bytes;      // that are expected and have not come
  unsigned maker;     // thread, of all of the cluster
  bool known;         // to copies in bulk
  bool fenced;        // to be known to the cluster after its next barrier
  bool everywhere;    // is
  unsigned clock;     // of its phases
  uint32_t made;      // at this time of its maker
  races::Clock told, ended;  // what those that wait learn from arrivals: of the phase, and of the one that has ended
  races::Clock arrived;  // how far those had come that have arrived
  bool of_copies;        // some of them by cp.async: `told` has less
  // Who waits for this phase or has waited for the one before, and at which time of its own it went on; 0: not yet.
  struct Wait {
    unsigned thread;
    uint32_t phase, time;
  };
  std::vector<Wait> waits;
};

struct BulkCopy {
  Copy copy;
  uint32_t barrier;
  std::vector<uint8_t> pushed;  // in place of global memory
};

struct Block {
  unsigned index;
  int in_barrier, ended;
  std::vector<Warp> warps;
  std::vector<uint8_t> shared;
  uint8_t* shared_begin;
  uint32_t copies;                          // that are finished
  std::vector<uint32_t> copied;             // of each word of shared memory, by which of them
  std::vector<uint32_t> stored;             // and by which thread, if that has made it known to nobody
  std::map<uint32_t, Mbarrier> mbarriers;   // by their places in shared memory
  std::vector<BulkCopy> bulk_copies;        // on the way
  std::map<unsigned, uint32_t> uses;        // by threads of other blocks and by their copies: whose clock, and its time for the last one
  std::vector<std::vector<uint64_t>> what;  // of each warpgroup, what its warps have started
};

struct Range {
  const uint8_t* begin;
  size_t bytes;
  Access access;
};

jmp_buf scheduler;
std::vector<std::unique_ptr<uint8_t[]>> stacks;
std::vector<Fiber> fibers;
std::vector<Block> cluster;  // those that run
std::vector<Range> ranges;
size_t shared_size;
Fiber* current;
unsigned threads;  // of a block
int in_cluster_barrier, done;
bool starts_early;
bool arrived;  // the thread that has just run, at a barrier in shared memory
const void* launcher;  // where its stack ends
std::set<const void*> raised;  // flags
int quiet;  // what the emulator reads and writes for a kernel is not the kernel's
const std::function<void()>* body;
std::string message;

// Fibers change places by `_longjmp`: swapcontext asks the kernel for the signal mask each time, which took most of the time of all tests. Nobody
// else's frames lie between, and a frame that is left stays as it was until somebody comes back to it.

// From the fiber that runs to the scheduler.
void step_aside() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler, 1);
}

// From the scheduler to a fiber, until that steps aside.
void go_on(Fiber& fiber) {
  if (_setjmp(scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}

void leave(State state) {
  current->state = state;
  step_aside();
}

unsigned number_of(const Fiber& fiber) { return static_cast<unsigned>(&fiber - fibers.data()); }

// Nothing has to come, and one of its threads at least has waited for others and their copies that used it.
void check_end(const Block& block) {
  if (!block.bulk_copies.empty()) message = "a block ends while copies to it are on the way";
  const unsigned first = static_cast<unsigned>(&block - cluster.data()) * threads;
  for (const auto& [whose, time] : block.uses) {
    bool known = false;
    for (unsigned i = first; i < first + threads && !known; ++i) known = races::knows_step(i, whose, time);
    if (!known) message = "a block may end before others are done with it";
  }
}

void run_fiber() {
  (*body)();
  ++done;
  if (++current->block->ended == static_cast<int>(threads)) check_end(*current->block);
  leave(State::kDone);
}

void start(unsigned number) {
  Fiber& fiber = fibers[number];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks[number].get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.begun = false;
  fiber.state = State::kReady;
  fiber.thread = number % threads;
  fiber.block = &cluster[number / threads];
  fiber.fenced = 0, fiber.behind_flag = false;
  fiber.waited = !starts_early;
  fiber.stored.clear();
  fiber.copies.clear();
  fiber.groups.clear();
  fiber.committed = fiber.finished = 0;
  makecontext(&fiber.context, run_fiber, 0);
}

bool within(const void* p, size_t bytes, const uint8_t* begin, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(p), first = reinterpret_cast<uintptr_t>(begin);
  return at >= first && at + bytes <= first + size;
}

Warp& current_warp() { return current->block->warps[current->thread / 32]; }

void clear(Block& block, unsigned index) {
  block.index = index;
  block.in_barrier = block.ended = 0;
  block.warps.assign(threads / 32, Warp{});
  block.shared.assign(shared_size + 128, kPoison);
  block.shared_begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(block.shared.data()) + 127) & ~uintptr_t{127});
  block.copies = 0;
  block.copied.assign(shared_size / 4 + 1, 0);
  block.stored.assign(shared_size / 4 + 1, kNobody);
  block.mbarriers.clear();
  block.bulk_copies.clear();
  block.uses.clear();
  block.what.assign((threads + 127) / 128, {});
}

bool wrote_behind(const Block& block) {
  const auto untouched = [](uint8_t byte) { return byte == kPoison; };
  return !std::all_of(static_cast<const uint8_t*>(block.shared_begin) + shared_size, block.shared.data() + block.shared.size(), untouched);
}

void wake(State waiting, const Block* of) {
  for (Fiber& fiber : fibers)
    if (fiber.state == waiting && (!of || fiber.block == of)) fiber.state = State::kReady;
}

// Who waits names the last bit of its phase. If it has not seen that the phase has ended when the next one does, it waits for one more.
void see_late_waits(Mbarrier& barrier) {
  for (const Mbarrier::Wait& wait : barrier.waits) {
    const uint32_t known = wait.thread < barrier.arrived.size() ? barrier.arrived[wait.thread] : 0;
    if (wait.phase + 1 == barrier.phase && (wait.time == 0 || wait.time > known)) message = "a thread may wait so late that its phase is over";
  }
  const auto is_over = [&](const Mbarrier::Wait& wait) { return wait.phase + 1 <= barrier.phase; };
  barrier.waits.erase(std::remove_if(barrier.waits.begin(), barrier.waits.end(), is_over), barrier.waits.end());
}

// If all have come.
void end_phase(Block& block, uint32_t place) {
  Mbarrier& barrier = block.mbarriers.at(place);
  if (barrier.left || barrier.bytes) return;
  if (races::wanted) see_late_waits(barrier);
  barrier.left = barrier.count;
  ++barrier.phase;
  if (races::wanted) {
    races::tell_time(barrier.told, barrier.clock, barrier.phase);
    barrier.ended = barrier.told;
  }
  for (Fiber& fiber : fibers)
    if (fiber.state == State::kInMbarrier && fiber.block == &block && fiber.barrier == place) fiber.state = State::kReady;
}

void arrive(Block& block, uint32_t place) {
  const auto found = block.mbarriers.find(place);
  if (found == block.mbarriers.end()) {
    message = "arrival at a barrier that nobody has made";
    return;
  }
  Mbarrier& barrier = found->second;
  if (barrier.left == 0) {
    message = "more arrivals at a barrier than it counts";
    return;
  }
  --barrier.left;
  end_phase(block, place);
}

// `number`: of the copy, for those that ordinary reads see before wgmma does; or 0.
void finish(Block& block, const Copy& copy, uint32_t number) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
  const auto first = static_cast<uint32_t>(static_cast<uint8_t*>(copy.to) - block.shared_begin) / 4;
  for (uint32_t word = first; word < first + copy.bytes / 4; ++word) block.copied[word] = number, block.stored[word] = kNobody;
}

void finish_oldest(Fiber& fiber) {
  Block& block = *fiber.block;
  const Copies group = std::move(fiber.groups.front());
  fiber.groups.erase(fiber.groups.begin());
  ++block.copies, ++fiber.finished;
  for (const Copy& copy : group.all) finish(block, copy, block.copies);
  const unsigned number = number_of(fiber), clock = races::clock_of_copies(number);
  if (group.barrier != kNobody) {
    if (races::wanted) races::tell_time(block.mbarriers[group.barrier].told, clock, fiber.finished);
    arrive(block, group.barrier);
  } else if (races::wanted) {
    races::learn_time(number, clock, fiber.finished);
  }
}

void finish_bulk_copy(Block& block, size_t number) {
  BulkCopy bulk = block.bulk_copies[number];
  block.bulk_copies.erase(block.bulk_copies.begin() + static_cast<std::ptrdiff_t>(number));
  if (!bulk.pushed.empty()) bulk.copy.from = bulk.pushed.data();
  finish(block, bulk.copy, 0);
  block.mbarriers.at(bulk.barrier).bytes -= static_cast<int64_t>(bulk.copy.bytes);
  end_phase(block, bulk.barrier);
}

// What arrives by itself does so when nobody can go on without it.
bool finish_something(std::minstd_rand& random) {
  const size_t first_block = random() % cluster.size();
  for (size_t i = 0; i < cluster.size(); ++i) {
    Block& block = cluster[(first_block + i) % cluster.size()];
    if (block.bulk_copies.empty()) continue;
    finish_bulk_copy(block, random() % block.bulk_copies.size());
    return true;
  }
  const size_t first = random() % fibers.size();
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[(first + i) % fibers.size()];
    const auto arrives = [](const Copies& group) { return group.barrier != kNobody; };
    if (!std::any_of(fiber.groups.begin(), fiber.groups.end(), arrives)) continue;
    finish_oldest(fiber);
    return true;
  }
  return false;
}

// Threads in one order or another until all are done; false if they wait for each other. A warp runs until it waits for others: as far apart
// as warps can get, every second time; or each of its threads once, then the next warp's: side by side.
bool run_cluster(std::minstd_rand& random, bool apart) {
  std::vector<unsigned> order(fibers.size() / 32), lanes(32);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
  for (unsigned i = 0; i < lanes.size(); ++i) lanes[i] = i;
  for (unsigned i = 0; i < fibers.size(); ++i) start(i);
  std::shuffle(order.begin(), order.end(), random);
  std::shuffle(lanes.begin(), lanes.end(), random);
  done = in_cluster_barrier = 0;
  arrived = false;
  while (done < static_cast<int>(fibers.size())) {
    bool moved = false;
    for (const unsigned warp : order) {
      for (bool again = true; again;) {
        again = false;
        const size_t first = random() % 32;
        for (size_t i = 0; i < 32; ++i) {
          Fiber& fiber = fibers[32 * warp + lanes[(first + i) % 32]];
          if (fiber.state != State::kReady) continue;
          moved = true;
          again = apart;
          current = &fiber;
          go_on(fiber);
          current = nullptr;
          if (!message.empty()) return false;
          if (!arrived) continue;
          // What it did not wait for, and what its warp does later, others may have to do without.
          arrived = again = false;
          if (random() % 2)
            while (finish_something(random)) continue;
          if (!message.empty()) return false;
          break;
        }
      }
    }
    if (!moved && !finish_something(random)) {
      message = "threads wait for others that have ended or wait elsewhere";
      return false;
    }
    if (!message.empty()) return false;
  }
  return true;
}

}  // namespace

Index thread_index() { return {current->thread}; }
Index block_index() { return {current->block->index}; }
Index block_size() { return {threads}; }

const char* run_blocks(unsigned blocks, unsigned cluster_blocks, unsigned block_threads, size_t shared_bytes, bool early,
                       const std::function<void()>& kernel) {
  message.clear();
  threads = block_threads;
  if (threads == 0 || threads % 32 || threads > 1024) return "a block has 32 to 1024 threads, a multiple of 32";
  if (cluster_blocks == 0 || cluster_blocks > 8 || blocks % cluster_blocks) return "clusters have 1 to 8 blocks, and all as many";
  if (shared_bytes > most_shared_bytes) return "more shared memory than a block may have";
  body = &kernel;
  starts_early = early;
  shared_size = shared_bytes;
  fibers.resize(cluster_blocks * threads);
  cluster.resize(cluster_blocks);
  while (stacks.size() < fibers.size()) stacks.push_back(std::make_unique<uint8_t[]>(kStack));
  quiet = 0;
  launcher = __builtin_frame_address(0);
  if (races::wanted) races::begin_launch();
  raised.clear();
  std::minstd_rand random(1);
  for (unsigned first = 0; first < blocks; first += cluster_blocks) {
    for (unsigned i = 0; i < cluster_blocks; ++i) clear(cluster[i], first + i);
    if (races::wanted) {
      std::vector<races::Memory> shared;
      for (const Block& block : cluster) shared.push_back({block.shared_begin, shared_size});
      races::begin_cluster(static_cast<unsigned>(fibers.size()), shared);
    }
    if (!run_cluster(random, first / cluster_blocks % 2 == 0)) return message.c_str();
    if (std::any_of(cluster.begin(), cluster.end(), wrote_behind)) {
      message = "write behind the end of shared memory";
      return message.c_str();
    }
  }
  return raised.empty() ? nullptr : "a flag that nobody lowers: the same launch of a graph would find it";
}

void fail(const char* what) {
  message = what;
  step_aside();
  __builtin_unreachable();
}

void sync_block() {
  Block& block = *current->block;
  if (++block.in_barrier < static_cast<int>(threads)) return leave(State::kInBlockBarrier);
  block.in_barrier = 0;
  if (races::wanted) races::meet(number_of(*current) - current->thread, threads);
  wake(State::kInBlockBarrier, &block);
}

void sync_cluster() {
  if (++in_cluster_barrier < static_cast<int>(fibers.size())) return leave(State::kInClusterBarrier);
  in_cluster_barrier = 0;
  if (races::wanted) races::meet_steps(0, static_cast<unsigned>(fibers.size()));
  for (Block& block : cluster)
    for (auto& [place, barrier] : block.mbarriers) barrier.everywhere = barrier.fenced;
  wake(State::kInClusterBarrier, nullptr);
}

void together(const char* name, void* operands, void (*work)(void** all)) {
  Warp& warp = current_warp();
  if (warp.arrived && std::strcmp(warp.name, name) != 0) fail("lanes of a warp do different things together");
  warp.name = name;
  warp.operands[current->thread % 32] = operands;
  if (++warp.arrived < 32) return leave(State::kInWarp);
  warp.arrived = 0;
  ++quiet;
  work(warp.operands);
  --quiet;
  Fiber* const first = current - current->thread % 32;
  for (Fiber* fiber = first; fiber < first + 32; ++fiber)
    if (fiber->state == State::kInWarp) fiber->state = State::kReady;
}

void order_warp() {
  if (races::wanted) races::meet(number_of(*current) / 32 * 32, 32);
}

uint8_t* shared_memory() { return current->block->shared_begin; }

namespace {

void check_order(const Range& range, Way way) {
  if (!starts_early || range.access == Access::kConstant) return;
  if (way == Way::kConstantLoad && range.access == Access::kFromBefore) fail("a load of constants reads what the kernel in front writes");
  if (!current->waited) fail("memory that the kernel in front may use before it was waited for");
}

}  // namespace

void check_shared(const void* p, size_t bytes) {
  if (!within(p, bytes, shared_memory(), shared_size)) fail("access outside of shared memory");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access to shared memory");
}

uint32_t shared_address(const void* p) {
  if (!within(p, 0, shared_memory(), shared_size)) fail("address outside of shared memory");
  return kSharedBase + static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_memory());
}

uint8_t* at_shared_address(uint32_t address, size_t bytes) {
  uint8_t* p = shared_memory() + (static_cast<int64_t>(address) - kSharedBase);
  check_shared(p, bytes);
  return p;
}

namespace {

Block& running_block(unsigned rank) {
  if (rank >= cluster.size()) fail("no such block in the cluster");
  Block& block = cluster[rank];
  if (block.ended == static_cast<int>(threads)) fail("use of a block that has ended");
  return block;
}

Block& block_of_rank(unsigned rank) {
  Block& block = running_block(rank);
  if (races::wanted && &block != current->block) block.uses[number_of(*current)] = races::time_of(number_of(*current));
  return block;
}

}  // namespace

void allow(const void* p, size_t bytes, Access access) { ranges.push_back({static_cast<const uint8_t*>(p), bytes, access}); }

void forget_all() { ranges.clear(); }

void check_global(const void* p, size_t bytes, Way way) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access to global memory");
  const bool write = way == Way::kStore;
  for (const Range& range : ranges) {
    if (!within(p, bytes, range.begin, range.bytes) || (write && range.access != Access::kWritten)) continue;
    check_order(range, way);
    return;
  }
  fail(write ? "write outside of global memory" : "read outside of global memory");
}

void check_range(const void* p, size_t bytes) {
  for (const Range& range : ranges)
    if (within(p, bytes, range.begin, range.bytes)) return check_order(range, Way::kLoad);
  fail("read outside of global memory");
}

void wait_for_previous_kernel() { current->waited = true; }

namespace {

// Memory of blocks that run, or that this kernel may write.
bool is_watched(const void* p, size_t bytes) {
  for (const Block& block : cluster)
    if (within(p, bytes, block.shared_begin, shared_size)) return true;
  return std::any_of(ranges.begin(), ranges.end(),
                     [&](const Range& range) { return range.access == Access::kWritten && within(p, bytes, range.begin, range.bytes); });
}

bool is_allowed(const void* p, size_t bytes) {
  return std::any_of(ranges.begin(), ranges.end(), [&](const Range& range) { return within(p, bytes, range.begin, range.bytes); });
}

// Constants of the program, and what the launcher has on its stack: a kernel's parameters.
bool is_of_program(const void* p) {
  Dl_info info;
  return p >= static_cast<const void*>(launcher) || dladdr(p, &info) != 0;
}

void see(const char* race) {
  if (race) fail(race);
}

void access_later(unsigned clock, uint32_t time, const void* p, size_t bytes, bool writes) {
  if (races::wanted && is_watched(p, bytes)) see(races::access_later(number_of(*current), clock, time, p, bytes, writes));
}

// A barrier of which this thread knows.
Mbarrier& known(Mbarrier& barrier) {
  if (!barrier.everywhere && !races::knows(number_of(*current), barrier.maker, barrier.made)) fail("a barrier that may not have been made yet");
  return barrier;
}

}  // namespace

void accessed(const void* p, size_t bytes, bool writes) {
  if (!races::wanted || !current || !is_watched(p, bytes)) return;
  see(races::access(number_of(*current), p, bytes, writes));
}

void accessed_by_kernel(const void* p, size_t bytes, bool writes) {
  if (!races::wanted || !current || quiet || within(p, 0, stacks[number_of(*current)].get(), kStack)) return;
  if (is_watched(p, bytes)) return see(races::access(number_of(*current), p, bytes, writes));
  if (writes) fail("write to memory that is no GPU's");
  if (!is_allowed(p, bytes) && !is_of_program(p)) fail("read of memory that is no GPU's");
}

void read_by_wgmma(uint32_t address, size_t bytes) {
  const unsigned warp = number_of(*current) / 32;
  access_later(races::clock_of_wgmma(warp), current_warp().committed + 1, at_shared_address(address, bytes), bytes, false);
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_shared(to, bytes);
  const unsigned clock = races::clock_of_copies(number_of(*current));
  access_later(clock, current->committed + 1, to, bytes, true);
  if (from) access_later(clock, current->committed + 1, from, bytes, false);
  std::memset(to, kPoison, bytes);
  current->copies.push_back({to, from, bytes});
}

void commit_copies() {
  ++current->committed;
  current->groups.push_back({std::move(current->copies), kNobody});
  current->copies.clear();
}

void finish_copies(int pending) {
  while (static_cast<int>(current->groups.size()) > pending) finish_oldest(*current);
}

void store_shared(uint32_t address, const void* from, size_t bytes) {
  uint8_t* const to = at_shared_address(address, bytes);
  accessed(to, bytes, true);
  std::memcpy(to, from, bytes);
  for (uint32_t word = (address - kSharedBase) / 4; word < (address - kSharedBase + bytes) / 4; ++word) {
    current->block->copied[word] = 0;
    current->block->stored[word] = current->thread;
    current->stored.push_back(word);
  }
}

void fence_proxy_async() {
  current->fenced = current->block->copies;
  for (const uint32_t word : current->stored)
    if (uint32_t& thread = current->block->stored[word]; thread == current->thread) thread = kNobody;
  current->stored.clear();
  for (auto& [place, barrier] : current->block->mbarriers)
    if (barrier.maker == number_of(*current)) barrier.known = true;
}

void fence_proxy_async_global() { current->behind_flag = false; }

void fence_mbarrier_init() {
  for (auto& [place, barrier] : current->block->mbarriers)
    if (barrier.maker == number_of(*current)) barrier.known = barrier.fenced = true;
}

bool unfenced(uint32_t address, size_t bytes) {
  const Fiber* const first = current - current->thread % 32;
  uint32_t fenced = first->fenced;
  for (const Fiber* fiber = first; fiber < first + 32; ++fiber) fenced = std::min(fenced, fiber->fenced);
  for (uint32_t word = (address - kSharedBase) / 4; word < (address - kSharedBase + bytes) / 4; ++word)
    if (current->block->copied[word] > fenced || current->block->stored[word] != kNobody) return true;
  return false;
}

namespace {

uint32_t place(uint32_t barrier) { return static_cast<uint32_t>(at_shared_address(barrier, 8) - shared_memory()); }

}  // namespace

void mbarrier_init(uint32_t barrier, uint32_t count) {
  if (count == 0) fail("a barrier of nobody");
  Mbarrier& made = current->block->mbarriers[place(barrier)] = {};
  made.count = made.left = count;
  made.maker = number_of(*current);
  if (races::wanted) made.clock = races::clock_of_barrier(), made.made = races::time_of(number_of(*current));
}

namespace {

// The barrier there, which the thread may use; null if nobody has made one.
Mbarrier* found_at(Block& block, uint32_t barrier) {
  const auto found = block.mbarriers.find(place(barrier));
  if (found == block.mbarriers.end()) return nullptr;
  if (&block != current->block && !found->second.everywhere) fail("use of another block's barrier that is not known to the cluster");
  return &found->second;
}

void arrive_at(Block& block, uint32_t barrier) {
  Mbarrier* const found = found_at(block, barrier);
  if (races::wanted && found) {
    Mbarrier& told = known(*found);
    races::tell_steps(number_of(*current), told.arrived);
    races::tell(number_of(*current), told.told);
  }
  arrive(block, place(barrier));
  if (!message.empty()) fail(message.c_str());
  arrived = true;
  leave(State::kReady);
}

}  // namespace

void mbarrier_arrive(uint32_t barrier) { arrive_at(*current->block, barrier); }
void mbarrier_arrive_of_block(uint32_t barrier, unsigned rank) { arrive_at(block_of_rank(rank), barrier); }

void mbarrier_arrive_after_copies(uint32_t barrier) {
  const auto found = current->block->mbarriers.find(place(barrier));
  if (races::wanted && found != current->block->mbarriers.end()) {
    Mbarrier& told = known(found->second);
    told.of_copies = true;
    races::tell_steps(number_of(*current), told.arrived);
    races::pass_on(number_of(*current), told.told);
  }
  ++current->committed;
  current->groups.push_back({std::move(current->copies), place(barrier)});
  current->copies.clear();
}

void mbarrier_wait(uint32_t barrier, uint32_t bit) {
  const auto found = current->block->mbarriers.find(place(barrier));
  if (found == current->block->mbarriers.end()) fail("wait at a barrier that nobody has made");
  const unsigned number = number_of(*current);
  const uint32_t phase = found->second.phase - (found->second.phase % 2 == bit ? 0 : 1);
  if (races::wanted) found->second.waits.push_back({number, phase, 0});
  while (found->second.phase % 2 == bit) {
    current->barrier = found->first;
    leave(State::kInMbarrier);
  }
  if (!races::wanted) return;
  for (Mbarrier::Wait& wait : found->second.waits)
    if (wait.thread == number && wait.phase == phase) wait.time = races::time_of(number);
  races::learn(number, known(found->second).ended);
  if (found->second.of_copies) races::learn_steps(number, found->second.arrived);
}

void mbarrier_arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  const auto found = current->block->mbarriers.find(place(barrier));
  if (found != current->block->mbarriers.end()) found->second.bytes += bytes;
  mbarrier_arrive(barrier);
}

namespace {

// From global memory, or of what is `pushed`.
void begin_copy(Block& block, uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, std::vector<uint8_t> pushed = {}) {
  Mbarrier* const found = found_at(block, barrier);
  if (!found || !found->known) fail("copy_bulk for a barrier that no fence.proxy.async covers");
  if (bytes == 0) fail("copy_bulk of nothing");
  if (current->behind_flag) fail("copy_bulk behind a flag without fence.proxy.async.global");
  uint8_t* const to = block.shared_begin + (static_cast<int64_t>(shared) - kSharedBase);
  if (!within(to, bytes, block.shared_begin, shared_size)) fail("copy_bulk outside of shared memory");
  if (races::wanted) {
    const Mbarrier& counts = known(*found);
    if (&block != current->block) block.uses[counts.clock] = counts.phase + 1;
    access_later(counts.clock, counts.phase + 1, to, bytes, true);
    if (global) access_later(counts.clock, counts.phase + 1, global, bytes, false);
  }
  std::memset(to, kPoison, bytes);
  block.bulk_copies.push_back({{to, global, bytes}, place(barrier), std::move(pushed)});
}

}  // namespace

void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  begin_copy(*current->block, shared, global, bytes, barrier);
}

void copy_bulk_to_blocks(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint32_t blocks) {
  if (blocks == 0) fail("copy_bulk to nobody");
  for (unsigned rank = 0; rank < 32; ++rank)
    if (blocks >> rank & 1) begin_copy(running_block(rank), shared, global, bytes, barrier);
}

void push_to_block(uint32_t shared, const void* value, uint32_t bytes, uint32_t barrier, unsigned rank) {
  if (shared % bytes) fail("misaligned push_to_block");
  const auto* const begin = static_cast<const uint8_t*>(value);
  begin_copy(running_block(rank), shared, nullptr, bytes, barrier, {begin, begin + bytes});
}

void raise_flag(uint64_t* flag, uint64_t tag) {
  if (tag == 0) fail("a tag that memory of zeros has");
  if (!raised.insert(flag).second) fail("a flag that is raised twice");
  if (races::wanted) races::raise(number_of(*current), flag);
  *flag = tag;
}

void wait_for_flag(const uint64_t* flag, uint64_t tag) {
  if (*flag != tag || !raised.count(flag)) fail("a wait for what no block before this one does");
  if (races::wanted) races::see(number_of(*current), flag);
  current->behind_flag = true;
}

void lower_flag(uint64_t* flag) {
  if (!raised.erase(flag)) fail("a flag that is lowered and not raised");
  *flag = 0;
}

void fence_registers() { current_warp().fenced = true; }

void start_later(uint64_t what, const std::function<void()>& work) {
  Warp& warp = current_warp();
  if (!warp.fenced) fail("wgmma without wgmma.fence before the first one of a group");
  auto& all = current->block->what[current->thread / 128];
  if (threads % 128) fail("wgmma needs groups of four warps");
  if (warp.started == all.size()) all.push_back(what);
  if (all[warp.started++] != what) fail("warps of a group start different instructions");
  warp.begun.push_back(work);
}

void commit_later() {
  Warp& warp = current_warp();
  warp.fenced = false;
  ++warp.committed;
  warp.groups.push_back(std::move(warp.begun));
  warp.begun.clear();
}

void finish_later(int pending) {
  auto& groups = current_warp().groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const auto& work : groups.front()) work();
    groups.erase(groups.begin());
  }
  if (!races::wanted) return;
  const unsigned first = number_of(*current) / 32 * 32;
  const auto finished = static_cast<uint32_t>(current_warp().committed - groups.size());
  for (unsigned i = first; i < first + 32; ++i) races::learn_time(i, races::clock_of_wgmma(first / 32), finished);
}

}  // namespace cuda_on_cpu
