# qtoolkit_add_cuda_operators(): libqtoolkit_ops_cuda.so from csrc/ops/cuda/*.cu, where nvcc is found.
#
# A library of its own, loaded only where a GPU can run it: without it, or without a GPU, everything
# else works, and PyTorch's dispatcher reports that an operator has no CUDA kernel.
macro(qtoolkit_add_cuda_operators)
  set(QTOOLKIT_CUDA_ENABLED OFF)
  if(NOT QTOOLKIT_CUDA STREQUAL "off" AND NOT TORCH_PACKAGE_CUDA STREQUAL "none")
    include(CheckLanguage)
    check_language(CUDA)
    if(CMAKE_CUDA_COMPILER)
      set(QTOOLKIT_CUDA_ENABLED ON)
    endif()
  endif()
  if(QTOOLKIT_CUDA STREQUAL "on" AND NOT QTOOLKIT_CUDA_ENABLED)
    message(FATAL_ERROR "QTOOLKIT_CUDA=on, but no nvcc was found or PyTorch has no CUDA "
                        "(torch.version.cuda is ${TORCH_PACKAGE_CUDA})")
  endif()
  message(STATUS "CUDA operators: ${QTOOLKIT_CUDA_ENABLED}")
  if(QTOOLKIT_CUDA_ENABLED)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
    endif()
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    file(GLOB QTOOLKIT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/ops/cuda/*.cu)
    add_library(qtoolkit_ops_cuda SHARED ${QTOOLKIT_CUDA_SOURCES})
    # --fmad=false: the number rule rounds after every operation, on every path.
    target_compile_options(qtoolkit_ops_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall>)
    target_include_directories(qtoolkit_ops_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(qtoolkit_ops_cuda PRIVATE qtoolkit_ops torch_package
      "${TORCH_PACKAGE_DIR}/lib/libtorch_cuda.so" "${TORCH_PACKAGE_DIR}/lib/libc10_cuda.so")
    set_target_properties(qtoolkit_ops_cuda PROPERTIES
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Shared
      LIBRARY_OUTPUT_DIRECTORY "${QTOOLKIT_OUTPUT}"
      BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  endif()
endmacro()
