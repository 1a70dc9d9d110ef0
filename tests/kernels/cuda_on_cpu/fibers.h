// Thread blocks of the emulated GPU: one fiber for each thread, barriers, what goes on beside threads, and checks of addresses.
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
extern int compute_capability;  // 80 for 8.0

// Runs `kernel` once for each thread of each block, `cluster` blocks at a time; `early`: it starts before the one in front has ended. Returns
// null, or what went wrong first.
const char* run_blocks(unsigned blocks, unsigned cluster, unsigned threads, size_t shared_bytes, bool early, const std::function<void()>& kernel);

// Ends the launch with a message; does not return.
[[noreturn]] void fail(const char* what);

void sync_block();
void sync_cluster();  // a barrier that says nothing of memory

// All 32 lanes of the warp meet; the last one calls `work` with the operands of each.
void together(const char* name, void* operands, void (*work)(void** all));

// The warp's lanes have met, and know of each other's memory.
void order_warp();

uint8_t* shared_memory();
void check_shared(const void* p, size_t bytes);
// Where `p` is as instructions count, which is where the hardware's swizzle looks; and back.
uint32_t shared_address(const void* p);
uint8_t* at_shared_address(uint32_t address, size_t bytes);

// Global memory that kernels may read: what nobody writes, what the kernel in front has written, and what this one may write.
enum class Access { kConstant, kFromBefore, kWritten };
void allow(const void* p, size_t bytes, Access access);
void forget_all();
// Kernels that start early may read but what is constant, and write at all, only in threads that have waited; and never by loads for constants, which
// a compiler moves in front of the wait.
enum class Way { kLoad, kConstantLoad, kStore };
void check_global(const void* p, size_t bytes, Way way);
void check_range(const void* p, size_t bytes);  // to be read, of any size and alignment
void wait_for_previous_kernel();

// For races.h: accesses of a kernel's own code (hooks.cpp), and those that the emulator makes for a thread.
void accessed_by_kernel(const void* p, size_t bytes, bool writes);
void accessed(const void* p, size_t bytes, bool writes);
void read_by_wgmma(uint32_t shared, size_t bytes);

// cp.async, of zeros where `global` is null: the destination is NaN until the copy is finished, which is as late as the waits of its thread allow.
void copy_later(void* shared, const void* global, size_t bytes);
void commit_copies();
void finish_copies(int pending);
// An ordinary store, of which instructions that read shared memory on their own know after a fence_proxy_async of this thread.
void store_shared(uint32_t address, const void* from, size_t bytes);
// Finished copies, and its own stores, are there for instructions of this thread that read shared memory on their own; its stores for others', too,
// after a barrier.
void fence_proxy_async();
// Whether a copy or a store to these bytes is there for ordinary reads only, of this warp.
bool unfenced(uint32_t address, size_t bytes);

// Barriers in shared memory. Copies that a thread arrives with are finished when no thread can go on without, in any order among threads.
void mbarrier_init(uint32_t barrier, uint32_t count);
void mbarrier_arrive(uint32_t barrier);
void mbarrier_arrive_after_copies(uint32_t barrier);
void mbarrier_wait(uint32_t barrier, uint32_t bit);
// A phase ends when all have arrived and as many bytes as they expect have come. A copy comes when those of threads do; one of
// nothing never ends. The barrier must have been there for it: a fence_proxy_async of the thread that made it, or a fence_mbarrier_init.
void mbarrier_arrive_and_expect(uint32_t barrier, uint32_t bytes);
void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier);
// The same at those places of other blocks of the cluster; `blocks` has their bits. Barriers are known to them after a fence_mbarrier_init of the
// thread that made them and any barrier of the cluster. No block may end before others are done with it.
void fence_mbarrier_init();
void mbarrier_arrive_of_block(uint32_t barrier, unsigned rank);
void copy_bulk_to_blocks(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint32_t blocks);
// The same of these bytes as they are now, to one block.
void push_to_block(uint32_t shared, const void* value, uint32_t bytes, uint32_t barrier, unsigned rank);

// 8 bytes of global memory that become a launch's tag when a thread has written something for those that wait, one of whom takes it away. Clusters
// run one after the other: what is waited for must have been done by one that is started before.
void raise_flag(uint64_t* flag, uint64_t tag);
void wait_for_flag(const uint64_t* flag, uint64_t tag);
void lower_flag(uint64_t* flag);
// What a thread knows by flags is there for copy_bulk, which it may not ask for before.
void fence_proxy_async_global();

// Instructions of a warpgroup that go on beside the threads, one part for each warp. `what`: the same for all four warps, or it is a mistake.
// `work` is called as late as the waits of the warp allow. The functions are called once for each warp, within `together`.
void start_later(uint64_t what, const std::function<void()>& work);
void commit_later();
void finish_later(int pending);
void fence_registers();

}  // namespace cuda_on_cpu
