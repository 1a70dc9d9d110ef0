// Operators of hfq for CUDA that pack weights (hfq/kernels/cuda_packing_ops.py).
#include "../cuda/packing.h"

#include "cuda_arguments.h"

namespace hfq {
namespace {

constexpr int64_t kMostColumns = int64_t{1} << 31;

// A weight [N, K] of floats.
struct FloatWeight {
  const void* data;
  int64_t rows, columns;
  DType dtype;

  FloatWeight(const char* op, const Tensor& weight) : dtype(float_dtype(weight.dtype())) {
    if (dtype == kUnsupported) weight.refuse("float32, float16 or bfloat16");
    if (weight.dim() != 2) weight.refuse("of shape [N, K]");
    data = weight.data(aoti_torch_device_type_cuda(), element_size(dtype));
    rows = weight.size(0), columns = weight.size(1);
    expect(columns > 0 && columns < kMostColumns, op, "K must be between 1 and 2^31, got " + std::to_string(columns));
  }
};

const float* float32s(const Tensor& tensor, std::initializer_list<int64_t> shape, const Tensor& weight) {
  if (tensor.dtype() != aoti_torch_dtype_float32()) tensor.refuse("float32");
  tensor.expect_shape(shape);
  if (tensor.device_index() != weight.device_index()) tensor.refuse("on the device of weight");
  return static_cast<const float*>(tensor.data(aoti_torch_device_type_cuda(), 4));
}

// hfq::cuda_group_range(weight [N, K], group_size) -> float32 [N, G], float32 [N, G]
void cuda_group_range(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_group_range";
  const Tensor weight(op, "weight", stack[0]);
  const int64_t group_size = as_int(stack[1]);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = weight.device_index();
  const FloatWeight w(op, weight);
  expect(group_size > 0, op, "group_size must be positive, got " + std::to_string(group_size));
  GroupRangeParams p = {};
  p.weight = w.data, p.rows = w.rows, p.columns = w.columns, p.dtype = w.dtype;
  p.group_size = group_size < w.columns ? group_size : w.columns;
  p.groups = (w.columns + p.group_size - 1) / p.group_size;
  expect_blocks(op, p.rows * p.groups);

  const DeviceGuard guard(index);
  const int64_t sizes[] = {p.rows, p.groups};
  void *low = nullptr, *high = nullptr;
  const StableIValue lows = empty_tensor(sizes, 2, aoti_torch_dtype_float32(), cuda, index, &low);
  StableIValue highs = 0;
  stack[0] = filled(op, lows, [&] {
    highs = empty_tensor(sizes, 2, aoti_torch_dtype_float32(), cuda, index, &high);
    p.low = static_cast<float*>(low), p.high = static_cast<float*>(high);
    checked(op, highs, launch_group_range(p, current_stream(index)));
  });
  stack[1] = highs;
}

// hfq::cuda_nearest_codes(weight [N, K], scales [N, G], zeros? [N, G], codebook? [16], bits, group_size) -> uint8 [N, K]
void cuda_nearest_codes(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_nearest_codes";
  const Tensor weight(op, "weight", stack[0]), scales(op, "scales", stack[1]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[2])), codebook(op, "codebook", Tensor::unwrap(stack[3]));
  const int64_t bits = as_int(stack[4]), group_size = as_int(stack[5]);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = weight.device_index();
  const FloatWeight w(op, weight);
  expect(group_size > 0, op, "group_size must be positive, got " + std::to_string(group_size));
  expect(bits >= 1 && bits <= 8, op, "bits must be 1 to 8, got " + std::to_string(bits));
  expect(!zeros.defined() || !codebook.defined(), op, "a codebook takes no zeros");
  NearestCodesParams p = {};
  p.weight = w.data, p.rows = w.rows, p.columns = w.columns, p.dtype = w.dtype;
  p.bits = static_cast<int32_t>(bits);
  p.group_size = group_size < w.columns ? group_size : w.columns;
  p.groups = (w.columns + p.group_size - 1) / p.group_size;
  p.scales = float32s(scales, {p.rows, p.groups}, weight);
  if (zeros.defined()) p.zeros = float32s(zeros, {p.rows, p.groups}, weight);
  if (codebook.defined()) p.codebook = float32s(codebook, {16}, weight);
  expect_blocks(op, (p.columns + 255) / 256 * p.rows);

