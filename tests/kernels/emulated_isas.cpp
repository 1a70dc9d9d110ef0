// In the place of isa.cpp for check_isas.cpp: AMX, whose instructions emulated_amx.h emulates, on a processor with AVX-512.
#include <cstring>

#include "../../kernels/cpu/isa.h"

namespace hfq {
namespace {

Kernels with_amx() {
  Kernels kernels = kAvx512Kernels;
  kernels.name = "avx512_amx";
  kernels.tiles_linear = amx_tiles_linear;
  kernels.tiles_bfloat16 = amx_tiles_bfloat16;
  return kernels;
}

const Kernels amx = with_amx();
const Kernels* selected = &amx;

}  // namespace

const Kernels& kernels() { return *selected; }
bool select_isa(const char* name) {
  selected = std::strcmp(name, "generic") == 0 ? &kGenericKernels : &amx;
  return true;
}
const char* supported_isas() { return "avx512_amx,generic"; }

}  // namespace hfq
