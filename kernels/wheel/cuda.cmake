# libhfq_cuda.so. Real code for the generations that kernels are tuned for, and PTX of the last for what follows, which the driver compiles
# when the library is first used. Each generation adds a third to the time of the build; a wheel for others names its own:
# -DCMAKE_CUDA_ARCHITECTURES="80-real;90a-real;100a-real;120a-real;90-virtual".
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below, once nvcc can be asked
  set(choose_archs TRUE)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)  # which has machine code for sm_90a
  set(cuda_reason "needs nvcc of CUDA 12.0 or later, ${CMAKE_CUDA_COMPILER} is of ${CMAKE_CUDA_COMPILER_VERSION}")
  return()
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

if(choose_archs)
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --list-gpu-code OUTPUT_VARIABLE known OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(archs "")
  foreach(arch 80 89 90a)
    string(REPLACE "a" "" number ${arch})
    if(known MATCHES "sm_${number}")
      list(APPEND archs ${arch}-real)
    endif()
  endforeach()
  list(APPEND archs 90-virtual)
else()
  set(archs ${CMAKE_CUDA_ARCHITECTURES})
endif()

# Each of our .cu files, compiled side by side, and what registers the operators.
file(GLOB cuda_sources CONFIGURE_DEPENDS "${KERNELS}/cuda/*.cu" "${KERNELS}/torch-ext/torch_binding_cuda*.cpp")
add_library(hfq_cuda MODULE ${cuda_sources})
set_target_properties(hfq_cuda PROPERTIES CUDA_ARCHITECTURES "${archs}" INSTALL_RPATH "" SUFFIX ".so")
target_compile_options(hfq_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O3 -Wall -Wextra> $<$<COMPILE_LANGUAGE:CUDA>:-O3>)
add_torch_stub(torch_cuda)
link_torch_stubs(hfq_cuda torch_cpu torch_cuda)
install(TARGETS hfq_cuda LIBRARY DESTINATION "${INSTALL_TO}")

set(cuda_built true)
set(cuda_reason "")
set(cuda_compiler "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")
set(cuda_archs ${archs})
