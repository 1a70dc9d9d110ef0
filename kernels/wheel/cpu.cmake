# libhfq_cpu.so: one object per instruction set, each with its own flags, chosen at run time.
include(CheckCXXCompilerFlag)
set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)
set(CMAKE_VISIBILITY_INLINES_HIDDEN ON)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)

# An empty library that stands for PyTorch's when linking: it makes the name a dependency (NEEDED) of ours and is not installed.
function(add_torch_stub name)
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/stub_${name}.cpp" "")
  add_library(stub_${name} SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub_${name}.cpp")
  set_target_properties(stub_${name} PROPERTIES OUTPUT_NAME ${name} LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stubs")
endfunction()

function(link_torch_stubs target)
  if(APPLE)
    target_link_options(${target} PRIVATE -undefined dynamic_lookup)
    return()
  endif()
  target_link_options(${target} PRIVATE -Wl,--no-as-needed)
  foreach(name ${ARGN})
    target_link_libraries(${target} PRIVATE stub_${name})
  endforeach()
endfunction()

add_library(hfq_cpu MODULE "${KERNELS}/torch-ext/torch_binding.cpp" "${KERNELS}/torch-ext/torch_binding_spqr.cpp"
                           "${KERNELS}/torch-ext/torch_binding_rounding.cpp" "${KERNELS}/torch-ext/torch_binding_moments.cpp"
                           "${KERNELS}/torch-ext/torch_binding_planes.cpp" "${KERNELS}/cpu/launch_planes.cpp"
                           "${KERNELS}/torch-ext/torch_binding_decode.cpp" "${KERNELS}/cpu/launch_decode.cpp"
                           "${KERNELS}/cpu/launch.cpp"
                           "${KERNELS}/cpu/launch_spqr.cpp" "${KERNELS}/cpu/launch_rounding.cpp"
                           "${KERNELS}/cpu/launch_moments.cpp" "${KERNELS}/cpu/isa.cpp" "${KERNELS}/cpu/isa_generic.cpp")
set(cpu_isas generic)

# GCC's own AVX-512 headers read uninitialized variables on purpose. Vectors are passed inside of one file only (psabi).
set(common -O3 -Wall -Wextra -Wno-uninitialized -Wno-maybe-uninitialized -Wno-psabi)
target_compile_options(hfq_cpu PRIVATE ${common})

function(add_isa name)
  string(REPLACE ";" " " flags "${ARGN}")
  string(TOUPPER ${name} upper)
  set(CMAKE_REQUIRED_FLAGS "${flags}")
  check_cxx_compiler_flag("${flags}" HFQ_COMPILER_HAS_${upper})
  if(HFQ_COMPILER_HAS_${upper})
    target_sources(hfq_cpu PRIVATE "${KERNELS}/cpu/isa_${name}.cpp")
    set_source_files_properties("${KERNELS}/cpu/isa_${name}.cpp" PROPERTIES COMPILE_OPTIONS "${ARGN}")
    target_compile_definitions(hfq_cpu PRIVATE HFQ_WITH_${upper})
    set(cpu_isas ${name} ${cpu_isas} PARENT_SCOPE)
  endif()
endfunction()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(avx2 -mavx2 -mfma -mf16c)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  add_isa(avx2 ${avx2})
  add_isa(avx2_vnni ${avx2} -mavxvnni)
  add_isa(avx512 ${avx512})
  add_isa(avx512_vnni ${avx512} -mavx512vnni)
  add_isa(avx512_amx ${avx512} -mavx512vnni -mavx512bf16 -mamx-tile -mamx-bf16 -mamx-int8)
endif()

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  add_isa(neon -march=armv8.2-a+dotprod)
endif()

if(HFQ_SANITIZE)
  # The portable code, whose lanes are arrays, has so many accesses that GCC did not finish it in ten minutes with each check written out.
  # With calls in their place it takes two.
  set_source_files_properties("${KERNELS}/cpu/isa_generic.cpp" PROPERTIES COMPILE_OPTIONS "--param=asan-instrumentation-with-call-threshold=0")
  target_compile_options(hfq_cpu PRIVATE -O1 -g -fsanitize=address -fno-omit-frame-pointer)
  target_link_options(hfq_cpu PRIVATE -fsanitize=address)
endif()

add_torch_stub(torch_cpu)
link_torch_stubs(hfq_cpu torch_cpu)
set_target_properties(hfq_cpu PROPERTIES INSTALL_RPATH "" SUFFIX ".so")
install(TARGETS hfq_cpu LIBRARY DESTINATION "${INSTALL_TO}")
