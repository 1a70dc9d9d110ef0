// Operators of a decode step beside its products, for the CPU; schemas and meaning in hfq/kernels/decode.py.
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

constexpr int64_t kLargestHead = 2 * kDecodeChunk;  // rotate() keeps halves of heads on the stack

void expect_dtype_of(const Tensor& tensor, const Tensor& other, const char* name) {
  if (tensor.dtype() != other.dtype()) tensor.refuse(std::string("of the dtype of ") + name);
}

void* same_dtype(const Tensor& tensor, const Tensor& other, const char* name) {
  expect_dtype_of(tensor, other, name);
  return tensor.data(aoti_torch_device_type_cpu(), element_size(expect_float(other)));
}

void* float_data(const Tensor& tensor) { return same_dtype(tensor, tensor, ""); }

const void* float_rows(const Tensor& tensor, int64_t& stride) { return tensor.rows(aoti_torch_device_type_cpu(), element_size(expect_float(tensor)), stride); }

StableIValue empty_like(const Tensor& tensor, void** data) {
  int64_t sizes[8];
  if (tensor.dim() > 8) tensor.refuse("of at most 8 dimensions");
  for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
  return empty_tensor(sizes, tensor.dim(), tensor.dtype(), aoti_torch_device_type_cpu(), tensor.device_index(), data);
}

// hfq::rms_norm(x, weight, eps, offset, round_first) -> y
void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "rms_norm";
  const Tensor x(op, "x", stack[0]), weight(op, "weight", stack[1]);
  NormParams p = {};
  if (x.dim() < 1 || x.size(x.dim() - 1) < 1) x.refuse("of shape [..., K] with K of at least 1");
  p.columns = x.size(x.dim() - 1);
  p.rows = x.numel() / p.columns;
  p.dtype = expect_float(x);
  p.x = float_data(x);
  weight.expect_shape({p.columns});
  p.weight = same_dtype(weight, x, "x");
  p.eps = static_cast<float>(as_double(stack[2]));
  p.offset = static_cast<float>(as_double(stack[3]));
  p.round_first = as_bool(stack[4]);
  const StableIValue y = empty_like(x, &p.y);
  stack[0] = filled(op, y, [&] { launch_rms_norm(p); });
}

RotateParams rotation(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  RotateParams p = {};
  if (cos.dim() != 3 || cos.size(1) != 1) cos.refuse("of shape [B or 1, 1, D]");
  p.size = cos.size(2);
  expect(p.size > 0 && p.size % 2 == 0 && p.size <= kLargestHead, op, "D must be even, 2 to " + std::to_string(kLargestHead) + ", got " + std::to_string(p.size));
  if (x.dim() != 3 || x.size(1) != 1 || x.size(2) % p.size) x.refuse("of shape [B, 1, H * D]");
  p.tokens = x.size(0);
  p.heads = x.size(2) / p.size;
  p.shared = cos.size(0) == 1;
  if (!p.shared && cos.size(0) != p.tokens) cos.refuse("of shape [B or 1, 1, D]");
  sin.expect_shape({cos.size(0), 1, p.size});
  p.dtype = expect_float(x);
  p.x = float_rows(x, p.x_stride);
  p.cos = same_dtype(cos, x, "q and k");
  p.sin = same_dtype(sin, x, "q and k");
  return p;
}

StableIValue heads_of(const RotateParams& p, const Tensor& x, void** data) {
  const int64_t sizes[4] = {p.tokens, p.heads, 1, p.size};
  return empty_tensor(sizes, 4, x.dtype(), aoti_torch_device_type_cpu(), x.device_index(), data);
}

// hfq::rotate(q, k, cos, sin) -> (q, k)
void rotate(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "rotate";
  const Tensor q(op, "q", stack[0]), k(op, "k", stack[1]), cos(op, "cos", stack[2]), sin(op, "sin", stack[3]);
  RotateParams of_q = rotation(op, q, cos, sin), of_k = rotation(op, k, cos, sin);
  const StableIValue first = heads_of(of_q, q, &of_q.y);
  stack[0] = filled(op, first, [&] {
    const StableIValue second = heads_of(of_k, k, &of_k.y);
    stack[1] = filled(op, second, [&] {
      launch_rotate(of_q);
      launch_rotate(of_k);
    });
  });
}

