// Thread blocks of the emulated GPU: one fiber for each thread, barriers, asynchronous copies, and checks of addresses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace cuda_on_cpu {

struct Index {
  unsigned x;
};

Index thread_index();
Index block_index();
Index block_size();

// What launchers are told; tests set it, so that small shapes take the ways of large ones.
extern int multiprocessors;
extern size_t most_shared_bytes;

// Runs `kernel` once for each thread of each block. Returns null, or what went wrong first.
const char* run_blocks(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* what);

void sync_block();

// All 32 lanes of the warp meet; the last one calls `work` with the operands of each.
void together(const char* name, void* operands, void (*work)(void** all));

uint8_t* shared_memory();
void check_shared(const void* p, size_t bytes);

// Global memory that kernels may read and, if `writable`, write.
void allow(const void* p, size_t bytes, bool writable);
void forget_all();
void check_global(const void* p, size_t bytes, bool write);
void check_range(const void* p, size_t bytes);  // to be read, of any size and alignment

// cp.async, of zeros where `global` is null: the destination is NaN until the copy is finished, which is as late as the waits of its thread allow.
void copy_later(void* shared, const void* global, size_t bytes);
void commit_copies();
void finish_copies(int pending);

}  // namespace cuda_on_cpu
