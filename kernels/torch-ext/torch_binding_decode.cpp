// Operators of a decode step beside its products, for the CPU.
#include "../cpu/launch.h"
#include "cpu_arguments.h"
#include "decode_operators.h"

namespace hfq {
namespace {

struct OnCpu {
  static int32_t type() { return aoti_torch_device_type_cpu(); }
  static constexpr int64_t kLargestHead = 2 * kDecodeChunk;  // rotate() keeps halves of heads on the stack
  static constexpr int64_t kMostAttended = kLargest;
  OnCpu(const char*, int32_t) {}

  void rms_norm(const NormParams& p) const { launch_rms_norm(p); }
  void rotate(const RotateParams& q, const RotateParams& k) const {
    launch_rotate(q);
    launch_rotate(k);
  }
  void gate(const GateParams& p) const { launch_gate(p); }
  void attend(const AttendParams& p) const { launch_attend(p); }
};

using Operators = DecodeOperators<OnCpu>;

// hfq::append(keys!, values!, k, v, at) -> ()
void append(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "append";
  const Tensor keys(op, "keys", stack[0]), values(op, "values", stack[1]), k(op, "k", stack[2]), v(op, "v", stack[3]);
  AppendCall call = {};
  if (keys.dim() != 4) keys.refuse("of shape [B, H, C, D]");
  const int64_t size = keys.size(3), bytes = element_size(expect_float(keys));
  call.batch = keys.size(0);
  call.heads = keys.size(1);
  call.room = keys.size(2);
  call.bytes = size * bytes;
  call.keys = Operators::float_data(keys);
  values.expect_shape({call.batch, call.heads, call.room, size});
  call.values = Operators::same_dtype(values, keys, "keys");
  k.expect_shape({call.batch, call.heads, 1, size});
  call.k = Operators::same_dtype(k, keys, "keys");
  v.expect_shape({call.batch, 1, call.heads * size});
  Operators::expect_like(v, keys, "keys");
  int64_t stride = 0;
  call.v = Operators::float_rows(v, stride);
  call.v_stride = stride * bytes;
  call.at = as_int(stack[4]);
  expect(call.at >= 0 && call.at < call.room, op, "at must be from 0 to " + std::to_string(call.room - 1) + ", got " + std::to_string(call.at));
  launch_append(call);
}

}  // namespace

bool register_decode(TorchLibraryHandle library) { return Operators::add(library) && register_impl(library, "append", append); }

}  // namespace hfq
