// Operators of hfq for CUDA on layout "fragments" (hfq/kernels/fragments.py).
#include "../cuda/experts.h"
#include "../cuda/unpack.h"
#include "cuda_arguments.h"

namespace hfq {
namespace {

// qweight, scales, zeros?, codebook? from stack[first], and bits, group_size, in_features, out_features from stack[sizes].
class Operands {
 public:
  Operands(const char* op, const StableIValue* stack, int first, int sizes)
      : qweight_(op, "qweight", stack[first]),
        scales_(op, "scales", stack[first + 1]),
        zeros_(op, "zeros", Tensor::unwrap(stack[first + 2])),
        codebook_(op, "codebook", Tensor::unwrap(stack[first + 3])),
        op_(op),
        sizes_{as_int(stack[sizes]), as_int(stack[sizes + 1]), as_int(stack[sizes + 2]), as_int(stack[sizes + 3])} {}

  int32_t device_index() const { return qweight_.device_index(); }

  void expect_device(const Tensor& tensor) const {
    if (tensor.device_index() != device_index()) tensor.refuse("on the device of qweight");
  }

  // The first size of a stack of weights.
  int64_t experts() const { return qweight_.dim() ? qweight_.size(0) : 0; }

  // The weight, after all checks; of a stack of `experts` weights the first one. Asynchronous copies want 16 bytes of scales at once.
  Weight weight(int64_t experts = 0) const {
    const auto [bits, group_size, in_features, out_features] = sizes_;
    expect(bits == 2 || bits == 3 || bits == 4 || bits == 8, op_, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
    expect(in_features > 0 && in_features < kMostColumns && in_features % 8 == 0, op_,
           "in_features must be a multiple of 8 below 2^20, got " + std::to_string(in_features));
    expect(out_features > 0 && out_features < (int64_t{1} << 31), op_,
           "out_features must be between 1 and 2^31, got " + std::to_string(out_features));
    expect(group_size > 0 && (group_size >= in_features || group_size % kUnitColumns == 0), op_,
           "group_size must be a multiple of 32, or in_features, got " + std::to_string(group_size));
    const int32_t cuda = aoti_torch_device_type_cuda();
    const int64_t tiles = (out_features + kTileRows - 1) / kTileRows, columns = bits == 3 ? 128 : 256 / bits;
    const int64_t groups = (in_features + group_size - 1) / group_size;

    Weight w = {};
    w.bits = static_cast<int32_t>(bits);
    w.in_features = in_features;
    w.out_features = out_features;
    w.group_size = group_size;
    w.groups = groups;
    if (qweight_.dtype() != aoti_torch_dtype_uint8()) qweight_.refuse("uint8");
    qweight_.expect_stack(experts, {tiles, (in_features + columns - 1) / columns, bits == 3 ? 48 : 32, 16});
    w.qweight = static_cast<const uint8_t*>(qweight_.data(cuda, 1));
    expect(qweight_.numel() / 16 < kMostPieces && scales_.numel() / 4 < kMostPieces, op_, "the weight must be below 64 GiB");
    if (!aligned(w.qweight, 16)) qweight_.refuse("aligned to 16 bytes");
    w.scale_dtype = float_dtype(scales_.dtype());
    if (w.scale_dtype == kUnsupported) scales_.refuse("float32, float16 or bfloat16");
    const auto per_group = [&](const Tensor& tensor) {
      tensor.expect_stack(experts, {tiles, groups, 8, 2});
      expect_device(tensor);
      const void* data = tensor.data(cuda, element_size(w.scale_dtype));
      if (!aligned(data, 16)) tensor.refuse("aligned to 16 bytes");
      return data;
    };
    w.scales = per_group(scales_);
    if (zeros_.defined()) {
      if (zeros_.dtype() != scales_.dtype()) zeros_.refuse("of the same dtype as scales");
      w.zeros = per_group(zeros_);
    }
    if (codebook_.defined()) {
      expect((bits == 4 || bits == 8) && !zeros_.defined(), op_, "a codebook takes 4 bits, or 8 for E4M3, and no zeros");
      if (codebook_.dtype() != aoti_torch_dtype_float32()) codebook_.refuse("float32");
      codebook_.expect_shape({int64_t{1} << bits});
      expect_device(codebook_);
      w.codebook = static_cast<const float*>(codebook_.data(cuda, 4));
    }
    return w;
  }

 private:
  static constexpr int64_t kMostColumns = int64_t{1} << 20, kMostPieces = int64_t{1} << 32;  // pieces of 16 bytes

  const Tensor qweight_, scales_, zeros_, codebook_;
  const char* op_;
  struct {
    int64_t bits, group_size, in_features, out_features;
  } sizes_;
};

// hfq::cuda_linear(x [M, K], qweight, scales, zeros?, codebook?, bias? [N], bits, group_size, in_features, out_features) -> [M, N]
void cuda_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_linear";
  const Tensor x(op, "x", stack[0]), bias(op, "bias", Tensor::unwrap(stack[5]));
  const Operands operands(op, stack, 1, 6);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = operands.device_index();

