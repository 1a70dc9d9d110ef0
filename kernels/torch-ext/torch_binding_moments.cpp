// The operator that sums up second moments, for CPUs with matrix units; schema and meaning in hfq/kernels/moments.py.
#include "../cpu/isa.h"
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

// hfq::cpu_add_moment(total, x) -> ()
void cpu_add_moment(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_add_moment";
  const Tensor total(op, "total", stack[0]), x(op, "x", stack[1]);
  expect(kernels().multiply_moment != nullptr, op, std::string("the instruction set ") + kernels().name + " has no matrix units");
  if (x.dtype() != aoti_torch_dtype_bfloat16()) x.refuse("bfloat16");
  if (x.dim() != 2) x.refuse("of shape [T, K]");
  MomentParams p = {};
  p.tokens = x.size(0);
  p.columns = x.size(1);
  expect(p.columns < kLargest, op, "K must be below 2^31, got " + std::to_string(p.columns));
  p.x = static_cast<const uint16_t*>(x.data(aoti_torch_device_type_cpu(), 2));
  total.expect_shape({p.columns, p.columns});
  p.total = const_cast<float*>(float32_data(total));
  launch_add_moment(p);
}

}  // namespace

bool register_moments(TorchLibraryHandle library) { return register_impl(library, "cpu_add_moment", cpu_add_moment); }

}  // namespace hfq
