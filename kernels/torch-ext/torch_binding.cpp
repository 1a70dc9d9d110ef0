// Operators of hfq for the CPU: read the arguments, validate every one of them, launch. Schemas are defined in hfq/kernels/ops.py.
#include "../cpu/isa.h"
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

Shape make_shape(const char* op, int64_t bits, int64_t group_size, int64_t in_features, int64_t out_features) {
  expect(bits == 4 || bits == 8, op, "bits must be 4 or 8, got " + std::to_string(bits));
  expect_sizes(op, in_features, out_features);
  const int64_t columns = 32 / bits;
  expect(group_size > 0 && (group_size >= in_features || group_size % columns == 0), op,
         "group_size must be a multiple of " + std::to_string(columns) + " or at least in_features (one group per row), got " +
             std::to_string(group_size));
  Shape s;
  s.in_features = in_features;
  s.out_features = out_features;
  s.group_size = group_size < in_features ? group_size : in_features;
  s.groups = (in_features + s.group_size - 1) / s.group_size;
  s.words = (in_features + columns - 1) / columns;
  s.blocks_per_group = (s.group_size + kActBlock - 1) / kActBlock;
  s.bits = static_cast<int32_t>(bits);
  return s;
}

// The weight's tensors in layout rows16.
struct Weight {
  const uint8_t* qweight;
  const void* scales;
  const void* zeros;
  const float* codebook;
  DType scale_dtype;
};

Weight check_weight(const char* op, const Shape& s, const Tensor& qweight, const Tensor& scales, const Tensor& zeros, const Tensor& codebook) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  const int64_t blocks = (s.out_features + kRows - 1) / kRows;
  Weight w = {};
  if (qweight.dtype() != aoti_torch_dtype_uint8()) qweight.refuse("uint8");
  qweight.expect_shape({blocks, s.words, kRows, 4});
  w.qweight = static_cast<const uint8_t*>(qweight.data(cpu, 1));
  w.scale_dtype = expect_float(scales);
  scales.expect_shape({blocks, s.groups, kRows});
  w.scales = scales.data(cpu, element_size(w.scale_dtype));
  if (zeros.defined()) {
    if (zeros.dtype() != scales.dtype()) zeros.refuse("of the same dtype as scales");
    zeros.expect_shape({blocks, s.groups, kRows});
    w.zeros = zeros.data(cpu, element_size(w.scale_dtype));
  }
  if (codebook.defined()) {
    expect(s.bits == 4, op, "a codebook needs bits=4");
    expect(!zeros.defined(), op, "a codebook takes no zeros");
    if (codebook.dtype() != aoti_torch_dtype_float32()) codebook.refuse("float32");
    codebook.expect_shape({16});
    w.codebook = static_cast<const float*>(codebook.data(cpu, 4));
  }
  return w;
}

// Completes a call with the activations and the bias, runs it, and gives its result.
StableIValue multiply(const char* op, LinearCall& call, const Tensor& x, const Tensor& bias) {
  const int32_t cpu = aoti_torch_device_type_cpu();
  call.x_dtype = expect_float(x);
  if (x.dim() != 2 || x.size(1) != call.shape.in_features) x.refuse("of shape [M, in_features=" + std::to_string(call.shape.in_features) + "]");
  call.tokens = x.size(0);
  call.x = x.data(cpu, element_size(call.x_dtype));
  if (bias.defined()) {
    call.bias_dtype = expect_float(bias);
    bias.expect_shape({call.shape.out_features});
    call.bias = bias.data(cpu, element_size(call.bias_dtype));
  }

  const int64_t sizes[2] = {call.tokens, call.shape.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cpu, x.device_index(), &call.y);
  return filled(op, y, [&] { launch_linear(call); });
}

