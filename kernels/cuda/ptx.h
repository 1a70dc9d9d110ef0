// Single instructions of the GPU (PTX ISA 8, compute capability 8.0 and later). 16-bit floats are raw bits, two to a register: the types
// BFloat16 and Float16 only choose the instruction.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace hfq {

struct BFloat16 {};
struct Float16 {};

// ---- memory ----

// Weights: read once, so they should not displace activations in L1.
__device__ __forceinline__ uint4 load_streaming(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ uint2 load_streaming(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// What other threads of the multiprocessor read, too: through L1. Not changed while the kernel runs.
template <class V>
__device__ __forceinline__ V load(const V* p) {
  return __ldg(p);
}

// What a kernel before this one wrote: not before wait_for_previous_kernel(), which loads of constants may pass.
template <class V>
__device__ __forceinline__ V load_written(const V* p) {
  return *p;
}

// To global memory. Written as one instruction: nvcc makes several of 4 bytes of most assignments of 8 and 16.
template <class V>
__device__ __forceinline__ void store(V* p, const V& v) {
  if constexpr (sizeof(V) == 16) {
    uint4 words;
    memcpy(&words, &v, 16);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w) : "memory");
  } else if constexpr (sizeof(V) == 8) {
    uint2 words;
    memcpy(&words, &v, 8);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(words.x), "r"(words.y) : "memory");
  } else {
    *p = v;
  }
}

__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(128) uint8_t memory[];
  return memory;
}

// The same, from a multiple of 1024 bytes on, from which swizzles count.
__device__ __forceinline__ uint8_t* swizzled_memory() {
  extern __shared__ __align__(1024) uint8_t swizzled[];
  return swizzled;
}

// An address in shared memory takes one register, and none of the instructions that a pointer costs where it is used.
__device__ __forceinline__ uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

template <class V>
__device__ __forceinline__ V load_shared(uint32_t at) {
  static_assert(sizeof(V) == 2 || sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  if constexpr (sizeof(V) == 16) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
    return v;
  } else if constexpr (sizeof(V) == 8) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
  } else if constexpr (sizeof(V) == 2) {
    uint16_t v;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(v) : "r"(at) : "memory");
    return v;
  } else {
    uint32_t v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
    return v;
  }
}

// 4, 8 or 16 bytes. wgmma reads them after a fence_proxy_async() of the same thread, and then a barrier.
__device__ __forceinline__ void store_shared(uint32_t at, uint32_t v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(v) : "memory"); }
__device__ __forceinline__ void store_shared(uint32_t at, const uint2& v) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(at), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t at, const uint4& v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// 4, 8 or 16 bytes from global to shared memory, behind the thread's back: they are there for this thread after a `cp_async_wait` that covers
// their group, for others after a barrier behind that. Fewer than 16 go through L1.
template <int kBytes = 16>
__device__ __forceinline__ void cp_async(uint32_t shared, const void* global) {
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared), "l"(global), "n"(kBytes) : "memory");
}
// The same, or as many zeros without reading `global`.
template <int kBytes = 16>
__device__ __forceinline__ void cp_async_or_zero(uint32_t shared, const void* global, bool exists) {
  const uint32_t bytes = exists ? kBytes : 0;
  if constexpr (kBytes == 16)
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `kPending` of this thread's groups are not there yet.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- kernels that overlap (launch_early in launch.h; compute capability 9.0) ----

// The next kernel may start once all thread blocks of this one have said so or ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// Until all kernels before this one have ended and their writes can be seen. Nothing that they write may be read before, and nothing written.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- threads ----

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ uint32_t shuffle_xor(uint32_t v, int lanes) { return __shfl_xor_sync(0xffffffffu, v, lanes); }
__device__ __forceinline__ uint32_t shuffle_from(uint32_t v, int lane) { return __shfl_sync(0xffffffffu, v, lane); }
// The largest number of the lanes of a warp.
__device__ __forceinline__ uint32_t largest_of_warp(uint32_t v) { return __reduce_max_sync(0xffffffffu, v); }
// The lowest lane for which `is` holds; it does for one at least.
__device__ __forceinline__ int first_lane(bool is) { return __ffs(static_cast<int>(__ballot_sync(0xffffffffu, is))) - 1; }

// ---- barriers in shared memory (compute capability 9.0) ----

// One of 8 bytes, at an address in shared memory, counts arrivals. When there are `count`, a phase ends and the next one begins; phases have
// numbers from 0 on, of which threads that wait name the last bit. What a thread did before it arrived is there for those that have waited.
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// This thread arrives when all copies that it has begun are there.
__device__ __forceinline__ void mbarrier_arrive_after_copies(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// Arrives; and the phase does not end before this many bytes more have come with copy_bulk.
__device__ __forceinline__ void mbarrier_arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// A piece of global memory to shared memory, both of which begin and end at multiples of 16 bytes. One thread asks for all of it; it is there for
// those that have waited at the barrier, for their wgmma as well.
__device__ __forceinline__ void copy_bulk(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared), "l"(global), "r"(bytes),
               "r"(barrier)
               : "memory");
}
// Until the phase whose number has this last bit has ended.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t bit) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n@ended bra over;\nbra again;\nover:\n}" ::"r"(
          barrier),
      "r"(bit)
      : "memory");
}

