// Which accesses of the emulated GPU nothing orders: two of them to the same byte, one a write, are a data race, whatever they happened to do.
//
// Threads, and what goes on beside them, have clocks; what one has learnt of others' stands in vectors of them (Mattern 1989; that an access needs
// the clock of one only is FastTrack's: Flanagan and Freund 2009). Barriers pass knowledge on as far as the PTX ISA says: sync_warp, sync_block,
// arrivals and waits at mbarriers. Shuffles, ballots and matrix instructions pass on nothing. cp.async, copies in bulk and wgmma access memory by
// themselves from the moment they are asked for; only who has waited for them knows that they have.
//
// Kernels are compiled with -fsanitize=thread, whose calls end here: no access escapes that goes by a pointer. Registers and a thread's own stack are
// nobody else's.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_on_cpu::races {

extern bool wanted;  // off: nothing is looked at

using Clock = std::vector<uint32_t>;

// Of global memory, what is written is watched; it is forgotten when a launch begins. Nothing orders blocks that are no cluster but flags.
void begin_launch();
struct Memory {
  const uint8_t* begin;
  size_t bytes;
};
// Threads have numbers from 0 to `count`, all blocks counted; `shared`: of each block.
void begin_cluster(unsigned count, std::vector<Memory> shared);

// Whose clock: a thread's; its copies', which end in order; a warp's wgmma groups', which do, too; a barrier's phases.
unsigned clock_of_copies(unsigned thread);
unsigned clock_of_wgmma(unsigned warp);
unsigned clock_of_barrier();  // a new one

// All of these threads know what each of them did.
void meet(unsigned first, unsigned count);
// `clock` knows what the thread did, and the other way round.
void tell(unsigned thread, Clock& clock);
void pass_on(unsigned thread, Clock& clock);  // what others had told it, but nothing of its own
void learn(unsigned thread, const Clock& clock);
// How far threads have come only: cp.async arrives at a barrier after its thread has waited, but what that thread wrote is not there for others.
void tell_steps(unsigned thread, Clock& clock);
void learn_steps(unsigned thread, const Clock& clock);
void meet_steps(unsigned first, unsigned count);
bool knows_step(unsigned thread, unsigned whose, uint32_t time);
// The thread, or `clock`, knows that `whose` has come as far as `time`.
void learn_time(unsigned thread, unsigned whose, uint32_t time);
uint32_t time_of(unsigned thread);
bool knows(unsigned thread, unsigned whose, uint32_t time);
void tell_time(Clock& clock, unsigned whose, uint32_t time);

// A flag, which is raised, tells threads of later clusters what this thread knows.
void raise(unsigned thread, const void* flag);
void see(unsigned thread, const void* flag);

// An access of a thread, or asked for by it and ended for those who know that `whose` has come as far as `time`. Returns null, or a message.
const char* access(unsigned thread, const void* p, size_t bytes, bool writes);
const char* access_later(unsigned thread, unsigned whose, uint32_t time, const void* p, size_t bytes, bool writes);

}  // namespace cuda_on_cpu::races
