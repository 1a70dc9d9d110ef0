// The operators that bring 3-bit codes into planes and back; schemas and meaning in hfq/kernels/planes.py.
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

StableIValue convert(const char* op, const Tensor& codes, bool join) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  if (codes.dtype() != aoti_torch_dtype_uint8()) codes.refuse("uint8");
  if (codes.dim() != 2) codes.refuse("of shape [N, bytes]");
  PlanesCall call = {};
  call.rows = codes.size(0);
  call.row_bytes = codes.size(1);
  call.in = static_cast<const uint8_t*>(codes.data(cpu, 1));
  call.join = join;
  if (join && call.row_bytes % 12) codes.refuse("in whole units of 12 bytes");
  void* out = nullptr;
  const int64_t sizes[2] = {call.rows, (call.row_bytes + 11) / 12 * 12};
  const StableIValue y = empty_tensor(sizes, 2, codes.dtype(), cpu, codes.device_index(), &out);
  call.out = static_cast<uint8_t*>(out);
  return filled(op, y, [&] { launch_planes(call); });
}

// hfq::split_planes(codes) -> planes
void split_planes(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor codes("split_planes", "codes", stack[0]);
  stack[0] = convert("split_planes", codes, false);
}

// hfq::join_planes(planes) -> codes
void join_planes(StableIValue* stack, uint64_t, uint64_t) {
  const Tensor planes("join_planes", "planes", stack[0]);
  stack[0] = convert("join_planes", planes, true);
}

}  // namespace

bool register_planes(TorchLibraryHandle library) {
  return register_impl(library, "split_planes", split_planes) && register_impl(library, "join_planes", join_planes);
}

}  // namespace hfq
