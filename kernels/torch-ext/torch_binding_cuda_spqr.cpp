// Operators of format "spqr" for CUDA; schemas in hfq/kernels/cuda_spqr_ops.py, tensors in cuda/spqr.h.
#include "../cuda/spqr.h"
#include "cuda_arguments.h"

namespace hfq {
namespace {

constexpr int kOperands = 6, kSizes = 6;
constexpr int64_t kMostColumns = int64_t{1} << 19, kMostNumbers = int64_t{1} << 31;

// qweight, stat_codes, stats, offsets, columns, values from stack[first]; bits, group_size, stat_bits, stat_group_size, in_features and
// out_features from stack[sizes].
class Operands {
 public:
  Operands(const char* op, const StableIValue* stack, int first, int sizes)
      : qweight_(op, "qweight", stack[first]),
        stat_codes_(op, "stat_codes", stack[first + 1]),
        stats_(op, "stats", stack[first + 2]),
        offsets_(op, "offsets", stack[first + 3]),
        columns_(op, "columns", stack[first + 4]),
        values_(op, "values", stack[first + 5]),
        op_(op) {
    for (int i = 0; i < kSizes; ++i) sizes_[i] = as_int(stack[sizes + i]);
  }

  int32_t device_index() const { return qweight_.device_index(); }

  void expect_device(const Tensor& tensor) const {
    if (tensor.device_index() != device_index()) tensor.refuse("on the device of qweight");
  }

  // The first size of a stack of weights.
  int64_t experts() const { return qweight_.dim() ? qweight_.size(0) : 0; }

  // The weight, after all checks; of a stack of `experts` weights the first one. Asynchronous copies want 16 bytes of codes at once.
  SpqrWeight weight(int64_t experts = 0) const {
    const auto [bits, group_size, stat_bits, rows_per_stat, in_features, out_features] = sizes_;
    expect(bits >= 2 && bits <= 4, op_, "bits must be 2, 3 or 4, got " + std::to_string(bits));
    expect(stat_bits >= 2 && stat_bits <= 8, op_, "stat_bits must be 2 to 8, got " + std::to_string(stat_bits));
    expect(in_features > 0 && in_features < kMostColumns && in_features % 8 == 0, op_,
           "in_features must be a multiple of 8 below 2^19, got " + std::to_string(in_features));
    expect(out_features > 0 && out_features < kMostNumbers, op_, "out_features must be between 1 and 2^31, got " + std::to_string(out_features));
    expect(group_size > 0 && (group_size >= in_features || group_size % kHalfColumns == 0), op_,
           "group_size must be a multiple of 16, or in_features, got " + std::to_string(group_size));
    expect(rows_per_stat > 0 && rows_per_stat % kTileRows == 0, op_,
           "stat_group_size must be a multiple of 16, got " + std::to_string(rows_per_stat));
    const int64_t tiles = (out_features + kTileRows - 1) / kTileRows, columns = bits == 4 ? 64 : 128;

    SpqrWeight w = {};
    w.bits = static_cast<int32_t>(bits);
    w.in_features = in_features;
    w.out_features = out_features;
    w.group_size = group_size;
    w.rows_per_stat = rows_per_stat;
    w.groups = group_size < in_features ? (in_features + group_size - 1) / group_size : 1;
    w.stat_groups = (2 * w.groups * stat_bits + 7) / 8 * 8 / (2 * stat_bits);
    w.wide_codes = stat_bits > 4;
    const auto codes = [&](const Tensor& tensor, int64_t blocks, int64_t size, int64_t last, uintptr_t bytes) {
      if (tensor.dtype() != aoti_torch_dtype_uint8()) tensor.refuse("uint8");
      tensor.expect_stack(experts, {tiles, blocks, size, last});
      return static_cast<const uint8_t*>(pointer(tensor, 1, bytes));
    };
    w.qweight = codes(qweight_, (in_features + columns - 1) / columns, bits == 3 ? 48 : 32, 16, 16);
    w.stat_codes = codes(stat_codes_, w.stat_groups, 8, w.wide_codes ? 4 : 2, 16);
    w.stat_dtype = float_dtype(stats_.dtype());
    if (w.stat_dtype == kUnsupported) stats_.refuse("float32, float16 or bfloat16");
    const int64_t stat_bytes = element_size(w.stat_dtype);
    stats_.expect_stack(experts, {(out_features + rows_per_stat - 1) / rows_per_stat, w.groups, 4});
    w.stats = pointer(stats_, stat_bytes, 4 * stat_bytes);
    if (offsets_.dtype() != aoti_torch_dtype_int32()) offsets_.refuse("int32");
    offsets_.expect_stack(experts, {out_features + 1});
    w.offsets = static_cast<const int32_t*>(pointer(offsets_, 4, 4));
    const int64_t last = columns_.dim() - 1;
    if (last != (experts ? 1 : 0) || columns_.size(last) >= kMostNumbers) columns_.refuse("of shape [Z], Z below 2^31, or [E, Z]");
    w.outliers = columns_.size(last);
    columns_.expect_stack(experts, {w.outliers});
    w.wide_columns = columns_.dtype() == aoti_torch_dtype_int32();
    if (!w.wide_columns && columns_.dtype() != aoti_torch_dtype_int16()) columns_.refuse("int16 or int32");
    w.columns = pointer(columns_, w.wide_columns ? 4 : 2, w.wide_columns ? 4 : 2);
    if (values_.dtype() != stats_.dtype()) values_.refuse("of the same dtype as stats");
    values_.expect_stack(experts, {w.outliers});
    w.values = pointer(values_, stat_bytes, stat_bytes);
    return w;
  }