// ---- thread blocks of one launch that are no cluster ----

// 8 bytes of global memory become `tag`, a number of this launch that no other one has: so they need not be zeros when the kernel begins. What this
// thread wrote before is there for those that have waited for it, and so is what others wrote that this one has met at a barrier.
__device__ __forceinline__ void raise_flag(uint64_t* flag, uint64_t tag) {
  asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(flag), "l"(tag) : "memory");
}
// Until those of all lanes of the warp have. Only for what blocks with lower indices do: blocks are started in that order, so that they run or have
// ended. (CUDA does not promise the order; GPUs keep it, and libraries count on it.) Lanes go round together: else ptxas would take what follows for
// divergent, and have it twice.
__device__ __forceinline__ void wait_for_flag(const uint64_t* flag, uint64_t tag) {
  uint64_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(flag) : "memory");
  } while (!__all_sync(0xffffffffu, found == tag));
}
// By who alone waits for it, and has: a launch that is replayed in a graph has the same tag.
__device__ __forceinline__ void lower_flag(uint64_t* flag) { *flag = 0; }

// ---- tensor cores ----

// d[16 x 8] += a[16 x 16] b[16 x 8] in float32. With g = lane / 4, t = lane % 4 a lane holds, two neighbours along k to a register,
//   a[0] (row g, k 2t..)   a[1] (row g+8, k 2t..)   a[2] (row g, k 2t+8..)   a[3] (row g+8, k 2t+8..)
//   b0 (k 2t.., column g)  b1 (k 2t+8.., column g)
//   d[0], d[1] (row g, columns 2t, 2t+1)   d[2], d[3] (row g+8, columns 2t, 2t+1)
__device__ __forceinline__ void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(Float16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// d[16 x 8] += a[16 x 32] b[32 x 8], two's complement bytes with sums in int32, which wrap. Four neighbours along k to a register:
//   a[0] (row g, k 4t..)   a[1] (row g+8, k 4t..)   a[2] (row g, k 4t+16..)   a[3] (row g+8, k 4t+16..)
//   b0 (k 4t.., column g)  b1 (k 4t+16.., column g)    d as above
__device__ __forceinline__ void mma(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory. Lane l names row l % 8 of matrix l / 8 (16 bytes, aligned) and gets of each
// matrix the elements 2t, 2t+1 of row g.
__device__ __forceinline__ void ldmatrix(uint32_t (&v)[4], const void* row) {
  const uint32_t from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(from)
               : "memory");
}

// ---- tensor cores, instructions of 128 threads (compute capability 9.0 only: sm_90a) ----

// What this thread has seen in shared memory, or stored there, is there for wgmma, too, which reads on a way of its own: for its own, and for that of
// threads which have waited for it at a barrier since. And barriers that it has made, for copy_bulk.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// What other blocks wrote to global memory while this kernel runs, and this thread knows of by flags, is there for copy_bulk, too.
__device__ __forceinline__ void fence_proxy_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// Before the first wgmma that takes registers which other instructions have written.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most `kPending` of the groups of wgmma run. Until then their operands must stay as they are.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The same; what follows reads their sums `d`, which the compiler may not do before.
template <int kPending, int n>
__device__ __forceinline__ void wgmma_wait(float (&d)[n]) {
  wgmma_wait<kPending>();
#pragma unroll
  for (int i = 0; i < n; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// The four warps have so many registers from here on, more or fewer than before; waits until others have given up enough.
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// d[64 x n] = a[64 x 16] b[16 x n], or d += where `add`, in float32, for n = 16, 32, 64, 128 and 256. Warp w of four has rows 16 w .. 16 w + 15 in
// the registers of the mma above: a[4], and d[4 i + c] of columns 8 i .. 8 i + 7. b is in shared memory; its descriptor (PTX ISA, "Matrix
// descriptor format") says where.
#define HFQ_SUMS4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define HFQ_SUMS8(i) HFQ_SUMS4(i), HFQ_SUMS4(i + 4)
#define HFQ_SUMS16(i) HFQ_SUMS8(i), HFQ_SUMS8(i + 8)
#define HFQ_SUMS32(i) HFQ_SUMS16(i), HFQ_SUMS16(i + 16)
#define HFQ_SUMS64(i) HFQ_SUMS32(i), HFQ_SUMS32(i + 32)
#define HFQ_SUMS128(i) HFQ_SUMS64(i), HFQ_SUMS64(i + 64)
#define HFQ_NAMES8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define HFQ_NAMES16 HFQ_NAMES8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define HFQ_NAMES32 HFQ_NAMES16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define HFQ_NAMES64                                                                                                                          \
  HFQ_NAMES32                                                                                                                                \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58" \
  ", %59, %60, %61, %62, %63"
#define HFQ_NAMES128                                                                                                                         \
  HFQ_NAMES64                                                                                                                                \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89"       \
  ", %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113"   \
  ", %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// `a0` .. `add`: names of the operands behind those of the sums.
#define HFQ_WGMMA(Type, type, n, sums, a0, a1, a2, a3, b, add)                                                                                \
  __device__ __forceinline__ void wgmma(Type, float (&d)[sums], const uint32_t (&a)[4], uint64_t descriptor, bool adds) {                      \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " add ", 0;\n"                                                                       \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" HFQ_NAMES##sums "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b  \
                 ", adds, 1, 1, 0;\n}"                                                                                                        \
                 : HFQ_SUMS##sums(0)                                                                                                          \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(static_cast<uint32_t>(adds)));                            \
  }
#define HFQ_WGMMAS(Type, type)                                                    \
  HFQ_WGMMA(Type, type, 16, 8, "%8", "%9", "%10", "%11", "%12", "%13")            \
  HFQ_WGMMA(Type, type, 32, 16, "%16", "%17", "%18", "%19", "%20", "%21")         \
  HFQ_WGMMA(Type, type, 64, 32, "%32", "%33", "%34", "%35", "%36", "%37")         \
  HFQ_WGMMA(Type, type, 128, 64, "%64", "%65", "%66", "%67", "%68", "%69")        \
  HFQ_WGMMA(Type, type, 256, 128, "%128", "%129", "%130", "%131", "%132", "%133")
HFQ_WGMMAS(BFloat16, "bf16")
HFQ_WGMMAS(Float16, "f16")
#undef HFQ_WGMMAS
#undef HFQ_WGMMA
#undef HFQ_NAMES128
#undef HFQ_NAMES64
#undef HFQ_NAMES32
#undef HFQ_NAMES16
#undef HFQ_NAMES8
#undef HFQ_SUMS128
#undef HFQ_SUMS64
#undef HFQ_SUMS32
#undef HFQ_SUMS16
#undef HFQ_SUMS8
#undef HFQ_SUMS4

// ---- thread blocks of a cluster (compute capability 9.0) ----

// A barrier of all threads of the cluster, behind which nothing that was written before need be there for others: with release it would be a MEMBAR
// of the whole GPU. (The wait always acquires: it empties L1.)
__device__ __forceinline__ void sync_cluster_only() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// 16 bytes to where `shared` is in block `rank`, whose barrier there counts them as it does those of copy_bulk. Nobody waits for the way back. They
// are there for who has waited with mbarrier_wait_for_pushed.
__device__ __forceinline__ void push_to_block(uint32_t shared, const float4& v, uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there, counts;\nmapa.shared::cluster.u32 there, %0, %6;\nmapa.shared::cluster.u32 counts, %5, %6;\n"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%1, %2, %3, %4}, [counts];\n}" ::"r"(shared),
      "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w), "r"(barrier), "r"(rank)
      : "memory");
}
// mbarrier_wait for what threads of other blocks have pushed, too.
__device__ __forceinline__ void mbarrier_wait_for_pushed(uint32_t barrier, uint32_t bit) {
  asm volatile(
      "{\n.reg .pred ended;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%0], %1;\n@ended bra over;\nbra again;\n"
      "over:\n}" ::"r"(barrier),
      "r"(bit)
      : "memory");
}
// Arrives at the barrier that block `rank` has where `barrier` is in this one. Those that wait there may overwrite what this thread's wgmma has read.
// (No more: with release.cluster, what it wrote would be there for them, after a MEMBAR of the whole GPU.)
__device__ __forceinline__ void mbarrier_arrive_of_block(uint32_t barrier, uint32_t rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
               "r"(rank)
               : "memory");
}
// copy_bulk to the same place of all blocks whose bits `blocks` has, and to the barrier of each.
__device__ __forceinline__ void copy_bulk_to_blocks(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint32_t blocks) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier), "h"(static_cast<uint16_t>(blocks))
               : "memory");
}
// Barriers that this thread has made are there for all of the cluster and its copies, after a sync_cluster_only().
__device__ __forceinline__ void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// ---- numbers ----

