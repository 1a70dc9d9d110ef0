// Reading the arguments of a boxed operator and checking tensors. Errors are C++ exceptions: PyTorch's dispatcher passes them on and
// Python sees a RuntimeError with the message.
//
// A boxed operator receives StableIValue stack[]: integers and bools by value, a tensor as an owned handle, an optional as null or an
// owned pointer to its value. The operator frees what it takes and leaves its results, owned, in stack[0...].
#pragma once

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "torch_shim.h"

namespace hfq {

constexpr uint64_t kTorch211 = (2ull << 56) | (11ull << 48);  // the version whose calling conventions we follow

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

// What PyTorch says of the error that has just been, or `otherwise`. Programs look for words of it: "CUDA out of memory."
inline std::string error_text(const char* otherwise) {
  const char* const text = torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
  return text && *text ? text : otherwise;
}

inline void check_shim(AOTITorchError error, const char* what) {
  if (error != 0) fail(std::string("hfq: PyTorch reported an error in ") + what + ": " + error_text("it is on standard error"));
}

// One tensor argument, owned. `name` appears in messages. An absent optional has no handle.
class Tensor {
 public:
  Tensor(const char* op, const char* name, StableIValue value) : op_(op), name_(name) {
    std::memcpy(&handle_, &value, sizeof handle_);
    if (handle_) read();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_) aoti_torch_delete_tensor_object(handle_);
  }

  // The value of an optional argument; frees its box.
  static StableIValue unwrap(StableIValue value) {
    StableIValue* box;
    std::memcpy(&box, &value, sizeof box);
    if (!box) return 0;
    const StableIValue inner = *box;
    if (torch_delete_stable_ivalue)
      torch_delete_stable_ivalue(box);
    else
      delete box;
    return inner;
  }

  bool defined() const { return handle_ != nullptr; }
  int64_t dim() const { return dim_; }
  int64_t size(int64_t i) const { return sizes_[i]; }
  int32_t dtype() const { return dtype_; }
  int32_t device_index() const { return device_index_; }

  std::string shape_text() const {
    std::string text = "[";
    for (int64_t i = 0; i < dim_; ++i) text += (i ? ", " : "") + std::to_string(sizes_[i]);
    return text + "]";
  }

  [[noreturn]] void refuse(const std::string& expected) const {
    fail(std::string("hfq::") + op_ + ": " + name_ + " must be " + expected + "; got shape " + shape_text());
  }

  void expect_shape(std::initializer_list<int64_t> sizes) const { expect_stack(0, sizes); }

  // The same with `count` in front, if that is not 0.
  void expect_stack(int64_t count, std::initializer_list<int64_t> sizes) const {
    int64_t i = count ? 1 : 0;
    bool same = static_cast<int64_t>(sizes.size()) + i == dim_ && (!count || sizes_[0] == count);
    for (const int64_t size : sizes) same = same && sizes_[i++] == size;
    if (same) return;
    std::string text = count ? std::to_string(count) : "";
    for (const int64_t size : sizes) text += (text.empty() ? "" : ", ") + std::to_string(size);
    refuse("of shape [" + text + "]");
  }

  int64_t numel() const {
    int64_t elements = 1;
    for (int64_t i = 0; i < dim_; ++i) elements *= sizes_[i];
    return elements;
  }

  // The address of the first element, after checking device, contiguity and that the storage holds all elements.
  void* data(int32_t device_type, int64_t element_size) const {
    if (device_type_ != device_type) refuse("on the device that the operator runs on (all tensors on one device)");
    bool contiguous = false;
    check_shim(aoti_torch_is_contiguous(handle_, &contiguous), "is_contiguous");
    if (!contiguous) refuse("contiguous");
    return pointer(numel(), element_size);
  }