  const DeviceGuard guard(index);
  const int64_t sizes[] = {p.rows, p.columns};
  void* codes = nullptr;
  const StableIValue y = empty_tensor(sizes, 2, aoti_torch_dtype_uint8(), cuda, index, &codes);
  p.codes = static_cast<uint8_t*>(codes);
  stack[0] = checked(op, y, launch_nearest_codes(p, current_stream(index)));
}

// hfq::cuda_pack_codes(codes uint8 [N, K], bits) -> uint8 [N, B]
void cuda_pack_codes(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_pack_codes";
  const Tensor codes(op, "codes", stack[0]);
  const int64_t bits = as_int(stack[1]);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = codes.device_index();
  PackCodesParams p = {};
  expect(bits >= 1 && bits <= 8, op, "bits must be 1 to 8, got " + std::to_string(bits));
  if (codes.dtype() != aoti_torch_dtype_uint8() || codes.dim() != 2) codes.refuse("uint8 of shape [N, K]");
  p.codes = static_cast<const uint8_t*>(codes.data(cuda, 1));
  p.rows = codes.size(0);
  p.columns = codes.size(1);
  p.row_bytes = (p.columns * bits + 7) / 8;
  p.bits = static_cast<int32_t>(bits);
  expect_blocks(op, p.rows * p.row_bytes / 256);

  const DeviceGuard guard(index);
  const int64_t sizes[] = {p.rows, p.row_bytes};
  void* packed = nullptr;
  const StableIValue y = empty_tensor(sizes, 2, aoti_torch_dtype_uint8(), cuda, index, &packed);
  p.packed = static_cast<uint8_t*>(packed);
  stack[0] = checked(op, y, launch_pack_codes(p, current_stream(index)));
}

// hfq::cuda_to_fragments(qweight uint8 [N, B, 1], bits, halves) -> uint8 [N16, C, 32 | 48, 16]
void cuda_to_fragments(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_to_fragments";
  const Tensor qweight(op, "qweight", stack[0]);
  const int64_t bits = as_int(stack[1]);
  const int32_t cuda = aoti_torch_device_type_cuda(), index = qweight.device_index();
  ToFragmentsParams p = {};
  expect(bits == 2 || bits == 3 || bits == 4 || bits == 8, op, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  p.bits = static_cast<int32_t>(bits);
  p.halves = as_int(stack[2]) != 0;
  if (qweight.dtype() != aoti_torch_dtype_uint8() || qweight.dim() != 3 || qweight.size(2) != 1) qweight.refuse("uint8 of shape [N, B, 1]");
  p.qweight = static_cast<const uint8_t*>(qweight.data(cuda, 1));
  p.rows = qweight.size(0);
  p.row_bytes = qweight.size(1);
  p.columns = p.row_bytes * 8 / bits;
  const int64_t columns = bits == 3 ? 128 : 256 / bits, lines = bits == 3 ? 48 : 32;
  const int64_t sizes[] = {(p.rows + kTileRows - 1) / kTileRows, (p.columns + columns - 1) / columns, lines, 16};
  expect_blocks(op, sizes[0] * sizes[1]);

  const DeviceGuard guard(index);
  void* tiles = nullptr;
  const StableIValue y = empty_tensor(sizes, 4, aoti_torch_dtype_uint8(), cuda, index, &tiles);
  p.tiles = static_cast<uint8_t*>(tiles);
  stack[0] = checked(op, y, launch_to_fragments(p, current_stream(index)));
}

}  // namespace

bool register_packing(TorchLibraryHandle library) {
  return register_impl(library, "cuda_group_range", cuda_group_range) && register_impl(library, "cuda_nearest_codes", cuda_nearest_codes) &&
         register_impl(library, "cuda_pack_codes", cuda_pack_codes) && register_impl(library, "cuda_to_fragments", cuda_to_fragments);
}

}  // namespace hfq