// (word & mask) | bits in one instruction, with the mask as its constant: it takes one only, so that the compiler makes two of it.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_or(uint32_t word, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(word), "n"(kMask), "r"(bits));
  return d;
}
// (word & mask) ^ bits, likewise.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t and_xor(uint32_t word, uint32_t bits) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(word), "n"(kMask), "r"(bits));
  return d;
}
// A value that the compiler takes as it is: it would compute addresses and constants again at each use, in place of keeping a register.
template <class V>
__device__ __forceinline__ V kept(V v) {
  if constexpr (sizeof(V) == 8)
    asm volatile("" : "+l"(v));
  else
    asm volatile("" : "+r"(v));
  return v;
}

__device__ __forceinline__ uint32_t fma2(BFloat16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ __forceinline__ uint32_t fma2(Float16, uint32_t a, uint32_t b, uint32_t c) {
  uint32_t d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}

// Whether the GPU converts E4M3 itself (from compute capability 8.9 on).
__device__ constexpr bool converts_e4m3() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return false;
#else
  return true;
#endif
}
// Four E4M3 as float16s in their order, two to a register.
__device__ __forceinline__ uint2 halves_of_e4m3(uint32_t codes) {
  uint2 halves = {};
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\t"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n\tcvt.rn.f16x2.e4m3x2 %1, high;\n\t}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(codes));
#else
  static_cast<void>(codes);
#endif
  return halves;
}

