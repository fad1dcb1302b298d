# qtoolkit_add_cuda_operators(): libqtoolkit_ops_cuda.so from csrc/ops/cuda/*.cu, where nvcc is found
# and fits PyTorch. It sets QTOOLKIT_CUDA_ENABLED.
#
# A library of its own: without it, or without a GPU, everything else works, and PyTorch's
# dispatcher reports that an operator has no CUDA kernel.

# Sets `obstacle` to the reason why the CUDA operators cannot be built, empty if they can.
function(qtoolkit_find_cuda_obstacle obstacle)
  set(${obstacle} "" PARENT_SCOPE)
  if(TORCH_PACKAGE_CUDA STREQUAL "none")
    set(${obstacle} "this PyTorch has no CUDA" PARENT_SCOPE)
    return()
  endif()
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # look again where an earlier run found none
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(${obstacle} "no working nvcc was found" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${CMAKE_CUDA_COMPILER}" --version OUTPUT_VARIABLE nvcc_facts)
  string(REGEX MATCH "release ([0-9]+)\\.[0-9]+" nvcc_release "${nvcc_facts}")
  set(nvcc_major "${CMAKE_MATCH_1}")
  string(REGEX MATCH "^[0-9]+" torch_major "${TORCH_PACKAGE_CUDA}")
  if(NOT nvcc_major STREQUAL torch_major)
    set(${obstacle} "${CMAKE_CUDA_COMPILER} is '${nvcc_release}' and PyTorch is built for CUDA \
${TORCH_PACKAGE_CUDA}; the major versions must be equal" PARENT_SCOPE)
  endif()
endfunction()

# A macro: enable_language works in the scope that calls.
macro(qtoolkit_add_cuda_operators)
  string(TOLOWER "${QTOOLKIT_CUDA}" cuda_wanted)
  set(cuda_obstacle "QTOOLKIT_CUDA=${QTOOLKIT_CUDA}")
  if(cuda_wanted MATCHES "^(auto|on|1|true)$")
    qtoolkit_find_cuda_obstacle(cuda_obstacle)
    if(cuda_obstacle AND NOT cuda_wanted STREQUAL "auto")
      message(FATAL_ERROR "QTOOLKIT_CUDA=${QTOOLKIT_CUDA}, but ${cuda_obstacle}")
    endif()
  elseif(NOT cuda_wanted MATCHES "^(off|0|false)$")
    message(FATAL_ERROR "QTOOLKIT_CUDA is '${QTOOLKIT_CUDA}'; it must be auto, on or off")
  endif()
  if(cuda_obstacle)
    set(QTOOLKIT_CUDA_ENABLED OFF)
    message(STATUS "CUDA operators: OFF (${cuda_obstacle})")
    file(REMOVE "${QTOOLKIT_OUTPUT}/libqtoolkit_ops_cuda.so")  # an earlier build's
  else()
    set(QTOOLKIT_CUDA_ENABLED ON)
    if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
      # Machine code for 7.5, for 8.0 (which 8.6 and 8.9 run too) and for 9.0; the driver compiles
      # the portable code of 9.0 for later GPUs.
      set(CMAKE_CUDA_ARCHITECTURES 75-real 80-real 90)
    endif()
    message(STATUS "CUDA operators: ON (architectures ${CMAKE_CUDA_ARCHITECTURES})")
    enable_language(CUDA)
    find_package(CUDAToolkit REQUIRED)
    file(GLOB QTOOLKIT_CUDA_SOURCES CONFIGURE_DEPENDS csrc/ops/cuda/*.cu)
    add_library(qtoolkit_ops_cuda SHARED ${QTOOLKIT_CUDA_SOURCES})
    # --fmad=false: the number rule rounds after every operation, on every path.
    target_compile_options(qtoolkit_ops_cuda PRIVATE
      $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false --expt-relaxed-constexpr -Xcompiler=-Wall>)
    target_include_directories(qtoolkit_ops_cuda SYSTEM PRIVATE ${CUDAToolkit_INCLUDE_DIRS})
    target_link_libraries(qtoolkit_ops_cuda PRIVATE qtoolkit_ops qtoolkit::torch
      "${TORCH_PACKAGE_DIR}/lib/libtorch_cuda.so" "${TORCH_PACKAGE_DIR}/lib/libc10_cuda.so")
    set_target_properties(qtoolkit_ops_cuda PROPERTIES
      CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_RUNTIME_LIBRARY Shared
      LIBRARY_OUTPUT_DIRECTORY "${QTOOLKIT_OUTPUT}"
      BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN")
  endif()
endmacro()