  LinearParams p = {};
  p.weight = operands.weight();
  set_x(operands, x, p);
  expect_blocks(op, ((p.tokens + 7) / 8) * ((p.weight.out_features + kTileRows - 1) / kTileRows));
  if (bias.defined()) set_bias(operands, bias, {p.weight.out_features}, p);

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  const Tensor kept = aligned_x(op, x, index, stream, p);
  const Tensor sums = workspace_tensor(op, linear_workspace(p), index, p.workspace);
  const int64_t sizes[] = {p.tokens, p.weight.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cuda, index, &p.y);
  stack[0] = checked(op, y, launch_linear(p, stream));
}

// hfq::cuda_experts_linear(x [M, K], counts int64 [E], qweight, scales, zeros?, codebook?, bias? [E, N], bits, group_size, in_features,
//   out_features) -> [M, N], the weight's tensors with E in front
void cuda_experts_linear(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_experts_linear";
  const Tensor x(op, "x", stack[0]), counts(op, "counts", stack[1]), bias(op, "bias", Tensor::unwrap(stack[6]));
  const Operands operands(op, stack, 2, 7);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = operands.device_index();

  ExpertsParams p = {};
  Routing& r = p.routing;
  r = routing_of(op, counts, operands.experts(), x.dim() ? x.size(0) : 0, index);
  LinearParams& linear = p.linear;
  linear.weight = operands.weight(r.experts);
  const Weight& w = linear.weight;
  set_x(operands, x, linear);
  const int64_t tiles = (w.out_features + kTileRows - 1) / kTileRows, columns = w.bits == 3 ? 128 : 256 / w.bits;
  r.qweight_bytes = tiles * ((w.in_features + columns - 1) / columns) * (w.bits == 3 ? 768 : 512);
  r.scale_bytes = tiles * w.groups * kTileRows * element_size(w.scale_dtype);
  if (bias.defined()) {
    set_bias(operands, bias, {r.experts, w.out_features}, linear);
    r.bias_bytes = w.out_features * element_size(linear.bias_dtype);
  }
  expect_blocks(op, tiles * expert_slots(linear.tokens, r.experts, 8));

  const DeviceGuard guard(index);
  const cudaStream_t stream = current_stream(index);
  const Tensor kept = aligned_x(op, x, index, stream, linear);
  const int64_t sizes[] = {linear.tokens, w.out_features};
  const StableIValue y = empty_tensor(sizes, 2, x.dtype(), cuda, index, &linear.y);
  stack[0] = checked(op, y, launch_experts(p, stream));
}

// hfq::cuda_dequantize(qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features, dtype) -> [N, K]
void cuda_dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_dequantize";
  const Operands operands(op, stack, 0, 4);
  stack[0] = unpacked(op, operands, nullptr, as_dtype(stack[8]), launch_unpack);
}

// hfq::cuda_lookup(index [T], qweight, scales, zeros?, codebook?, bits, group_size, in_features, out_features, dtype) -> [T, K]
void cuda_lookup(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_lookup";
  const Tensor index(op, "index", stack[0]);
  const Operands operands(op, stack, 1, 5);
  stack[0] = unpacked(op, operands, &index, as_dtype(stack[9]), launch_unpack);
}

}  // namespace

bool register_fragments(TorchLibraryHandle library) {
  return register_product(library, "cuda_linear", cuda_linear) && register_impl(library, "cuda_dequantize", cuda_dequantize) &&
         register_impl(library, "cuda_lookup", cuda_lookup) && register_impl(library, "cuda_experts_linear", cuda_experts_linear);
}

}  // namespace hfq
