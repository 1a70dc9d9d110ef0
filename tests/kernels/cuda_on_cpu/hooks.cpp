// What compilers call with -fsanitize=thread before each access to memory, in place of the library that comes with it.
#include "fibers.h"

using cuda_on_cpu::accessed_by_kernel;

extern "C" {

#define HFQ_ACCESS(size)                                                         \
  void __tsan_read##size(void* p) { accessed_by_kernel(p, size, false); }          \
  void __tsan_write##size(void* p) { accessed_by_kernel(p, size, true); }          \
  void __tsan_unaligned_read##size(void* p) { accessed_by_kernel(p, size, false); } \
  void __tsan_unaligned_write##size(void* p) { accessed_by_kernel(p, size, true); }
HFQ_ACCESS(1)
HFQ_ACCESS(2)
HFQ_ACCESS(4)
HFQ_ACCESS(8)
HFQ_ACCESS(16)
#undef HFQ_ACCESS
void __tsan_read_range(void* p, size_t bytes) { accessed_by_kernel(p, bytes, false); }
void __tsan_write_range(void* p, size_t bytes) { accessed_by_kernel(p, bytes, true); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}

// Those of the emulator and of launchers: a kernel that had atomic operations would need more than this.
int __tsan_atomic32_fetch_add(volatile int* p, int v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
long __tsan_atomic64_fetch_add(volatile long* p, long v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); }
char __tsan_atomic8_load(const volatile char* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }

}  // extern "C"