// hfq::cpu_linear(x, qweight, scales, zeros?, codebook?, bias?, bits, group_size, in_features, out_features, int8_activations) -> [M, N]
void cpu_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_linear";
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[3])), codebook(op, "codebook", Tensor::unwrap(stack[4]));
  const Tensor bias(op, "bias", Tensor::unwrap(stack[5]));

  LinearCall call = {};
  call.shape = make_shape(op, as_int(stack[6]), as_int(stack[7]), as_int(stack[8]), as_int(stack[9]));
  const Weight w = check_weight(op, call.shape, qweight, scales, zeros, codebook);
  call.qweight = w.qweight;
  call.scales = w.scales;
  call.zeros = w.zeros;
  call.codebook = w.codebook;
  call.scale_dtype = w.scale_dtype;
  call.int8_activations = as_bool(stack[10]);
  stack[0] = multiply(op, call, x, bias);
}

// hfq::cpu_int8_linear(x, qweight, scales, input_scale?, bias?, in_features, out_features) -> [M, N]
void cpu_int8_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_int8_linear";
  constexpr int64_t kMostColumns = int64_t{1} << 17;  // the sum of a row fits 32 bits
  const Tensor x(op, "x", stack[0]), qweight(op, "qweight", stack[1]), scales(op, "scales", stack[2]);
  const Tensor input_scale(op, "input_scale", Tensor::unwrap(stack[3])), bias(op, "bias", Tensor::unwrap(stack[4]));
  const int32_t cpu = aoti_torch_device_type_cpu();

  LinearCall call = {};
  const int64_t in_features = as_int(stack[5]);
  expect(in_features <= kMostColumns, op, "in_features must be at most 131072, got " + std::to_string(in_features));
  call.shape = make_shape(op, 8, in_features, in_features, as_int(stack[6]));
  const Tensor none(op, "none", 0);
  const Weight w = check_weight(op, call.shape, qweight, scales, none, none);
  call.qweight = w.qweight;
  call.scales = w.scales;
  call.scale_dtype = w.scale_dtype;
  call.int8_activations = call.whole_rows = true;
  if (input_scale.defined()) {
    if (input_scale.dtype() != aoti_torch_dtype_float32()) input_scale.refuse("float32");
    input_scale.expect_shape({1});
    call.input_scale = static_cast<const float*>(input_scale.data(cpu, 4));
  }
  stack[0] = multiply(op, call, x, bias);
}

// hfq::cpu_dequantize(qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features, dtype) -> [N, K]
void cpu_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_dequantize";
  const Tensor qweight(op, "qweight", stack[0]), scales(op, "scales", stack[1]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[2])), codebook(op, "codebook", Tensor::unwrap(stack[3]));

  DequantizeParams p = {};
  p.shape = make_shape(op, as_int(stack[4]), as_int(stack[5]), as_int(stack[6]), as_int(stack[7]));
  const Weight w = check_weight(op, p.shape, qweight, scales, zeros, codebook);
  p.qweight = w.qweight;
  p.scales = w.scales;
  p.zeros = w.zeros;
  p.codebook = w.codebook;
  p.scale_dtype = w.scale_dtype;
  const int32_t dtype = as_dtype(stack[8]);
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");

  const int64_t sizes[2] = {p.shape.out_features, p.shape.in_features};
  const StableIValue y = empty_tensor(sizes, 2, dtype, aoti_torch_device_type_cpu(), qweight.device_index(), &p.y);
  stack[0] = filled(op, y, [&] { launch_dequantize(p); });
}

bool register_all() {
  TorchLibraryHandle library = nullptr;  // lives as long as the process, like the operators
  if (aoti_torch_library_init_impl("hfq", "CPU", __FILE__, __LINE__, &library) != 0) return false;
  return register_impl(library, "cpu_linear", cpu_linear) && register_impl(library, "cpu_int8_linear", cpu_int8_linear) &&
         register_impl(library, "cpu_dequantize", cpu_dequantize) && register_spqr(library) && register_rounding(library) &&
         register_moments(library);
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
