// What tests/kernels/test_cuda_emulated.py calls.
#include "../../../kernels/cuda/experts.h"
#include "../../../kernels/cuda/linear.h"
#include "../../../kernels/cuda/unpack.h"
#include "fibers.h"

extern "C" {

const char* linear(const hfq::LinearParams* params) { return hfq::launch_linear(*params, nullptr); }
const char* experts(const hfq::ExpertsParams* params) { return hfq::launch_experts(*params, nullptr); }
const char* unpack(const hfq::UnpackParams* params) { return hfq::launch_unpack(*params, nullptr); }

void allow(const void* p, size_t bytes, int writable) { cuda_on_cpu::allow(p, bytes, writable != 0); }
void forget_all() { cuda_on_cpu::forget_all(); }
void set_multiprocessors(int count) { cuda_on_cpu::multiprocessors = count; }

}  // extern "C"
