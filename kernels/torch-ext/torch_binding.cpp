// Operators of hfq for the CPU: read the arguments, validate every one of them, launch. Schemas are defined in hfq/kernels/ops.py.
#include <array>
#include <cmath>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

Shape make_shape(const char* op, int64_t bits, int64_t group_size, int64_t in_features, int64_t out_features) {
  expect(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  expect_sizes(op, in_features, out_features);
  const int64_t columns = bits == 3 ? kSpan : 32 / bits;  // that begin with a new word
  expect(group_size > 0 && (group_size >= in_features || group_size % columns == 0), op,
         "group_size must be a multiple of " + std::to_string(columns) + " or at least in_features (one group per row), got " +
             std::to_string(group_size));
  Shape s;
  s.in_features = in_features;
  s.out_features = out_features;
  s.group_size = group_size < in_features ? group_size : in_features;
  s.groups = (in_features + s.group_size - 1) / s.group_size;
  s.words = (in_features + columns - 1) / columns * (bits == 3 ? 3 : 1);
  s.spans_per_group = (s.group_size + kSpan - 1) / kSpan;
  s.blocks_per_group = (s.group_size + kActBlock - 1) / kActBlock;
  s.bits = static_cast<int32_t>(bits);
  return s;
}

// Kernels know the values of E4M3 and read none. Those of NaN may be anything.
bool is_e4m3_table(const float* codebook) {
  static const std::array<float, 127> expected = [] {
    std::array<float, 127> values = {};
    for (int code = 0; code < 127; ++code)
      values[static_cast<size_t>(code)] = std::ldexp(static_cast<float>(code < 8 ? code : 8 + code % 8), (code < 8 ? 1 : code / 8) - 10);
    return values;
  }();
  for (size_t code = 0; code < expected.size(); ++code)
    if (codebook[code] != expected[code] || codebook[128 + code] != -expected[code]) return false;
  return true;
}

// The weight's tensors in layout rows16; of a stack of experts those of the first.
struct Weight {
  const uint8_t* qweight;
  const void* scales;
  const void* zeros;
  const float* codebook;
  DType scale_dtype;
};

// `experts`: their number where the tensors are stacks, 0 otherwise.
Weight check_weight(const char* op, const Shape& s, const Tensor& qweight, const Tensor& scales, const Tensor& zeros, const Tensor& codebook,
                    int64_t experts = 0) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  const int64_t blocks = (s.out_features + kRows - 1) / kRows;
  const auto expect_shape = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    if (!experts) return tensor.expect_shape(sizes);
    const int64_t* each = sizes.begin();
    sizes.size() == 4 ? tensor.expect_shape({experts, each[0], each[1], each[2], each[3]}) : tensor.expect_shape({experts, each[0], each[1], each[2]});
  };
  Weight w = {};
  if (qweight.dtype() != aoti_torch_dtype_uint8()) qweight.refuse("uint8");
  expect_shape(qweight, {blocks, s.words, kRows, 4});
  w.qweight = static_cast<const uint8_t*>(qweight.data(cpu, 1));
  w.scale_dtype = expect_float(scales);
  expect_shape(scales, {blocks, s.groups, kRows});
  w.scales = scales.data(cpu, element_size(w.scale_dtype));
  if (zeros.defined()) {
    if (zeros.dtype() != scales.dtype()) zeros.refuse("of the same dtype as scales");
    expect_shape(zeros, {blocks, s.groups, kRows});
    w.zeros = zeros.data(cpu, element_size(w.scale_dtype));
  }
  if (codebook.defined()) {
    expect(s.bits == 4 || s.bits == 8, op, "a codebook takes 4 bits, or 8 for E4M3");
    expect(!zeros.defined(), op, "a codebook takes no zeros");
    if (codebook.dtype() != aoti_torch_dtype_float32()) codebook.refuse("float32");
    codebook.expect_shape({int64_t{1} << s.bits});
    w.codebook = static_cast<const float*>(codebook.data(cpu, 4));
    if (s.bits == 8) {
      expect(is_e4m3_table(w.codebook), op, "a codebook of 8 bits must be that of E4M3 (hfq.core.float8)");
      expect(s.groups == 1, op, "E4M3 takes one group per row");
    }
  }
  return w;
}

void set_activations(LinearCall& call, const Tensor& x) {
  call.x_dtype = expect_float(x);
  if (x.dim() != 2 || x.size(1) != call.shape.in_features) x.refuse("of shape [M, in_features=" + std::to_string(call.shape.in_features) + "]");
  call.tokens = x.size(0);
  call.x = x.data(aoti_torch_device_type_cpu(), element_size(call.x_dtype));
}