__device__ __forceinline__ float to_float(BFloat16, uint16_t v) { return __uint_as_float(static_cast<uint32_t>(v) << 16); }
__device__ __forceinline__ float to_float(Float16, uint16_t v) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
}
__device__ __forceinline__ uint16_t from_float(BFloat16, float f) {
  uint16_t v;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}
__device__ __forceinline__ uint16_t from_float(Float16, float f) {
  uint16_t v;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
  return v;
}

// Two of them to a register.
__device__ __forceinline__ uint32_t from_floats(BFloat16, float low, float high) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}
__device__ __forceinline__ uint32_t from_floats(Float16, float low, float high) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// Rounded once each: the compiler may not make one instruction of two.
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }
// a b + c, rounded once.
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

__device__ __forceinline__ float reciprocal_root(float a) { return __frsqrt_rn(a); }
__device__ __forceinline__ float exponential(float a) { return expf(a); }
__device__ __forceinline__ float hyperbolic_tangent(float a) { return tanhf(a); }

// Of NaN and a number, the number.
__device__ __forceinline__ float smaller(float a, float b) { return fminf(a, b); }
__device__ __forceinline__ float larger(float a, float b) { return fmaxf(a, b); }

// To the nearest integer, ties to even; the largest or least one for what is beyond them, 0 for NaN.
__device__ __forceinline__ int32_t to_int(float f) { return __float2int_rn(f); }
__device__ __forceinline__ float from_int(int32_t i) { return __int2float_rn(i); }

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t as_bits(float f) { return __float_as_uint(f); }

// sum + the products of bytes side by side.
__device__ __forceinline__ uint32_t multiply_bytes(uint32_t a, uint32_t b, uint32_t sum) { return __dp4a(a, b, sum); }
// The upper half of a word, by the pipe that multiplies: for who keeps the one of shifts busy.
__device__ __forceinline__ uint32_t upper_half(uint32_t word) { return __dp2a_lo(word, 0x0100u, 0u); }
// Byte i of the result is byte (selector >> 4 i) & 7 of the eight bytes b:a.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }
// The same where those 4 bits of `selector` are below 8; elsewhere the sign of the byte that the lower 3 name, 8 times.
__device__ __forceinline__ uint32_t permute_bytes_or_signs(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}
// Bits 32..63 of the product.
__device__ __forceinline__ uint32_t multiply_high(uint32_t a, uint32_t b) { return __umulhi(a, b); }

}  // namespace hfq
