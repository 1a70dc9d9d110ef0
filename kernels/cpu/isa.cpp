#include "isa.h"

#include <atomic>
#include <cstring>
#include <string>
#include <vector>

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define HFQ_X86 1
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace hfq {
namespace {

#ifdef HFQ_X86
// __builtin_cpu_supports also checks that the operating system saves the registers.
[[maybe_unused]] bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

[[maybe_unused]] bool has_avx2_vnni() {
  unsigned a = 0, b = 0, c = 0, d = 0;  // leaf 7.1, EAX bit 4: AVX-VNNI; older compilers have no name for it
  return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

[[maybe_unused]] bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq");
}

[[maybe_unused]] bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

// Leaf 7, EDX: bit 22 AMX-BF16, bit 24 AMX-TILE, bit 25 AMX-INT8. Linux gives the 8 KiB of registers to processes that ask for them.
[[maybe_unused]] bool has_amx() {
#ifdef SYS_arch_prctl
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kWanted = (1u << 22) | (1u << 24) | (1u << 25);
  // Leaf 7.1, EAX bit 5: AVX512-BF16.
  return has_avx512_vnni() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 5)) && __get_cpuid_count(7, 0, &a, &b, &c, &d) &&
         (d & kWanted) == kWanted &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

#ifdef __aarch64__
[[maybe_unused]] bool has_neon() {
#if defined(__APPLE__)
  return true;  // every Apple silicon
#elif defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP
  return (getauxval(AT_HWCAP) & kDotProducts) != 0;
#else
  return false;
#endif
}
#endif

#if defined(HFQ_WITH_AVX2_VNNI) || defined(HFQ_WITH_AVX512_VNNI)
using Product = void (*)(const LinearParams&, int64_t, int64_t);
Kernels with_vnni(Kernels kernels, const char* name, Product linear_int8, Product int8_linear) {
  kernels.name = name;
  kernels.linear_int8 = linear_int8;
  kernels.int8_linear = int8_linear;
  return kernels;
}
#endif

#ifdef HFQ_WITH_AVX512_AMX
Kernels with_amx(Kernels kernels) {
  kernels.name = "avx512_amx";
  kernels.tiles_linear = amx_tiles_linear;
  kernels.tiles_bfloat16 = amx_tiles_bfloat16;
  kernels.pack_moment = amx_pack_moment;
  kernels.multiply_moment = amx_multiply_moment;
  return kernels;
}
#endif

std::vector<const Kernels*> detect() {
#ifdef HFQ_X86
  __builtin_cpu_init();
#endif
  std::vector<const Kernels*> found;
#ifdef HFQ_WITH_AVX512_VNNI
  static const Kernels avx512_vnni = with_vnni(kAvx512Kernels, "avx512_vnni", avx512_vnni_linear_int8, avx512_vnni_int8_linear);
#ifdef HFQ_WITH_AVX512_AMX
  static const Kernels amx = with_amx(avx512_vnni);
  if (has_amx()) found.push_back(&amx);
#endif
  if (has_avx512_vnni()) found.push_back(&avx512_vnni);
#endif
#ifdef HFQ_WITH_AVX512
  if (has_avx512()) found.push_back(&kAvx512Kernels);
#endif
#ifdef HFQ_WITH_AVX2_VNNI
  static const Kernels avx2_vnni = with_vnni(kAvx2Kernels, "avx2_vnni", avx2_vnni_linear_int8, avx2_vnni_int8_linear);
  if (has_avx2_vnni()) found.push_back(&avx2_vnni);
#endif
#ifdef HFQ_WITH_AVX2
  if (has_avx2()) found.push_back(&kAvx2Kernels);
#endif
#ifdef HFQ_WITH_NEON
  if (has_neon()) found.push_back(&kNeonKernels);
#endif
  found.push_back(&kGenericKernels);
  return found;
}

const std::vector<const Kernels*>& supported() {
  static const std::vector<const Kernels*> found = detect();
  return found;
}

std::atomic<const Kernels*>& selected() {
  static std::atomic<const Kernels*> current{supported().front()};
  return current;
}

}  // namespace

const Kernels& kernels() { return *selected().load(std::memory_order_acquire); }

bool select_isa(const char* name) {
  const Kernels* chosen = std::strcmp(name, "auto") == 0 ? supported().front() : nullptr;
  for (const Kernels* candidate : supported())
    if (std::strcmp(name, candidate->name) == 0) chosen = candidate;
  if (!chosen) return false;
  selected().store(chosen, std::memory_order_release);
  return true;
}

const char* supported_isas() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* candidate : supported()) joined += (joined.empty() ? "" : ",") + std::string(candidate->name);
    return joined;
  }();
  return names.c_str();
}

}  // namespace hfq