void set_weight(LinearCall& call, const Weight& w) {
  call.qweight = w.qweight;
  call.scales = w.scales;
  call.zeros = w.zeros;
  call.codebook = w.codebook;
  call.scale_dtype = w.scale_dtype;
}

void expect_int_codes(const char* op, const LinearCall& call) {
  expect(!call.int8_activations || !call.codebook || call.shape.bits == 4, op, "E4M3 takes no int8_activations");
}

// Activations that are rounded over the whole row: static scales.
const float* optional_input_scale(const Tensor& input_scale) {
  if (!input_scale.defined()) return nullptr;
  if (input_scale.dtype() != aoti_torch_dtype_float32()) input_scale.refuse("float32");
  input_scale.expect_shape({1});
  return static_cast<const float*>(input_scale.data(aoti_torch_device_type_cpu(), 4));
}

// Completes a call with the activations and the bias, runs it, and gives its result.
StableIValue multiply(const char* op, LinearCall& call, const Tensor& x, const Tensor& bias) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  set_activations(call, x);
  if (bias.defined()) {
    call.bias_dtype = expect_float(bias);
    bias.expect_shape({call.shape.out_features});
    call.bias = bias.data(cpu, element_size(call.bias_dtype));
  }

  const int64_t sizes[2] = {call.tokens, call.shape.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cpu, x.device_index(), &call.y);
  return filled(op, y, [&] { launch_linears(&call, 1); });
}

// hfq::cpu_linear(x, qweight, scales, zeros?, codebook?, bias?, bits, group_size, in_features, out_features, int8_activations) -> [M, N]
void cpu_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_linear";
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[3])), codebook(op, "codebook", Tensor::unwrap(stack[4]));
  const Tensor bias(op, "bias", Tensor::unwrap(stack[5]));

  LinearCall call = {};
  call.shape = make_shape(op, as_int(stack[6]), as_int(stack[7]), as_int(stack[8]), as_int(stack[9]));
  set_weight(call, check_weight(op, call.shape, qweight, scales, zeros, codebook));
  call.int8_activations = as_bool(stack[10]);
  expect_int_codes(op, call);
  stack[0] = multiply(op, call, x, bias);
}

// hfq::cpu_experts_linear(x, counts, qweight, scales, zeros?, codebook?, bias?, bits, group_size, in_features, out_features,
//                         int8_activations) -> [M, N]; the first counts[0] tokens go to expert 0, the next counts[1] to expert 1, ...
void cpu_experts_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_experts_linear";
  const Tensor x(op, "x", stack[0]), counts(op, "counts", stack[1]), qweight(op, "qweight", stack[2]), scales(op, "scales", stack[3]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[4])), codebook(op, "codebook", Tensor::unwrap(stack[5]));
  const Tensor bias(op, "bias", Tensor::unwrap(stack[6]));
  const int32_t cpu = aoti_torch_device_type_cpu();

  LinearCall all = {};
  all.shape = make_shape(op, as_int(stack[7]), as_int(stack[8]), as_int(stack[9]), as_int(stack[10]));
  const Shape& s = all.shape;
  if (qweight.dim() != 5) qweight.refuse("of shape [E, N16, W, 16, 4]");
  const int64_t experts = qweight.size(0);
  set_weight(all, check_weight(op, s, qweight, scales, zeros, codebook, experts));
  all.int8_activations = as_bool(stack[11]);
  expect_int_codes(op, all);
  set_activations(all, x);
  if (bias.defined()) {
    all.bias_dtype = expect_float(bias);
    bias.expect_shape({experts, s.out_features});
    all.bias = bias.data(cpu, element_size(all.bias_dtype));
  }
  if (counts.dtype() != aoti_torch_dtype_int64()) counts.refuse("int64");
  counts.expect_shape({experts});
  const int64_t* count = static_cast<const int64_t*>(counts.data(cpu, 8));

  const int64_t blocks = (s.out_features + kRows - 1) / kRows, size = element_size(all.x_dtype);
  const int64_t scale_bytes = blocks * s.groups * kRows * element_size(all.scale_dtype);
  std::vector<LinearCall> calls;
  int64_t token = 0;
  for (int64_t e = 0; e < experts; ++e) {
    expect(count[e] >= 0 && count[e] <= all.tokens - token, op, "counts must be at least 0 and add up to M");
    if (!count[e]) continue;
    LinearCall call = all;
    call.tokens = count[e];
    call.x = static_cast<const char*>(all.x) + token * s.in_features * size;
    call.qweight = all.qweight + e * blocks * s.words * kLineBytes;
    call.scales = static_cast<const char*>(all.scales) + e * scale_bytes;
    if (all.zeros) call.zeros = static_cast<const char*>(all.zeros) + e * scale_bytes;
    if (all.bias) call.bias = static_cast<const char*>(all.bias) + e * s.out_features * element_size(all.bias_dtype);
    calls.push_back(call);
    token += count[e];
  }
  expect(token == all.tokens, op, "counts must be at least 0 and add up to M");

  void* y = nullptr;
  const int64_t sizes[2] = {all.tokens, s.out_features};
  const StableIValue out = empty_tensor(sizes, 2, x.dtype(), cpu, x.device_index(), &y);
  stack[0] = filled(op, out, [&] {
    int64_t first = 0;
    for (LinearCall& call : calls) {
      call.y = static_cast<char*>(y) + first * s.out_features * size;
      first += call.tokens;
    }
    launch_linears(calls.data(), static_cast<int64_t>(calls.size()));
  });
}