 private:
  const void* pointer(const Tensor& tensor, int64_t element_size, uintptr_t alignment) const {
    const void* data = tensor.data(aoti_torch_device_type_cuda(), element_size);
    expect_device(tensor);
    if (!aligned(data, alignment)) tensor.refuse("aligned to " + std::to_string(alignment) + " bytes");
    return data;
  }

  const Tensor qweight_, stat_codes_, stats_, offsets_, columns_, values_;
  const char* op_;
  int64_t sizes_[kSizes];
};

// hfq::cuda_spqr_linear(x [M, K], <operands>, bias? [N], <sizes>) -> [M, N]
void cuda_spqr_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_spqr_linear";
  const Tensor x(op, "x", stack[0]), bias(op, "bias", Tensor::unwrap(stack[1 + kOperands]));
  const Operands operands(op, stack, 1, 2 + kOperands);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = operands.device_index();

  SpqrLinearParams p = {};
  p.weight = operands.weight();
  set_x(operands, x, p);
  expect_blocks(op, ((p.tokens + 7) / 8) * ((p.weight.out_features + kTileRows - 1) / kTileRows));
  if (bias.defined()) set_bias(operands, bias, {p.weight.out_features}, p);

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  const Tensor kept = aligned_x(op, x, index, stream, p);
  const Tensor sums = workspace_tensor(op, spqr_workspace(p), index, p.workspace);
  const int64_t sizes[] = {p.tokens, p.weight.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cuda, index, &p.y);
  stack[0] = checked(op, y, launch_spqr_linear(p, stream));
}

// hfq::cuda_spqr_experts_linear(x [M, K], counts int64 [E], <operands, with E in front>, bias? [E, N], <sizes>) -> [M, N]
void cuda_spqr_experts_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_spqr_experts_linear";
  const Tensor x(op, "x", stack[0]), counts(op, "counts", stack[1]), bias(op, "bias", Tensor::unwrap(stack[2 + kOperands]));
  const Operands operands(op, stack, 2, 3 + kOperands);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = operands.device_index();

  SpqrExpertsParams p = {};
  p.routing = routing_of(op, counts, operands.experts(), x.dim() ? x.size(0) : 0, index);
  const int64_t experts = p.routing.experts;
  SpqrLinearParams& linear = p.linear;
  const SpqrWeight& w = linear.weight = operands.weight(experts);
  set_x(operands, x, linear);
  const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows, columns = w.bits == 4 ? 64 : 128;
  p.routing.qweight_bytes = tiles * ((w.in_features + columns - 1) / columns) * (w.bits == 3 ? 768 : 512);
  p.routing.scale_bytes = tiles * w.stat_groups * (w.wide_codes ? 32 : 16);
  p.stat_bytes = (w.out_features + w.rows_per_stat - 1) / w.rows_per_stat * w.groups * 4 * element_size(w.stat_dtype);
  if (bias.defined()) {
    set_bias(operands, bias, {experts, w.out_features}, linear);
    p.routing.bias_bytes = w.out_features * element_size(linear.bias_dtype);
  }
  expect_blocks(op, tiles * expert_slots(linear.tokens, experts, 8));

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  const Tensor kept = aligned_x(op, x, index, stream, linear);
  const Tensor sums = workspace_tensor(op, spqr_workspace(p), index, linear.workspace);
  const int64_t sizes[] = {linear.tokens, w.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cuda, index, &linear.y);
  stack[0] = checked(op, y, launch_spqr_experts(p, stream));
}

// hfq::cuda_spqr_dequantize(<operands>, <sizes>, dtype) -> [N, K]
void cuda_spqr_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_spqr_dequantize";
  const Operands operands(op, stack, 0, kOperands);
  stack[0] = unpacked(op, operands, nullptr, as_dtype(stack[kOperands + kSizes]), launch_spqr_unpack);
}

// hfq::cuda_spqr_lookup(index [T], <operands>, <sizes>, dtype) -> [T, K]
void cuda_spqr_lookup(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_spqr_lookup";
  const Tensor index(op, "index", stack[0]);
  const Operands operands(op, stack, 1, 1 + kOperands);
  stack[0] = unpacked(op, operands, &index, as_dtype(stack[1 + kOperands + kSizes]), launch_spqr_unpack);
}

}  // namespace

bool register_spqr_fragments(TorchLibraryHandle library) {
  return register_product(library, "cuda_spqr_linear", cuda_spqr_linear) &&
         register_impl(library, "cuda_spqr_experts_linear", cuda_spqr_experts_linear) &&
         register_impl(library, "cuda_spqr_dequantize", cuda_spqr_dequantize) &&
         register_impl(library, "cuda_spqr_lookup", cuda_spqr_lookup);
}

}  // namespace hfq
