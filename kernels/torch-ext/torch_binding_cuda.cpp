// Operators of hfq for CUDA: read the arguments, validate every one of them, launch on PyTorch's current stream.
#include "../cuda/dequantize.h"
#include "cuda_arguments.h"

namespace hfq {
namespace {

// hfq::cuda_dequantize_neutral(qweight [..., N, B, 1], scales [..., N, G], zeros?, codebook?, g_idx? [K], bits, group_size, in_features, dtype)
//   -> [..., N, K]
void dequantize(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "cuda_dequantize_neutral";
  constexpr int64_t kMaxDims = 8;
  const Tensor qweight(op, "qweight", stack[0]), scales(op, "scales", stack[1]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[2])), codebook(op, "codebook", Tensor::unwrap(stack[3]));
  const Tensor g_idx(op, "g_idx", Tensor::unwrap(stack[4]));
  const int32_t cuda = aoti_torch_device_type_cuda();

  DequantizeParams p = {};
  const int64_t bits = as_int(stack[5]), group_size = as_int(stack[6]), in_features = as_int(stack[7]);
  const int32_t dtype = as_dtype(stack[8]);
  expect(bits >= 1 && bits <= 8, op, "bits must be 1 to 8, got " + std::to_string(bits));
  expect(in_features > 0 && in_features < (int64_t{1} << 31), op, "in_features must be between 1 and 2^31, got " + std::to_string(in_features));
  expect(group_size > 0, op, "group_size must be positive, got " + std::to_string(group_size));
  p.bits = static_cast<int32_t>(bits);
  p.in_features = in_features;
  p.group_size = group_size < in_features ? group_size : in_features;
  p.row_bytes = (in_features * bits + 7) / 8;
  p.y_dtype = float_dtype(dtype);
  expect(p.y_dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");

  const int64_t dims = qweight.dim();
  if (qweight.dtype() != aoti_torch_dtype_uint8() || dims < 3 || dims > kMaxDims || qweight.size(dims - 1) != 1 ||
      qweight.size(dims - 2) != p.row_bytes)
    qweight.refuse("uint8 of shape [..., N, " + std::to_string(p.row_bytes) + ", 1]");
  p.qweight = static_cast<const uint8_t*>(qweight.data(cuda, 1));

  // Scales and zero points: the leading sizes of qweight, then G.
  p.scale_dtype = float_dtype(scales.dtype());
  if (p.scale_dtype == kUnsupported) scales.refuse("float32, float16 or bfloat16");
  int64_t sizes[kMaxDims];
  p.rows = 1;
  for (int64_t i = 0; i < dims - 1; ++i) {
    sizes[i] = i < dims - 2 ? qweight.size(i) : 0;
    if (i < dims - 2) p.rows *= sizes[i];
  }
  const auto expect_device = [&](const Tensor& tensor) {
    if (tensor.device_index() != qweight.device_index()) tensor.refuse("on the device of qweight");
  };
  p.groups = scales.dim() > 0 ? scales.size(scales.dim() - 1) : 0;
  const auto per_group = [&](const Tensor& tensor) {
    bool same = tensor.dim() == dims - 1 && tensor.size(dims - 2) == p.groups;
    for (int64_t i = 0; same && i < dims - 2; ++i) same = tensor.size(i) == sizes[i];
    if (!same) tensor.refuse("of shape [..., N, G] with the leading sizes of qweight " + qweight.shape_text());
    expect_device(tensor);
    return tensor.data(cuda, element_size(p.scale_dtype));
  };
  p.scales = per_group(scales);
  if (zeros.defined()) {
    if (zeros.dtype() != scales.dtype()) zeros.refuse("of the same dtype as scales");
    p.zeros = per_group(zeros);
  }
  if (!g_idx.defined()) {
    const int64_t groups = (in_features + p.group_size - 1) / p.group_size;
    expect(p.groups == groups, op, "scales must have " + std::to_string(groups) + " groups per row, got " + std::to_string(p.groups));
  } else {
    if (g_idx.dtype() != aoti_torch_dtype_int32()) g_idx.refuse("int32");
    g_idx.expect_shape({in_features});
    expect_device(g_idx);
    p.g_idx = static_cast<const int32_t*>(g_idx.data(cuda, 4));
  }
  if (codebook.defined()) {
    if (codebook.dtype() != aoti_torch_dtype_float32()) codebook.refuse("float32");
    codebook.expect_shape({int64_t{1} << bits});
    expect_device(codebook);
    expect(!zeros.defined(), op, "a codebook takes no zeros");
    p.codebook = static_cast<const float*>(codebook.data(cuda, 4));
  }

  const DeviceGuard guard(qweight.device_index());
  sizes[dims - 2] = in_features;
  const StableIValue y = empty_tensor(sizes, dims - 1, dtype, cuda, qweight.device_index(), &p.y);
  stack[0] = checked(op, y, launch_dequantize(p, current_stream(qweight.device_index())));
}

bool register_all() {
  TorchLibraryHandle library = nullptr;  // lives as long as the process, like the operators
  if (aoti_torch_library_init_impl("hfq", "CUDA", __FILE__, __LINE__, &library) != 0) return false;
  return register_impl(library, "cuda_dequantize_neutral", dequantize) && register_fragments(library) && register_int8(library) &&
         register_fp8(library) && register_spqr_fragments(library) && register_decode(library) && register_packing(library);
}

const bool registered = register_all();

}  // namespace
}  // namespace hfq

extern "C" __attribute__((visibility("default"))) int hfq_cuda_registered() { return hfq::registered; }
