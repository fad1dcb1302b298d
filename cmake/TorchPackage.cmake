# The target torch_package: the installed PyTorch's headers and libraries.
#
# find_package(Torch) is not used: with a CUDA build of PyTorch it stops where no CUDA toolkit is
# installed, though nothing here needs one.
find_package(Python COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
          "import torch, os; print(os.path.dirname(torch.__file__), torch.__version__, torch.version.cuda or 'none', int(torch.compiled_with_cxx11_abi()), sep=';')"
  OUTPUT_VARIABLE torch_facts OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE torch_result)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "PyTorch is not installed for ${Python_EXECUTABLE}; run: pip install torch")
endif()
list(GET torch_facts 0 TORCH_PACKAGE_DIR)
list(GET torch_facts 1 TORCH_PACKAGE_VERSION)
list(GET torch_facts 2 TORCH_PACKAGE_CUDA)
list(GET torch_facts 3 torch_cxx11_abi)
message(STATUS "PyTorch ${TORCH_PACKAGE_VERSION} (CUDA ${TORCH_PACKAGE_CUDA}) at ${TORCH_PACKAGE_DIR}")
if(TORCH_PACKAGE_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "qtoolkit needs PyTorch 2.11 or later, found ${TORCH_PACKAGE_VERSION}")
endif()

add_library(torch_package INTERFACE IMPORTED)
target_include_directories(torch_package SYSTEM INTERFACE
  "${TORCH_PACKAGE_DIR}/include" "${TORCH_PACKAGE_DIR}/include/torch/csrc/api/include")
target_compile_definitions(torch_package INTERFACE _GLIBCXX_USE_CXX11_ABI=${torch_cxx11_abi})
target_link_libraries(torch_package INTERFACE
  "${TORCH_PACKAGE_DIR}/lib/libtorch.so" "${TORCH_PACKAGE_DIR}/lib/libtorch_cpu.so"
  "${TORCH_PACKAGE_DIR}/lib/libc10.so")

# The target torch_openmp: the OpenMP runtime that PyTorch brings, so that a process has one only.
# at::parallel_for is a template over OpenMP: compiled without -fopenmp it silently runs on one
# thread. The option is GCC's: what Clang makes of it does not run on libgomp.
file(GLOB torch_gomp "${TORCH_PACKAGE_DIR}/lib/libgomp*.so*" "${TORCH_PACKAGE_DIR}/../torch.libs/libgomp*.so*")
add_library(torch_openmp INTERFACE IMPORTED)
target_compile_options(torch_openmp INTERFACE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fopenmp>)
if(torch_gomp)
  list(GET torch_gomp 0 torch_gomp)
  target_link_libraries(torch_openmp INTERFACE "${torch_gomp}")
else()  # this PyTorch uses the system's
  target_link_libraries(torch_openmp INTERFACE gomp)
endif()
