// Operators of a decode step beside its products; schemas and meaning in hfq/kernels/decode.py. Included after what a device's operators share.
#pragma once

#include "../common/decode.h"
#include "arguments.h"

namespace hfq {

// Device: its `type()`, limits, and how it runs what was read; made for one call of an operator.
template <class Device>
struct DecodeOperators {
  static void expect_like(const Tensor& tensor, const Tensor& other, const char* name) {
    if (tensor.dtype() != other.dtype()) tensor.refuse(std::string("of the dtype of ") + name);
    if (tensor.device_index() != other.device_index()) tensor.refuse(std::string("on the device of ") + name);
  }

  static void* same_dtype(const Tensor& tensor, const Tensor& other, const char* name) {
    expect_like(tensor, other, name);
    return tensor.data(Device::type(), element_size(expect_float(other)));
  }

  static void* float_data(const Tensor& tensor) { return same_dtype(tensor, tensor, ""); }

  static const void* float_rows(const Tensor& tensor, int64_t& stride) { return tensor.rows(Device::type(), element_size(expect_float(tensor)), stride); }

  static StableIValue empty_like(const Tensor& tensor, void** data) {
    int64_t sizes[8];
    if (tensor.dim() > 8) tensor.refuse("of at most 8 dimensions");
    for (int64_t i = 0; i < tensor.dim(); ++i) sizes[i] = tensor.size(i);
    return empty_tensor(sizes, tensor.dim(), tensor.dtype(), Device::type(), tensor.device_index(), data);
  }

  // hfq::rms_norm(x, weight, eps, offset, round_first) -> y
  static void rms_norm(StableIValue* stack, uint64_t, uint64_t) {
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
    stack[0] = filled(op, y, [&] { Device(op, x.device_index()).rms_norm(p); });
  }

  static RotateParams rotation(const char* op, const Tensor& x, const Tensor& cos, const Tensor& sin) {
    RotateParams p = {};
    if (cos.dim() != 3 || cos.size(1) != 1) cos.refuse("of shape [B or 1, 1, D]");
    p.size = cos.size(2);
    expect(p.size > 0 && p.size % 2 == 0 && p.size <= Device::kLargestHead, op, "D must be even, 2 to " + std::to_string(Device::kLargestHead) + ", got " + std::to_string(p.size));
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

  static StableIValue heads_of(const RotateParams& p, const Tensor& x, void** data) {
    const int64_t sizes[4] = {p.tokens, p.heads, 1, p.size};
    return empty_tensor(sizes, 4, x.dtype(), Device::type(), x.device_index(), data);
  }

  // hfq::rotate(q, k, cos, sin) -> (q, k)
  static void rotate(StableIValue* stack, uint64_t, uint64_t) {
    constexpr const char* op = "rotate";
    const Tensor q(op, "q", stack[0]), k(op, "k", stack[1]), cos(op, "cos", stack[2]), sin(op, "sin", stack[3]);
    RotateParams of_q = rotation(op, q, cos, sin), of_k = rotation(op, k, cos, sin);
    expect_like(k, q, "q");
    if (of_k.tokens != of_q.tokens) k.refuse("of as many tokens as q");
    const StableIValue first = heads_of(of_q, q, &of_q.y);
    stack[0] = filled(op, first, [&] {
      const StableIValue second = heads_of(of_k, k, &of_k.y);
      stack[1] = filled(op, second, [&] {
        Device(op, q.device_index()).rotate(of_q, of_k);
      });
    });
  }

  // hfq::gate(gate, up, tanh_gelu) -> y
  static void gate(StableIValue* stack, uint64_t, uint64_t) {
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
    expect_like(up, gate, "gate");
    p.up = float_rows(up, p.up_stride);
    p.tanh_gelu = as_bool(stack[2]);
    const StableIValue y = empty_like(gate, &p.y);
    stack[0] = filled(op, y, [&] { Device(op, gate.device_index()).gate(p); });
  }

  static void take_mask(AttendParams& p, const Tensor& mask, const Tensor& q) {
    if (mask.dim() != 4 || (mask.size(0) != 1 && mask.size(0) != p.batch) || (mask.size(1) != 1 && mask.size(1) != p.heads) || mask.size(2) != 1 ||
        mask.size(3) != p.length)
      mask.refuse("of shape [B or 1, H or 1, 1, T]");
    if (mask.device_index() != q.device_index()) mask.refuse("on the device of q");
    p.mask_is_bool = mask.dtype() == aoti_torch_dtype_bool();
    p.mask = p.mask_is_bool ? mask.data(Device::type(), 1) : same_dtype(mask, q, "q, or bool");
    p.mask_heads = mask.size(1) == 1 ? 0 : p.length;
    p.mask_batch = mask.size(0) == 1 ? 0 : mask.size(1) * p.length;
  }

  // hfq::attend(q, k, v, length, mask?, scale) -> y
  static void attend(StableIValue* stack, uint64_t, uint64_t) {
    constexpr const char* op = "attend";
    const Tensor q(op, "q", stack[0]), k(op, "k", stack[1]), v(op, "v", stack[2]), mask(op, "mask", Tensor::unwrap(stack[4]));
    AttendParams p = {};
    if (q.dim() != 4 || q.size(1) < 1 || q.size(2) != 1 || q.size(3) < 1 || q.size(3) % 16 || q.size(3) * element_size(expect_float(q)) > Device::kMostAttendedBytes)
      q.refuse("of shape [B, H, 1, D] with D a multiple of 16, of at most " + std::to_string(Device::kMostAttendedBytes) + " bytes");
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
    const StableIValue y = empty_tensor(sizes, 3, q.dtype(), Device::type(), q.device_index(), &p.y);
    stack[0] = filled(op, y, [&] { Device(op, q.device_index()).attend(p); });
  }

  static bool add(TorchLibraryHandle library) {
    return register_impl(library, "rms_norm", rms_norm) && register_impl(library, "rotate", rotate) && register_impl(library, "gate", gate) &&
           register_impl(library, "attend", attend);
  }
};

}  // namespace hfq
