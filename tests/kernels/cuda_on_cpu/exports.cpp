// What tests/kernels/test_cuda_emulated.py calls.
#include "../../../kernels/cuda/linear.h"
#include "../../../kernels/cuda/spqr.h"
#include "../../../kernels/cuda/unpack.h"
#include "fibers.h"

extern "C" {

const char* linear(const hfq::LinearParams* params) { return hfq::launch_linear(*params, nullptr); }
const char* spqr_linear(const hfq::SpqrLinearParams* params) { return hfq::launch_spqr_linear(*params, nullptr); }
const char* spqr_unpack(const hfq::SpqrUnpackParams* params) { return hfq::launch_spqr_unpack(*params, nullptr); }
const char* unpack(const hfq::UnpackParams* params) { return hfq::launch_unpack(*params, nullptr); }

void allow(const void* p, size_t bytes, int writable) { cuda_on_cpu::allow(p, bytes, writable != 0); }
void forget_all() { cuda_on_cpu::forget_all(); }
void set_multiprocessors(int count) { cuda_on_cpu::multiprocessors = count; }

}  // extern "C"
