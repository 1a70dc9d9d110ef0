// The operators of kernels/torch-ext/torch_binding_cuda_*.cpp for CPU tensors, on the emulated GPU: compiled with the name of the
// CPU's device type for that of CUDA's, and with this in place of what only libtorch_cuda has.
#include "../../../kernels/torch-ext/cuda_arguments.h"
#include "fibers.h"

namespace {

// What the kernel in front of the next ones gives.
const void* given = nullptr;
size_t given_bytes = 0;

}  // namespace

extern "C" {

void set_given(const void* p, size_t bytes) { given = p, given_bytes = bytes; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** out_stream) {
  // Asked for before each launch. Which tensors a launch may touch is known to the operator only.
  cuda_on_cpu::forget_all();
  cuda_on_cpu::allow(given, given_bytes, cuda_on_cpu::Access::kFromBefore);
  // What else is read may be a weight.
  for (const auto access : {cuda_on_cpu::Access::kConstant, cuda_on_cpu::Access::kWritten}) cuda_on_cpu::allow(nullptr, SIZE_MAX, access);
  *out_stream = nullptr;
  return 0;
}
AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* out_new) {
  *out_new = nullptr;
  return 0;
}
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }

}  // extern "C"

namespace {

const bool registered = [] {
  TorchLibraryHandle library = nullptr;
  return aoti_torch_library_init_impl("hfq", "CPU", __FILE__, __LINE__, &library) == 0 && hfq::register_fragments(library) &&
         hfq::register_int8(library) && hfq::register_fp8(library) && hfq::register_spqr_fragments(library) && hfq::register_decode(library) &&
         hfq::register_packing(library);
}();

}  // namespace

extern "C" {

int operators_registered() { return registered; }

}  // extern "C"
