#include "races.h"

#include <algorithm>
#include <string>
#include <unordered_map>

namespace cuda_on_cpu::races {

bool wanted = false;

namespace {

constexpr unsigned kBarriers = 512;  // of a cluster, at most
constexpr uintptr_t kWord = 4;

// Bytes of a word.
struct Access {
  uint32_t cluster, whose, time;
  uint8_t bytes;
  bool writes;
};
using Accesses = std::vector<Access>;

unsigned threads, barriers;
uint32_t cluster;  // its number
std::vector<Clock> clocks, steps;  // of threads; `steps`: how far others have come, whatever may be seen of what they wrote
struct Watched {
  Memory memory;
  std::vector<Accesses> words;
};
std::vector<Watched> shared;
std::unordered_map<uintptr_t, Accesses> global;
// What a flag tells: of a cluster, how far its threads had come; and the same of those that it knew of by flags.
using Told = std::vector<std::pair<uint32_t, Clock>>;
std::unordered_map<const void*, Told> flags;
std::vector<const Told*> seen;  // by threads of this cluster, each with a place behind the others of a clock, where those that know of it have 1
std::string message;

void join(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size());
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

size_t place_of_seen(size_t number) { return 2 * threads + threads / 32 + kBarriers + number; }

// One who knows `knows` knows of an access of another cluster.
bool knows_by_flags(const Clock& knows, const Access& other) {
  for (size_t i = 0; i < seen.size(); ++i)
    if (place_of_seen(i) < knows.size() && knows[place_of_seen(i)])
      for (const auto& [of_cluster, clock] : *seen[i])
        if (of_cluster == other.cluster && clock[other.whose] >= other.time) return true;
  return false;
}

std::string name(const Access& access, const char* place) {
  const unsigned whose = access.whose, of_block = static_cast<unsigned>(threads / shared.size());
  const auto thread = [&](unsigned number) {
    return "thread " + std::to_string(number % of_block) + (shared.size() > 1 ? " of block " + std::to_string(number / of_block) : "");
  };
  const std::string verb = access.writes ? " writes " : " reads ";
  if (access.cluster != cluster) return "a thread of another cluster" + verb + place;
  if (whose < threads) return thread(whose) + verb + place;
  if (whose < 2 * threads) return "cp.async of " + thread(whose - threads) + verb + place;
  if (whose < 2 * threads + threads / 32) return "wgmma of " + thread(32 * (whose - 2 * threads)) + verb + place;
  return "a copy in bulk" + verb + place;
}

// The access, by one who knows `knows`, to a word. False: nothing orders it and another one.
bool add(Accesses& all, const Access& own, const Clock& knows, const char* place) {
  bool kept = false;
  for (size_t i = 0; i < all.size();) {
    Access& other = all[i];
    const bool overlaps = other.bytes & own.bytes;
    const bool known = other.cluster == cluster ? knows[other.whose] >= other.time : overlaps && knows_by_flags(knows, other);
    if (overlaps && (own.writes || other.writes) && !known) {
      message = "a race: " + name(own, place) + ", " + name(other, "it") + ", and nothing orders them";
      return false;
    }
    // Who is ordered after this access is ordered after those before it: they need not be kept.
    if (own.writes) other.bytes = static_cast<uint8_t>(other.bytes & ~own.bytes);
    if (other.whose == own.whose && other.time == own.time && other.writes == own.writes && other.bytes == own.bytes && other.cluster == own.cluster)
      kept = true;
    else if (other.bytes == 0 || (!own.writes && !other.writes && known && (other.bytes & ~own.bytes) == 0)) {
      other = all.back();
      all.pop_back();
      continue;
    }
    ++i;
  }
  if (!kept) all.push_back(own);
  return true;
}

const char* add_all(const void* p, size_t bytes, const Access& own, const Clock& knows) {
  const auto first = reinterpret_cast<uintptr_t>(p), end = first + bytes;
  const Watched* const of_block = std::find_if(shared.data(), shared.data() + shared.size(), [&](const Watched& block) {
    const auto begin = reinterpret_cast<uintptr_t>(block.memory.begin);
    return first >= begin && end <= begin + block.memory.bytes;
  });
  const bool is_shared = of_block != shared.data() + shared.size();
  const uintptr_t begin = is_shared ? reinterpret_cast<uintptr_t>(of_block->memory.begin) : 0;
  for (uintptr_t word = first / kWord * kWord; word < end; word += kWord) {
    Access here = own;
    here.bytes = 0;
    for (uintptr_t i = 0; i < kWord; ++i)
      if (word + i >= first && word + i < end) here.bytes = static_cast<uint8_t>(here.bytes | 1u << i);
    Accesses& all = is_shared ? shared[static_cast<size_t>(of_block - shared.data())].words[(word - begin) / kWord] : global[word];
    if (!add(all, here, knows, is_shared ? "shared memory" : "global memory")) {
      if (is_shared) message += " (byte " + std::to_string(std::max(word, first) - begin) + ")";
      return message.c_str();
    }
  }
  return nullptr;
}

}  // namespace

void begin_launch() {
  global.clear();
  flags.clear();
  cluster = 0;
}

void begin_cluster(unsigned count, std::vector<Memory> memory) {
  ++cluster;
  threads = count, barriers = 0;
  seen.clear();
  clocks.resize(threads);
  steps.assign(threads, {});
  for (unsigned i = 0; i < threads; ++i) {
    clocks[i].assign(2 * threads + threads / 32 + kBarriers, 0);
    clocks[i][i] = 1;
  }
  shared.clear();
  for (const Memory& one : memory) shared.push_back({one, std::vector<Accesses>(one.bytes / kWord + 1)});
}

unsigned clock_of_copies(unsigned thread) { return threads + thread; }
unsigned clock_of_wgmma(unsigned warp) { return 2 * threads + warp; }
unsigned clock_of_barrier() { return 2 * threads + threads / 32 + barriers++ % kBarriers; }

void meet(unsigned first, unsigned count) {
  Clock all = clocks[first], all_steps;
  for (unsigned i = first; i < first + count; ++i) join(all, clocks[i]), join(all_steps, steps[i]);
  for (unsigned i = first; i < first + count; ++i) {
    clocks[i] = all, steps[i] = all_steps;
    ++clocks[i][i];
  }
}

void tell_steps(unsigned thread, Clock& clock) { join(clock, clocks[thread]), join(clock, steps[thread]); }
void learn_steps(unsigned thread, const Clock& clock) { join(steps[thread], clock); }

void meet_steps(unsigned first, unsigned count) {
  Clock all;
  for (unsigned i = first; i < first + count; ++i) tell_steps(i, all);
  for (unsigned i = first; i < first + count; ++i) {
    steps[i] = all;
    ++clocks[i][i];
  }
}

bool knows_step(unsigned thread, unsigned whose, uint32_t time) {
  return knows(thread, whose, time) || (steps[thread].size() > whose && steps[thread][whose] >= time);
}

void tell(unsigned thread, Clock& clock) {
  join(clock, clocks[thread]);
  ++clocks[thread][thread];
}

void pass_on(unsigned thread, Clock& clock) {
  const uint32_t known = clock.size() > thread ? clock[thread] : 0;
  join(clock, clocks[thread]);
  clock[thread] = known;
}

void learn(unsigned thread, const Clock& clock) { join(clocks[thread], clock); }

void learn_time(unsigned thread, unsigned whose, uint32_t time) { tell_time(clocks[thread], whose, time); }

void tell_time(Clock& clock, unsigned whose, uint32_t time) {
  if (clock.size() <= whose) clock.resize(whose + 1);
  clock[whose] = std::max(clock[whose], time);
}

uint32_t time_of(unsigned thread) { return clocks[thread][thread]; }

bool knows(unsigned thread, unsigned whose, uint32_t time) { return clocks[thread][whose] >= time; }

void raise(unsigned thread, const void* flag) {
  Told& told = flags[flag];
  told.assign(1, {cluster, clocks[thread]});
  for (size_t i = 0; i < seen.size(); ++i)
    if (place_of_seen(i) < clocks[thread].size() && clocks[thread][place_of_seen(i)]) told.insert(told.end(), seen[i]->begin(), seen[i]->end());
  ++clocks[thread][thread];
}

void see(unsigned thread, const void* flag) {
  const Told* const told = &flags.at(flag);
  const auto place = static_cast<size_t>(std::find(seen.begin(), seen.end(), told) - seen.begin());
  if (place == seen.size()) seen.push_back(told);
  Clock& clock = clocks[thread];
  if (clock.size() <= place_of_seen(place)) clock.resize(place_of_seen(place) + 1);
  clock[place_of_seen(place)] = 1;
}

const char* access(unsigned thread, const void* p, size_t bytes, bool writes) {
  return add_all(p, bytes, {cluster, thread, clocks[thread][thread], 0, writes}, clocks[thread]);
}

const char* access_later(unsigned thread, unsigned whose, uint32_t time, const void* p, size_t bytes, bool writes) {
  return add_all(p, bytes, {cluster, whose, time, 0, writes}, clocks[thread]);
}

}  // namespace cuda_on_cpu::races
