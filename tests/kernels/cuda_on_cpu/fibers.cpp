#include "fibers.h"

#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

namespace cuda_on_cpu {

int multiprocessors = 1;
size_t most_shared_bytes = 227 << 10;  // of an H100

namespace {

constexpr size_t kStack = 256 << 10;
constexpr uint8_t kPoison = 0xff;  // NaN in every format

enum class State { kReady, kInBlockBarrier, kInWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  State state;
  unsigned thread;
  std::vector<Copy> copies;               // not committed
  std::vector<std::vector<Copy>> groups;  // committed, oldest first
};

struct Warp {
  const char* name = nullptr;  // of what its lanes do together
  void* operands[32];
  int arrived = 0;
};

struct Range {
  const uint8_t* begin;
  size_t bytes;
  bool writable;
};

ucontext_t scheduler;
std::vector<std::unique_ptr<uint8_t[]>> stacks;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
std::vector<Range> ranges;
std::vector<uint8_t> shared;
uint8_t* shared_begin;
size_t shared_size;
Fiber* current;
unsigned block, threads;
int in_barrier, done;
const std::function<void()>* body;
std::string message;

void leave(State state) {
  current->state = state;
  swapcontext(&current->context, &scheduler);
}

void run_fiber() {
  (*body)();
  ++done;
  leave(State::kDone);
}

void start(unsigned thread) {
  Fiber& fiber = fibers[thread];
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stacks[thread].get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  fiber.state = State::kReady;
  fiber.thread = thread;
  fiber.copies.clear();
  fiber.groups.clear();
  makecontext(&fiber.context, run_fiber, 0);
}

bool within(const void* p, size_t bytes, const uint8_t* begin, size_t size) {
  const auto at = reinterpret_cast<uintptr_t>(p), first = reinterpret_cast<uintptr_t>(begin);
  return at >= first && at + bytes <= first + size;
}

// Threads in one order or another until all are done; false if they wait for each other.
bool run_block(std::minstd_rand& random) {
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  for (unsigned i = 0; i < threads; ++i) start(i);
  std::shuffle(order.begin(), order.end(), random);
  done = in_barrier = 0;
  while (done < static_cast<int>(threads)) {
    bool moved = false;
    for (const unsigned thread : order) {
      if (fibers[thread].state != State::kReady) continue;
      moved = true;
      current = &fibers[thread];
      swapcontext(&scheduler, &current->context);
      if (!message.empty()) return false;
    }
    if (!moved) {
      message = "threads wait for others that have ended or wait elsewhere";
      return false;
    }
  }
  return true;
}

}  // namespace

Index thread_index() { return {current->thread}; }
Index block_index() { return {block}; }
Index block_size() { return {threads}; }

const char* run_blocks(unsigned blocks, unsigned block_threads, size_t shared_bytes, const std::function<void()>& kernel) {
  message.clear();
  threads = block_threads;
  if (threads == 0 || threads % 32 || threads > 1024) return "a block has 32 to 1024 threads, a multiple of 32";
  body = &kernel;
  fibers.resize(threads);
  while (stacks.size() < threads) stacks.push_back(std::make_unique<uint8_t[]>(kStack));
  shared.assign(shared_bytes + 128, kPoison);
  shared_begin = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(shared.data()) + 127) & ~uintptr_t{127});
  shared_size = shared_bytes;
  std::minstd_rand random(1);
  for (block = 0; block < blocks; ++block) {
    std::fill(shared.begin(), shared.end(), kPoison);
    warps.assign(threads / 32, Warp{});
    if (!run_block(random)) return message.c_str();
    const auto untouched = [](uint8_t byte) { return byte == kPoison; };
    if (!std::all_of(shared_begin + shared_size, shared.data() + shared.size(), untouched)) {
      message = "write behind the end of shared memory";
      return message.c_str();
    }
  }
  return nullptr;
}

void fail(const char* what) {
  message = what;
  swapcontext(&current->context, &scheduler);
  __builtin_unreachable();
}

void sync_block() {
  if (++in_barrier < static_cast<int>(threads)) return leave(State::kInBlockBarrier);
  in_barrier = 0;
  for (Fiber& fiber : fibers)
    if (fiber.state == State::kInBlockBarrier) fiber.state = State::kReady;
}

void together(const char* name, void* operands, void (*work)(void** all)) {
  const unsigned first = current->thread / 32 * 32;
  Warp& warp = warps[first / 32];
  if (warp.arrived && std::strcmp(warp.name, name) != 0) fail("lanes of a warp do different things together");
  warp.name = name;
  warp.operands[current->thread % 32] = operands;
  if (++warp.arrived < 32) return leave(State::kInWarp);
  warp.arrived = 0;
  work(warp.operands);
  for (unsigned i = first; i < first + 32; ++i)
    if (fibers[i].state == State::kInWarp) fibers[i].state = State::kReady;
}

uint8_t* shared_memory() { return shared_begin; }

void check_shared(const void* p, size_t bytes) {
  if (!within(p, bytes, shared_begin, shared_size)) fail("access outside of shared memory");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access to shared memory");
}

void allow(const void* p, size_t bytes, bool writable) { ranges.push_back({static_cast<const uint8_t*>(p), bytes, writable}); }

void forget_all() { ranges.clear(); }

void check_global(const void* p, size_t bytes, bool write) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("misaligned access to global memory");
  for (const Range& range : ranges)
    if (within(p, bytes, range.begin, range.bytes) && (range.writable || !write)) return;
  fail(write ? "write outside of global memory" : "read outside of global memory");
}

void check_range(const void* p, size_t bytes) {
  for (const Range& range : ranges)
    if (within(p, bytes, range.begin, range.bytes)) return;
  fail("read outside of global memory");
}

void copy_later(void* to, const void* from, size_t bytes) {
  check_shared(to, bytes);
  std::memset(to, kPoison, bytes);
  current->copies.push_back({to, from, bytes});
}

void commit_copies() {
  current->groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void finish_copies(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.from)
        std::memcpy(copy.to, copy.from, copy.bytes);
      else
        std::memset(copy.to, 0, copy.bytes);
    }
    groups.erase(groups.begin());
  }
}

}  // namespace cuda_on_cpu
