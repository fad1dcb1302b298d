# qtoolkit_find_torch([FOLDER]): the targets qtoolkit::torch, the headers and libraries of an installed
# PyTorch or LibTorch, and qtoolkit::openmp, the OpenMP runtime that it brings. Used by the build and,
# installed beside qtoolkitConfig.cmake, by programs.
#
# The PyTorch is that of TORCH_PACKAGE_DIR (which has include/ and lib/), else that in FOLDER, else that
# of Python_EXECUTABLE, which is looked for. Sets TORCH_PACKAGE_DIR, TORCH_PACKAGE_VERSION (like 2.15.0),
# TORCH_PACKAGE_CUDA (its version, or none), and TORCH_PACKAGE_ERROR, which is empty if all went well.
#
# find_package(Torch) is not used: with a CUDA build of PyTorch it stops where no CUDA toolkit is
# installed, though nothing here needs one.
function(qtoolkit_find_torch)
  set(folder "${TORCH_PACKAGE_DIR}")
  if(NOT folder AND ARGC GREATER 0 AND EXISTS "${ARGV0}/lib/libtorch_cpu.so")
    set(folder "${ARGV0}")
  endif()
  if(NOT folder)
    find_package(Python QUIET COMPONENTS Interpreter)
    if(NOT Python_EXECUTABLE)
      set(TORCH_PACKAGE_ERROR "no Python was found to ask where PyTorch is: set Python_EXECUTABLE, \
or TORCH_PACKAGE_DIR to the folder of PyTorch or LibTorch" PARENT_SCOPE)
      return()
    endif()
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
              "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE folder OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  set(header "${folder}/include/torch/headeronly/version.h")
  if(NOT EXISTS "${header}" OR NOT EXISTS "${folder}/lib/libtorch_cpu.so")
    if(folder)
      set(error "there is no PyTorch 2.11 or later in ${folder}")
    else()
      set(error "PyTorch is not installed for ${Python_EXECUTABLE}; run: pip install torch")
    endif()
    set(TORCH_PACKAGE_ERROR "${error}" PARENT_SCOPE)
    return()
  endif()

  file(STRINGS "${header}" lines REGEX "#define TORCH_VERSION_(MAJOR|MINOR|PATCH) ")
  string(REGEX REPLACE "[^0-9;]" "" numbers "${lines}")
  string(REPLACE ";" "." version "${numbers}")
  set(cuda none)
  if(EXISTS "${folder}/version.py")
    file(STRINGS "${folder}/version.py" lines REGEX "^cuda.*= *'[0-9.]+'")
    if(lines MATCHES "'([0-9.]+)'")
      set(cuda "${CMAKE_MATCH_1}")
    endif()
  endif()
  set(TORCH_PACKAGE_DIR "${folder}" PARENT_SCOPE)
  set(TORCH_PACKAGE_VERSION "${version}" PARENT_SCOPE)
  set(TORCH_PACKAGE_CUDA "${cuda}" PARENT_SCOPE)
  set(TORCH_PACKAGE_ERROR "" PARENT_SCOPE)
  if(TARGET qtoolkit::torch)
    return()
  endif()

  add_library(qtoolkit::torch INTERFACE IMPORTED)
  target_include_directories(qtoolkit::torch SYSTEM INTERFACE
    "${folder}/include" "${folder}/include/torch/csrc/api/include")
  target_compile_features(qtoolkit::torch INTERFACE cxx_std_20)
  target_link_libraries(qtoolkit::torch INTERFACE
    "${folder}/lib/libtorch.so" "${folder}/lib/libtorch_cpu.so" "${folder}/lib/libc10.so")

  # The runtime that PyTorch brings, so that a process has one only. at::parallel_for is a template
  # over OpenMP: compiled without -fopenmp it silently runs on one thread. The option is GCC's: what
  # Clang makes of it does not run on libgomp.
  file(GLOB gomp "${folder}/lib/libgomp*.so*" "${folder}/../torch.libs/libgomp*.so*")
  add_library(qtoolkit::openmp INTERFACE IMPORTED)
  target_compile_options(qtoolkit::openmp INTERFACE $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-fopenmp>)
  if(gomp)
    list(GET gomp 0 gomp)
    target_link_libraries(qtoolkit::openmp INTERFACE "${gomp}")
  else()  # this PyTorch uses the system's
    target_link_libraries(qtoolkit::openmp INTERFACE gomp)
  endif()
endfunction()