// hfq::cpu_int8_linear(x, qweight, scales, input_scale?, bias?, in_features, out_features) -> [M, N]
void cpu_int8_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_int8_linear";
  constexpr int64_t kMostColumns = int64_t{1} << 17;  // the sum of a row fits 32 bits
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor input_scale(op, "input_scale", Tensor::unwrap(stack[3])), bias(op, "bias", Tensor::unwrap(stack[4]));

  LinearCall call = {};
  const int64_t in_features = as_int(stack[5]);
  expect(in_features <= kMostColumns, op, "in_features must be at most 131072, got " + std::to_string(in_features));
  call.shape = make_shape(op, 8, in_features, in_features, as_int(stack[6]));
  const Tensor none(op, "none", 0);
  set_weight(call, check_weight(op, call.shape, qweight, scales, none, none));
  call.int8_activations = call.whole_rows = true;
  call.shape.blocks_per_group = 1;
  call.input_scale = optional_input_scale(input_scale);
  stack[0] = multiply(op, call, x, bias);
}

// hfq::cpu_fp8_linear(x, qweight, scales, codebook, input_scale?, bias?, in_features, out_features) -> [M, N]
void cpu_fp8_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_fp8_linear";
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]), codebook(op, "codebook", stack[3]);
  const Tensor input_scale(op, "input_scale", Tensor::unwrap(stack[4])), bias(op, "bias", Tensor::unwrap(stack[5]));

  LinearCall call = {};
  const int64_t in_features = as_int(stack[6]);
  call.shape = make_shape(op, 8, in_features, in_features, as_int(stack[7]));
  set_weight(call, check_weight(op, call.shape, qweight, scales, Tensor(op, "none", 0), codebook));
  call.whole_rows = true;
  call.shape.blocks_per_group = 1;
  call.input_scale = optional_input_scale(input_scale);
  stack[0] = multiply(op, call, x, bias);
}

// hfq::cpu_fp8_round_tokens(x, input_scale?) -> (float32 [M, K], float32 [M, 1])
void cpu_fp8_round_tokens(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_fp8_round_tokens";
  const Tensor x(op, "x", stack[0]), input_scale(op, "input_scale", Tensor::unwrap(stack[1]));
  const int32_t cpu = aoti_torch_device_type_cpu(), float32 = aoti_torch_dtype_float32();

  RoundTokensCall call = {};
  call.x_dtype = expect_float(x);
  if (x.dim() != 2 || x.size(1) == 0) x.refuse("of shape [M, K], K above 0");
  call.shape = make_shape(op, 8, x.size(1), x.size(1), 1);
  call.tokens = x.size(0);
  call.x = x.data(cpu, element_size(call.x_dtype));
  call.input_scale = optional_input_scale(input_scale);

  void *values = nullptr, *scales = nullptr;
  const int64_t sizes[2] = {call.tokens, call.shape.in_features}, scale_sizes[2] = {call.tokens, 1};
  const StableIValue y = empty_tensor(sizes, 2, float32, cpu, x.device_index(), &values);
  stack[0] = filled(op, y, [&] {
    const StableIValue y_scales = empty_tensor(scale_sizes, 2, float32, cpu, x.device_index(), &scales);
    call.values = static_cast<float*>(values);
    call.scales = static_cast<float*>(scales);
    stack[1] = filled(op, y_scales, [&] { launch_round_tokens(call); });
  });
}

// All but y.
DequantizeParams dequantize_params(const char* op, const Shape& shape, const Weight& w, int32_t dtype) {
  DequantizeParams p = {};
  p.shape = shape;
  p.qweight = w.qweight;
  p.scales = w.scales;
  p.zeros = w.zeros;
  p.codebook = w.codebook;
  p.scale_dtype = w.scale_dtype;
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");
  return p;
}

