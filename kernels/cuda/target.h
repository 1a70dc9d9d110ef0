// What kernels are written against: single instructions, and the launch. Compiled for a GPU that is ptx.h and launch.h; the tests compile
// the same kernels for the CPU, where tests/kernels/cuda_on_cpu has the same functions.
#pragma once

#include <cstdlib>
#include <cstring>

#include "dtype.h"

#ifdef HFQ_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include "launch.h"
#include "ptx.h"
#endif

namespace hfq {

// Whether an environment variable has this value.
inline bool is_set(const char* variable, const char* value) {
  const char* const set = std::getenv(variable);
  return set && std::strcmp(set, value) == 0;
}

// For quotients in a kernel: dividing by a number that is not known when it is compiled takes a dozen instructions, each of which waits for the one
// before, and these stand in front of all that a thread block asks for.
inline uint32_t reciprocal(uint32_t divisor) {
  const uint64_t found = divisor ? (uint64_t{1} << 32) / divisor : 0;
  return static_cast<uint32_t>(found >> 32 ? found - 1 : found);
}
// n / divisor, of any n.
__host__ __device__ inline uint32_t quotient(uint32_t n, uint32_t divisor, uint32_t reciprocal) {
  const auto found = static_cast<uint32_t>(uint64_t{n} * reciprocal >> 32);  // this or one less
  return n - found * divisor < divisor ? found : found + 1;
}

// That CUDA takes for each thread block; the most that a block may have is a multiprocessor's without it.
constexpr size_t kReservedShared = 1 << 10;

// The least shared memory of a thread block with which a multiprocessor has no room for more than `blocks` of them.
inline size_t shared_bytes_for(size_t blocks) { return (most_shared_bytes() + kReservedShared) / (blocks + 1) - kReservedShared + 128; }

// Shared memory of a thread block that needs so much, with which a multiprocessor has no room for more than `blocks` of them.
inline size_t limited(size_t shared_bytes, size_t blocks) {
  const size_t limit = shared_bytes_for(blocks);
  return limit > shared_bytes ? limit : shared_bytes;
}

// Shared memory of a thread block with which each multiprocessor has room for its share of `blocks` thread blocks and no more, for launch_early.
// Those of a kernel that starts while another one ends go where there is room, by which multiprocessors have ended early, and that is not evenly:
// 256 thread blocks of 14336 x 4096 took 15.9 us on an H200, 13.4 without overlap, and 11.7 so.
inline size_t evenly(size_t shared_bytes, int64_t blocks) {
  const int64_t found = multiprocessors(), count = found > 0 ? found : 1;
  const size_t each = static_cast<size_t>((blocks + count - 1) / count);
  return each > 1 && each < 8 ? limited(shared_bytes, each) : shared_bytes;
}

}  // namespace hfq
