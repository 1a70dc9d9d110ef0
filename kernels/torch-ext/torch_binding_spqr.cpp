// Operators of format "spqr" for the CPU; schemas in hfq/kernels/spqr_ops.py, tensors in cpu/spqr.h.
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

constexpr int kOperands = 6, kSizes = 5;

// The tensors of a weight, owned while the operator runs.
struct Operands {
  Tensor qweight, stat_codes, stats, offsets, columns, values;
  Operands(const char* op, const StableIValue* stack)
      : qweight(op, "qweight", stack[0]), stat_codes(op, "stat_codes", stack[1]), stats(op, "stats", stack[2]),
        offsets(op, "offsets", stack[3]), columns(op, "columns", stack[4]), values(op, "values", stack[5]) {}
};

const uint8_t* codes(const Tensor& tensor, int64_t blocks, int64_t words) {
  if (tensor.dtype() != aoti_torch_dtype_uint8()) tensor.refuse("uint8");
  tensor.expect_shape({blocks, words, kRows, 4});
  return static_cast<const uint8_t*>(tensor.data(aoti_torch_device_type_cpu(), 1));
}

// sizes: bits, group_size, stat_bits, stat_group_size, in_features, then out_features.
SpqrWeight check_weight(const char* op, const Operands& t, const StableIValue* sizes) {
  const int64_t bits = as_int(sizes[0]), group_size = as_int(sizes[1]), stat_bits = as_int(sizes[2]);
  SpqrWeight w = {};
  w.rows_per_stat = as_int(sizes[3]);
  w.in_features = as_int(sizes[4]);
  w.out_features = as_int(sizes[5]);
  expect_sizes(op, w.in_features, w.out_features);
  expect(bits >= 2 && bits <= 4, op, "bits must be 2, 3 or 4, got " + std::to_string(bits));
  expect(stat_bits >= 2 && stat_bits <= 8, op, "stat_bits must be 2 to 8, got " + std::to_string(stat_bits));
  expect(group_size > 0 && (group_size >= w.in_features || group_size % kQuad == 0), op,
         "group_size must be a multiple of 4 or at least in_features (one group per row), got " + std::to_string(group_size));
  expect(w.rows_per_stat > 0 && w.rows_per_stat % kRows == 0, op,
         "stat_group_size must be a multiple of 16, got " + std::to_string(w.rows_per_stat));
  w.bits = static_cast<int32_t>(bits);
  w.stat_bits = static_cast<int32_t>(stat_bits);
  w.group_size = group_size < w.in_features ? group_size : w.in_features;
  w.groups = (w.in_features + w.group_size - 1) / w.group_size;
  w.words = (w.in_features * bits + 31) / 32;
  w.stat_words = (2 * w.groups * stat_bits + 31) / 32;

  const int32_t cpu = aoti_torch_device_type_cpu();
  const int64_t blocks = (w.out_features + kRows - 1) / kRows;
  w.qweight = codes(t.qweight, blocks, w.words);
  w.stat_codes = codes(t.stat_codes, blocks, w.stat_words);
  w.stat_dtype = expect_float(t.stats);
  t.stats.expect_shape({(w.out_features + w.rows_per_stat - 1) / w.rows_per_stat, w.groups, 4});
  w.stats = t.stats.data(cpu, element_size(w.stat_dtype));
  if (t.offsets.dtype() != aoti_torch_dtype_int32()) t.offsets.refuse("int32");
  t.offsets.expect_shape({w.out_features + 1});
  w.offsets = static_cast<const int32_t*>(t.offsets.data(cpu, 4));
  if (t.columns.dim() != 1) t.columns.refuse("of shape [Z]");
  w.outliers = t.columns.size(0);
  w.wide_columns = t.columns.dtype() == aoti_torch_dtype_int32();
  if (!w.wide_columns && t.columns.dtype() != aoti_torch_dtype_int16()) t.columns.refuse("int16 or int32");
  w.columns = t.columns.data(cpu, w.wide_columns ? 4 : 2);
  if (t.values.dtype() != t.stats.dtype()) t.values.refuse("of the same dtype as stats");
  t.values.expect_shape({w.outliers});
  w.values = t.values.data(cpu, element_size(w.stat_dtype));
  return w;
}

// hfq::cpu_spqr_linear(x, <operands>, bias?, <sizes>, out_features) -> [M, N]
void cpu_spqr_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_spqr_linear";
  const Tensor x(op, "x", stack[0]);
  const Operands operands(op, stack + 1);
  const Tensor bias(op, "bias", Tensor::unwrap(stack[1 + kOperands]));
  const int32_t cpu = aoti_torch_device_type_cpu();

  SpqrLinearParams p = {};
  p.weight = check_weight(op, operands, stack + 2 + kOperands);
  p.x_dtype = expect_float(x);
  if (x.dim() != 2 || x.size(1) != p.weight.in_features) x.refuse("of shape [M, in_features=" + std::to_string(p.weight.in_features) + "]");
  p.x = x.data(cpu, element_size(p.x_dtype));
  if (bias.defined()) {
    p.bias_dtype = expect_float(bias);
    bias.expect_shape({p.weight.out_features});
    p.bias = bias.data(cpu, element_size(p.bias_dtype));
  }
  const int64_t sizes[2] = {x.size(0), p.weight.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cpu, x.device_index(), &p.y);
  stack[0] = filled(op, y, [&] { launch_spqr_linear(p, sizes[0]); });
}

// hfq::cpu_spqr_dequantize(<operands>, <sizes>, out_features, dtype) -> [N, K]
void cpu_spqr_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cpu_spqr_dequantize";
  const Operands operands(op, stack);
  SpqrDequantizeParams p = {};
  p.weight = check_weight(op, operands, stack + kOperands);
  const int32_t dtype = as_dtype(stack[kOperands + kSizes + 1]);
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");
  const int64_t sizes[2] = {p.weight.out_features, p.weight.in_features};
  const StableIValue y = empty_tensor(sizes, 2, dtype, aoti_torch_device_type_cpu(), operands.qweight.device_index(), &p.y);
  stack[0] = filled(op, y, [&] { launch_spqr_dequantize(p); });
}

}  // namespace

bool register_spqr(TorchLibraryHandle library) {
  return register_product(library, "cpu_spqr_linear", cpu_spqr_linear) && register_impl(library, "cpu_spqr_dequantize", cpu_spqr_dequantize);
}

}  // namespace hfq