// hfq::gate(gate, up, tanh_gelu) -> y
void gate(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "gate";
  const Tensor gate(op, "gate", stack[0]), up(op, "up", stack[1]);
  GateParams p = {};
  if (gate.dim() < 1) gate.refuse("of shape [..., N]");
  p.columns = gate.size(gate.dim() - 1);
  p.rows = p.columns ? gate.numel() / p.columns : 0;
  p.dtype = expect_float(gate);
  p.gate = float_rows(gate, p.gate_stride);
  bool same = up.dim() == gate.dim();
  for (int64_t i = 0; same && i < gate.dim(); ++i) same = up.size(i) == gate.size(i);
  if (!same) up.refuse("of the shape of gate, " + gate.shape_text());
  expect_dtype_of(up, gate, "gate");
  p.up = float_rows(up, p.up_stride);
  p.tanh_gelu = as_bool(stack[2]);
  const StableIValue y = empty_like(gate, &p.y);
  stack[0] = filled(op, y, [&] { launch_gate(p); });
}

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
  call.keys = float_data(keys);
  values.expect_shape({call.batch, call.heads, call.room, size});
  call.values = same_dtype(values, keys, "keys");
  k.expect_shape({call.batch, call.heads, 1, size});
  call.k = same_dtype(k, keys, "keys");
  v.expect_shape({call.batch, 1, call.heads * size});
  expect_dtype_of(v, keys, "keys");
  int64_t stride = 0;
  call.v = float_rows(v, stride);
  call.v_stride = stride * bytes;
  call.at = as_int(stack[4]);
  expect(call.at >= 0 && call.at < call.room, op, "at must be from 0 to " + std::to_string(call.room - 1) + ", got " + std::to_string(call.at));
  launch_append(call);
}

void take_mask(AttendParams& p, const Tensor& mask, const Tensor& q) {
  if (mask.dim() != 4 || (mask.size(0) != 1 && mask.size(0) != p.batch) || (mask.size(1) != 1 && mask.size(1) != p.heads) || mask.size(2) != 1 ||
      mask.size(3) != p.length)
    mask.refuse("of shape [B or 1, H or 1, 1, T]");
  p.mask_is_bool = mask.dtype() == aoti_torch_dtype_bool();
  p.mask = p.mask_is_bool ? mask.data(aoti_torch_device_type_cpu(), 1) : same_dtype(mask, q, "q, or bool");
  p.mask_heads = mask.size(1) == 1 ? 0 : p.length;
  p.mask_batch = mask.size(0) == 1 ? 0 : mask.size(1) * p.length;
}

// hfq::attend(q, k, v, length, mask?, scale) -> y
void attend(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "attend";
  const Tensor q(op, "q", stack[0]), k(op, "k", stack[1]), v(op, "v", stack[2]), mask(op, "mask", Tensor::unwrap(stack[4]));
  AttendParams p = {};
  if (q.dim() != 4 || q.size(1) < 1 || q.size(2) != 1 || q.size(3) < 1 || q.size(3) % 16) q.refuse("of shape [B, H, 1, D] with D a multiple of 16");
  p.batch = q.size(0);
  p.heads = q.size(1);
  p.size = q.size(3);
  if (k.dim() != 4 || k.size(0) != p.batch || k.size(1) < 1 || p.heads % k.size(1) || k.size(3) != p.size)
    k.refuse("of shape [B, H', C, D] with H a multiple of H'");
  p.kv_heads = k.size(1);
  p.room = k.size(2);
  p.length = as_int(stack[3]);
  expect(p.length >= 0 && p.length <= p.room, op, "length must be from 0 to " + std::to_string(p.room) + ", got " + std::to_string(p.length));
  v.expect_shape({p.batch, p.kv_heads, p.room, p.size});
  p.dtype = expect_float(q);
  p.q = float_data(q);
  p.k = same_dtype(k, q, "q");
  p.v = same_dtype(v, q, "q");
  if (mask.defined()) take_mask(p, mask, q);
  p.scale = static_cast<float>(as_double(stack[5]));
  const int64_t sizes[3] = {p.batch, 1, p.heads * p.size};
  const StableIValue y = empty_tensor(sizes, 3, q.dtype(), aoti_torch_device_type_cpu(), q.device_index(), &p.y);
  stack[0] = filled(op, y, [&] { launch_attend(p); });
}

}  // namespace

bool register_decode(TorchLibraryHandle library) {
  return register_impl(library, "rms_norm", rms_norm) && register_impl(library, "rotate", rotate) && register_impl(library, "gate", gate) &&
         register_impl(library, "append", append) && register_impl(library, "attend", attend);
}

}  // namespace hfq