// hfq::cpu_dequantize(qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features, dtype) -> [N, K]
void cpu_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_dequantize";
  const Tensor qweight(op, "qweight", stack[0]), scales(op, "scales", stack[1]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[2])), codebook(op, "codebook", Tensor::unwrap(stack[3]));

  const Shape shape = make_shape(op, as_int(stack[4]), as_int(stack[5]), as_int(stack[6]), as_int(stack[7]));
  const int32_t dtype = as_dtype(stack[8]);
  DequantizeParams p = dequantize_params(op, shape, check_weight(op, shape, qweight, scales, zeros, codebook), dtype);
  const int64_t sizes[2] = {p.shape.out_features, p.shape.in_features};
  const StableIValue y = empty_tensor(sizes, 2, dtype, aoti_torch_device_type_cpu(), qweight.device_index(), &p.y);
  stack[0] = filled(op, y, [&] { launch_dequantize(p); });
}

// hfq::cpu_dequantize_into(out, qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features) -> ()
void cpu_dequantize_into(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_dequantize_into";
  const Tensor out(op, "out", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[3])), codebook(op, "codebook", Tensor::unwrap(stack[4]));

  const Shape shape = make_shape(op, as_int(stack[5]), as_int(stack[6]), as_int(stack[7]), as_int(stack[8]));
  DequantizeParams p = dequantize_params(op, shape, check_weight(op, shape, qweight, scales, zeros, codebook), out.dtype());
  out.expect_shape({shape.out_features, shape.in_features});
  p.y = out.data(aoti_torch_device_type_cpu(), element_size(p.y_dtype));
  launch_dequantize(p);
}

// hfq::cpu_lookup(index, qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features, dtype) -> [T, K]
void cpu_lookup(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_lookup";
  const Tensor index(op, "index", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[3])), codebook(op, "codebook", Tensor::unwrap(stack[4]));

  const Shape shape = make_shape(op, as_int(stack[5]), as_int(stack[6]), as_int(stack[7]), as_int(stack[8]));
  const int32_t cpu = aoti_torch_device_type_cpu(), dtype = as_dtype(stack[9]);
  LookupCall call = {};
  call.table = dequantize_params(op, shape, check_weight(op, shape, qweight, scales, zeros, codebook), dtype);
  if (index.dtype() != aoti_torch_dtype_int64()) index.refuse("int64");
  if (index.dim() != 1) index.refuse("of shape [T]");
  call.index = static_cast<const int64_t*>(index.data(cpu, 8));
  call.tokens = index.size(0);
  for (int64_t t = 0; t < call.tokens; ++t) {
    const int64_t row = call.index[t];
    expect(row >= 0 && row < shape.out_features, op, "index must be from 0 to " + std::to_string(shape.out_features - 1) + ", got " + std::to_string(row));
  }
  const int64_t sizes[2] = {call.tokens, shape.in_features};
  const StableIValue y = empty_tensor(sizes, 2, dtype, cpu, qweight.device_index(), &call.table.y);
  stack[0] = filled(op, y, [&] { launch_lookup(call); });
}

bool register_all() {
  TorchLibraryHandle library = nullptr;  // lives as long as the process, like the operators
  if (aoti_torch_library_init_impl("hfq", "CPU", __FILE__, __LINE__, &library) != 0) return false;
  return register_product(library, "cpu_linear", cpu_linear) && register_product(library, "cpu_int8_linear", cpu_int8_linear) &&
         register_product(library, "cpu_fp8_linear", cpu_fp8_linear) && register_impl(library, "cpu_fp8_round_tokens", cpu_fp8_round_tokens) &&
         register_impl(library, "cpu_experts_linear", cpu_experts_linear) &&
         register_impl(library, "cpu_dequantize", cpu_dequantize) && register_impl(library, "cpu_dequantize_into", cpu_dequantize_into) &&
         register_impl(library, "cpu_lookup", cpu_lookup) && register_spqr(library) && register_rounding(library) && register_moments(library) &&
         register_planes(library) && register_decode(library);
}

const bool registered = register_all();

}  // namespace
}  // namespace hfq

// What hfq/kernels/native.py asks through ctypes.
#define HFQ_EXPORT extern "C" __attribute__((visibility("default")))
HFQ_EXPORT int hfq_cpu_registered() { return hfq::registered; }
HFQ_EXPORT const char* hfq_cpu_isas() { return hfq::supported_isas(); }
HFQ_EXPORT const char* hfq_cpu_isa() { return hfq::kernels().name; }
HFQ_EXPORT int hfq_cpu_select_isa(const char* name) { return hfq::select_isa(name); }
