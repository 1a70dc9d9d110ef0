// The part of PyTorch's stable C ABI that hfq calls, declared here so that building needs no PyTorch. All of it exists in libtorch 2.11
// and later; tests/kernels/test_native.py checks every symbol in the installed PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

typedef struct AtenTensorOpaque* AtenTensorHandle;
typedef class TorchLibraryOpaque* TorchLibraryHandle;
typedef uint64_t StableIValue;     // one argument or result of a boxed operator; see boxed_call.h
typedef int32_t AOTITorchError;    // 0: success; the failure's text goes to stderr, too

// ---- errors ----
// Since 2.13, hence weak: the text of the latest failure in this thread.
__attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

// ---- operator registration ----
AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* dispatch_key, const char* file, uint32_t line, TorchLibraryHandle* out);
AOTITorchError torch_library_impl(TorchLibraryHandle library, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t),
                                  uint64_t extension_build_version);

// Since 2.13. Weak: older versions allocate optional arguments with plain new, and so do newer ones for extensions built for 2.11.
__attribute__((weak)) AOTITorchError torch_delete_stable_ivalue(StableIValue* value);

// ---- tensors ----
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** out);
AOTITorchError aoti_torch_get_storage_size(AtenTensorHandle tensor, int64_t* out_bytes);
AOTITorchError aoti_torch_get_storage_offset(AtenTensorHandle tensor, int64_t* out);
AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* out);
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** out_borrowed);
AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** out_borrowed);
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* out);
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* out);
AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* out);
AOTITorchError aoti_torch_is_contiguous(AtenTensorHandle tensor, bool* out);
AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes, const int64_t* strides, int32_t dtype, int32_t device_type,
                                        int32_t device_index, AtenTensorHandle* out_new);

// ---- enumerations ----
int32_t aoti_torch_device_type_cpu();
int32_t aoti_torch_device_type_cuda();
int32_t aoti_torch_dtype_float32();
int32_t aoti_torch_dtype_float16();
int32_t aoti_torch_dtype_bfloat16();
int32_t aoti_torch_dtype_float8_e4m3fn();
int32_t aoti_torch_dtype_bool();
int32_t aoti_torch_dtype_uint8();
int32_t aoti_torch_dtype_int8();
int32_t aoti_torch_dtype_int16();
int32_t aoti_torch_dtype_int32();
int32_t aoti_torch_dtype_int64();

// ---- threads ----
AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, void (*body)(int64_t begin, int64_t end, void* context),
                                  void* context);

// ---- CUDA (libtorch_cuda) ----
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** out_stream);
typedef struct CUDAGuardOpaque* CUDAGuardHandle;
AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* out_new);
AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);

}  // extern "C"
