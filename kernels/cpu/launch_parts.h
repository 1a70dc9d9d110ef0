// What launchers share: threads, scratch memory, passes over the tokens. Included by files without flags of an instruction set only (see
// rows16.h for why).
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <stdexcept>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../torch-ext/torch_shim.h"

namespace hfq {

constexpr int64_t kMaxTokensPerSweep = 64;     // bounds the scratch memory; every sweep reads the weights once
constexpr int64_t kGrainBytes = 64 * 1024;     // less weight data per thread than this (3 us of reading) is not worth waking one
constexpr int64_t kPieceBytes = 256 * 1024;    // of weights that a thread takes at once, at most
constexpr int64_t kCachedBytes = 256 * 1024;   // weights that stay in the L2 cache between two passes over them

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t at_least_one(int64_t a) { return a < 1 ? 1 : a; }

// Memory of the calling thread, kept between calls: one decode step makes hundreds of calls of a few microseconds.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  char* reserve(size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
    const bool fits = bytes == size_;  // what is too far for this call shall not be found in the memory of a larger one
#else
    const bool fits = bytes <= size_;
#endif
    if (!fits) {
      std::free(data_);
      size_ = 0;
      data_ = static_cast<char*>(std::aligned_alloc(64, bytes));
      if (!data_) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

// body(begin, end) for pieces of `grain`, which threads take one after the other: with a half for each, all wait for the one whose core is
// slower or busy with something else.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  struct Work {
    const Body& body;
    int64_t count, grain;
    std::atomic<int64_t> next{0};
  } work{body, count, grain};
  const auto call = [](int64_t, int64_t, void* context) {
    Work& w = *static_cast<Work*>(context);
    for (int64_t at; (at = w.next.fetch_add(w.grain, std::memory_order_relaxed)) < w.count;)
      w.body(at, at + w.grain < w.count ? at + w.grain : w.count);
  };
  if (torch_parallel_for(0, ceil_div(count, grain), 1, call, &work) != 0) throw std::runtime_error("hfq: torch_parallel_for failed");
}

// Row blocks per piece of a loop over packed weights: a 32nd of them, so that threads end together, within what is worth waking one for and
// what is read at full speed (measured, 2 cores, int4 M=1: pieces of 64 KiB 17.3 GB/s, 128 KiB and more 19.6; the read bandwidth was 20.7).
inline int64_t blocks_per_piece(int64_t blocks, int64_t block_bytes, int64_t tokens) {
  const int64_t fair = at_least_one(blocks / 32), least = at_least_one(kGrainBytes / (block_bytes * tokens)), most = at_least_one(kPieceBytes / block_bytes);
  return fair < least ? least : fair > most ? most : fair;
}

// Passes of nearly equal size: 9 tokens at most 8 at a time are 5 + 4, not 8 + 1.
struct Passes {
  int64_t tokens, count;
  int64_t first(int64_t pass) const { return tokens * pass / count; }
  int64_t size(int64_t pass) const { return first(pass + 1) - first(pass); }
};

// A new output of many MiB is fresh memory: the first write to each 4 KiB page is a fault, which takes longer than filling the page with
// dequantized weights (measured: 33 MB in 17 ms, with huge pages 9). Huge pages fault 512 times less often.
inline void advise_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (bytes < static_cast<int64_t>(2 * kHuge)) return;  // whole ones may be missing, and the call would cost more than it gains
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: failure changes nothing
#endif
}

}  // namespace hfq
