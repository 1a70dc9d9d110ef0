// What tests ask of the emulated GPU itself.
#include "fibers.h"
#include "races.h"

extern "C" {

void allow(const void* p, size_t bytes, int access) { cuda_on_cpu::allow(p, bytes, static_cast<cuda_on_cpu::Access>(access)); }
void forget_all() { cuda_on_cpu::forget_all(); }
void set_multiprocessors(int count) { cuda_on_cpu::multiprocessors = count; }
void set_shared_bytes(size_t most) { cuda_on_cpu::most_shared_bytes = most; }
void watch_races(bool wanted) { cuda_on_cpu::races::wanted = wanted; }
void set_compute_capability(int capability) { cuda_on_cpu::compute_capability = capability; }

}  // extern "C"
