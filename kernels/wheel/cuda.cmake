# libhfq_cuda.so. Real code for the data-centre and consumer generations that matter, PTX of the last for what follows; nvcc decides which
# of them it knows (12.8 and later know 100 and 120).
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below, once nvcc can be asked
  set(choose_archs TRUE)
endif()
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

if(choose_archs)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(archs "")
  foreach(arch 80 89 90a 100a 120a)
    string(REPLACE "a" "" number ${arch})
    if(known MATCHES "sm_${number}")
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  list(APPEND archs 90-virtual)
else()
  set(archs ${CMAKE_CUDA_ARCHITECTURES})
endif()

add_library(hfq_cuda MODULE "${KERNELS}/torch-ext/torch_binding_cuda.cpp" "${KERNELS}/torch-ext/torch_binding_cuda_fragments.cpp"
                            "${KERNELS}/cuda/dequantize.cu"
                            "${KERNELS}/cuda/experts.cu" "${KERNELS}/cuda/experts_int2.cu" "${KERNELS}/cuda/experts_int3.cu"
                            "${KERNELS}/cuda/experts_int4.cu" "${KERNELS}/cuda/experts_int8.cu" "${KERNELS}/cuda/experts_table4.cu"
                            "${KERNELS}/cuda/gemm.cu" "${KERNELS}/cuda/gemm_int2.cu" "${KERNELS}/cuda/gemm_int3.cu"
                            "${KERNELS}/cuda/gemm_int4.cu" "${KERNELS}/cuda/gemm_int8.cu" "${KERNELS}/cuda/gemm_plan.cu"
                            "${KERNELS}/cuda/gemm_table4.cu"
                            "${KERNELS}/cuda/linear.cu" "${KERNELS}/cuda/linear_int2.cu" "${KERNELS}/cuda/linear_int3.cu"
                            "${KERNELS}/cuda/linear_int4.cu" "${KERNELS}/cuda/linear_int8.cu" "${KERNELS}/cuda/linear_table4.cu"
                            "${KERNELS}/cuda/unpack.cu")
set_target_properties(hfq_cuda PROPERTIES CUDA_ARCHITECTURES "${archs}" INSTALL_RPATH "" SUFFIX ".so")
target_compile_options(hfq_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-O3>)
add_torch_stub(torch_cuda)
link_torch_stubs(hfq_cuda torch_cpu torch_cuda)
install(TARGETS hfq_cuda LIBRARY DESTINATION "${INSTALL_TO}")

set(cuda_built true)
set(cuda_reason "")
set(cuda_compiler "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
set(cuda_archs ${archs})