  // The same of a tensor that is rows of contiguous elements, `stride` elements apart: a part of the columns of a contiguous one.
  void* rows(int32_t device_type, int64_t element_size, int64_t& stride) const {
    if (device_type_ != device_type) refuse("on the device that the operator runs on (all tensors on one device)");
    int64_t* strides = nullptr;
    check_shim(aoti_torch_get_strides(handle_, &strides), "strides");
    const int64_t columns = sizes_[dim_ - 1];
    bool regular = columns < 2 || strides[dim_ - 1] == 1;
    stride = columns;
    int64_t rows = 1;  // of the dimensions that are behind us
    for (int64_t i = dim_ - 2; i >= 0; --i) {
      if (sizes_[i] == 1) continue;
      if (rows == 1) stride = strides[i];
      regular = regular && strides[i] == stride * rows;
      rows *= sizes_[i];
    }
    if (!regular || stride < columns) refuse("contiguous in its last dimension, with rows at one distance");
    return pointer(rows && columns ? (rows - 1) * stride + columns : 0, element_size);
  }

 private:
  void* pointer(int64_t elements, int64_t element_size) const {
    int64_t offset = 0, bytes = 0;
    check_shim(aoti_torch_get_storage_offset(handle_, &offset), "storage_offset");
    check_shim(aoti_torch_get_storage_size(handle_, &bytes), "storage size");
    if (elements > 0 && (offset + elements) * element_size > bytes) refuse("backed by enough storage");
    void* pointer = nullptr;
    check_shim(aoti_torch_get_data_ptr(handle_, &pointer), "data_ptr");
    if (!pointer && elements > 0) refuse("backed by memory");
    return pointer;
  }

  void read() {
    check_shim(aoti_torch_get_dim(handle_, &dim_), "dim");
    check_shim(aoti_torch_get_sizes(handle_, &sizes_), "sizes");
    check_shim(aoti_torch_get_dtype(handle_, &dtype_), "dtype");
    check_shim(aoti_torch_get_device_type(handle_, &device_type_), "device_type");
    check_shim(aoti_torch_get_device_index(handle_, &device_index_), "device_index");
  }

  const char* op_;
  const char* name_;
  AtenTensorHandle handle_ = nullptr;
  int64_t* sizes_ = nullptr;
  int64_t dim_ = 0;
  int32_t dtype_ = 0, device_type_ = 0, device_index_ = 0;
};

// A new contiguous tensor, as an operator's result. At most 8 dimensions.
inline StableIValue empty_tensor(const int64_t* sizes, int64_t dims, int32_t dtype, int32_t device_type, int32_t device_index, void** data) {
  int64_t strides[8], stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle out = nullptr;
  if (aoti_torch_empty_strided(dims, sizes, strides, dtype, device_type, device_index, &out) != 0)
    fail("hfq: no memory for a tensor of " + std::to_string(stride) + " elements: " + error_text("the device is out of memory."));
  if (aoti_torch_get_data_ptr(out, data) != 0) {
    aoti_torch_delete_tensor_object(out);
    fail("hfq: PyTorch reported an error in data_ptr");
  }
  StableIValue value = 0;
  std::memcpy(&value, &out, sizeof out);
  return value;
}

inline int64_t as_int(StableIValue value) { return static_cast<int64_t>(value); }
inline double as_double(StableIValue value) {
  double number;
  std::memcpy(&number, &value, sizeof number);
  return number;
}
inline bool as_bool(StableIValue value) { return (value & 0xff) != 0; }
inline int32_t as_dtype(StableIValue value) { return static_cast<int32_t>(value); }

// Registers an operator's implementation; called once when the library is loaded. Returns false on failure.
inline bool register_impl(TorchLibraryHandle library, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t)) {
  return torch_library_impl(library, name, fn, kTorch211) == 0;
}

// A product and its overload without a gradient (`define_product` in hfq/kernels/ops.py).
inline bool register_product(TorchLibraryHandle library, const std::string& name, void (*fn)(StableIValue*, uint64_t, uint64_t)) {
  return register_impl(library, name.c_str(), fn) && register_impl(library, (name + ".inference").c_str(), fn);
}

}  // namespace hfq
