// Operators that choose codes, for the CPU; schemas and their meaning in hfq/core/columns.py and hfq/core/fit.py.
#include "../cpu/launch.h"
#include "cpu_arguments.h"

namespace hfq {
namespace {

// What both operators call a grid: a codebook, zero points, or one zero for all.
template <class Params>
void take_grid(const char* op, Params& p, const Tensor& codebook, const Tensor& zeros, int64_t bits) {
  expect(bits >= 1 && bits <= 8, op, "bits must be 1 to 8, got " + std::to_string(bits));
  p.most = static_cast<float>((1 << bits) - 1);
  p.zero = static_cast<float>(1 << (bits - 1));
  if (!codebook.defined()) return;
  expect(bits == 4 && !zeros.defined(), op, "a codebook needs bits=4 and takes no zeros");
  codebook.expect_shape({16});
  p.codebook = float32_data(codebook);
}

// hfq::round_columns(targets, origins, asked, groups, scales, zeros?, codebook?, bits) -> (codes, changes)
void round_columns(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "round_columns";
  const Tensor targets(op, "targets", stack[0]), origins(op, "origins", stack[1]), asked(op, "asked", stack[2]);
  const Tensor groups(op, "groups", stack[3]), scales(op, "scales", stack[4]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[5])), codebook(op, "codebook", Tensor::unwrap(stack[6]));
  const int32_t cpu = aoti_torch_device_type_cpu();

  RoundParams p = {};
  if (targets.dim() != 2) targets.refuse("of shape [B, N]");
  p.columns = targets.size(0);
  p.rows = targets.size(1);
  p.targets = float32_data(targets);
  origins.expect_shape({p.columns, p.rows});
  p.origins = float32_data(origins);
  asked.expect_shape({p.columns, p.columns});
  p.asked = float32_data(asked);
  if (groups.dtype() != aoti_torch_dtype_int32()) groups.refuse("int32");
  groups.expect_shape({p.columns});
  p.groups = static_cast<const int32_t*>(groups.data(cpu, 4));
  if (scales.dim() != 2) scales.refuse("of shape [G, N]");
  scales.expect_shape({scales.size(0), p.rows});
  p.scales = float32_data(scales);
  for (int64_t i = 0; i < p.columns; ++i)
    expect(p.groups[i] >= 0 && p.groups[i] < scales.size(0), op, "groups must be between 0 and G - 1, got " + std::to_string(p.groups[i]));
  if (zeros.defined()) {
    zeros.expect_shape({scales.size(0), p.rows});
    p.zeros = float32_data(zeros);
  }
  take_grid(op, p, codebook, zeros, as_int(stack[7]));

  const int64_t sizes[2] = {p.columns, p.rows};
  void* data = nullptr;
  const StableIValue codes = empty_tensor(sizes, 2, aoti_torch_dtype_uint8(), cpu, targets.device_index(), &data);
  p.codes = static_cast<uint8_t*>(data);
  stack[0] = filled(op, codes, [&] {
    const StableIValue changes = empty_tensor(sizes, 2, aoti_torch_dtype_float32(), cpu, targets.device_index(), &data);
    p.changes = static_cast<float*>(data);
    stack[1] = filled(op, changes, [&] { launch_round_columns(p); });
  });
}

// hfq::search_grid(weight, importance?, scales, zeros?, codebook?, bits, group_size, dtype, turns) -> (scales, zeros)
void search_grid(StableIValue* stack, uint64_t, uint64_t) {
  constexpr const char* op = "search_grid";
  const Tensor weight(op, "weight", stack[0]), importance(op, "importance", Tensor::unwrap(stack[1])), scales(op, "scales", stack[2]);
  const Tensor zeros(op, "zeros", Tensor::unwrap(stack[3])), codebook(op, "codebook", Tensor::unwrap(stack[4]));
  const int32_t cpu = aoti_torch_device_type_cpu();

  SearchParams p = {};
  if (weight.dim() != 2) weight.refuse("of shape [N, K]");
  p.rows = weight.size(0);
  p.columns = weight.size(1);
  p.weight = float32_data(weight);
  const int64_t group_size = as_int(stack[6]);
  expect(group_size > 0 || group_size == -1, op, "group_size must be positive or -1, got " + std::to_string(group_size));
  p.group_size = group_size == -1 || group_size > p.columns ? p.columns : group_size;
  p.groups = p.columns ? (p.columns + p.group_size - 1) / p.group_size : 0;
  if (importance.defined()) {
    p.importance_of_rows = importance.dim() == 2;
    if (p.importance_of_rows)
      importance.expect_shape({p.rows, p.columns});
    else
      importance.expect_shape({p.columns});
    p.importance = float32_data(importance);
  }
  if (scales.dim() != 3 || scales.size(0) == 0) scales.refuse("of shape [A, N, G] with A of at least 1");
  p.starts = scales.size(0);
  scales.expect_shape({p.starts, p.rows, p.groups});
  p.scales = float32_data(scales);
  if (zeros.defined()) {
    zeros.expect_shape({p.starts, p.rows, p.groups});
    p.zeros = float32_data(zeros);
  }
  take_grid(op, p, codebook, zeros, as_int(stack[5]));
  p.dtype = float_dtype(as_dtype(stack[7]));
  expect(p.dtype != kUnsupported, op, "dtype must be float32, float16 or bfloat16");
  p.turns = as_int(stack[8]);
  expect(p.turns > 0, op, "turns must be positive, got " + std::to_string(p.turns));

  const int64_t sizes[2] = {p.rows, p.groups};
  void* data = nullptr;
  const StableIValue best_scales = empty_tensor(sizes, 2, aoti_torch_dtype_float32(), cpu, weight.device_index(), &data);
  p.best_scales = static_cast<float*>(data);
  stack[0] = filled(op, best_scales, [&] {
    const StableIValue best_zeros = empty_tensor(sizes, 2, aoti_torch_dtype_float32(), cpu, weight.device_index(), &data);
    p.best_zeros = static_cast<float*>(data);
    stack[1] = filled(op, best_zeros, [&] { launch_search_grid(p); });
  });
}

}  // namespace

bool register_rounding(TorchLibraryHandle library) {
  return register_impl(library, "round_columns", round_columns) && register_impl(library, "search_grid", search_grid);
}

}  // namespace hfq
