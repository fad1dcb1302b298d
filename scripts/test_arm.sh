#!/usr/bin/env bash
# The C++ tests of kernels and engine for Arm (aarch64), cross-compiled and run by QEMU's emulator: on a CPU with the
# dot-product instructions, which must take the path neondot, and on one without, which must not. Arguments go to
# GoogleTest:
#   ./scripts/test_arm.sh --gtest_filter='Conv2d*'
# The build takes about three minutes on two cores, the tests as long. No timing under an emulator means anything.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH"
googletest=/usr/src/googletest

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}
command -v aarch64-linux-gnu-g++ >/dev/null || die "aarch64-linux-gnu-g++ not found. Install g++-aarch64-linux-gnu."
command -v qemu-aarch64 >/dev/null || die "qemu-aarch64 not found. Install qemu-user."
[[ -f $googletest/CMakeLists.txt ]] || die "GoogleTest's source not found in $googletest. Install libgtest-dev."

build=$PWD/build/aarch64
options=(-G Ninja --log-level=WARNING -Wno-deprecated "-DCMAKE_TOOLCHAIN_FILE=$PWD/cmake/aarch64-linux-gnu.cmake")
cmake -S "$googletest" -B "$build/googletest" "${options[@]}" -DCMAKE_BUILD_TYPE=Release -DBUILD_GMOCK=OFF \
  "-DCMAKE_INSTALL_PREFIX=$build/installed" -DCMAKE_INSTALL_LIBDIR=lib -DCMAKE_INSTALL_MESSAGE=NEVER
cmake --build "$build/googletest" --target install
cmake -S . -B "$build/kernels" "${options[@]}" -DQTOOLKIT_TORCH=OFF -DQTOOLKIT_TESTS=ON \
  "-DGTest_DIR=$build/installed/lib/cmake/GTest"
cmake --build "$build/kernels"

# Runs the tests on an emulated CPU and says how many passed on each path; each test that is named after a path forces
# it and fails if another one ran.
run() {
  local cpu=$1 log="$build/$1.log"
  shift
  qemu-aarch64 -cpu "$cpu" -L /usr/aarch64-linux-gnu "$build/kernels/qtoolkit_tests" "$@" >"$log" || {
    grep -vE '^\[ (RUN|      OK) ' "$log"
    die "tests failed on the emulated CPU $cpu"
  }
  printf '%s: %s tests passed' "$cpu" "$(passed "$log" '')"
  local path
  for path in reference portable neondot; do printf ', %s %s' "$(passed "$log" "/$path")" "$path"; done
  printf '\n'
}
passed() { grep -cE "^\[       OK \] .*$2" "$1" || true; }

run max "$@"
run cortex-a57 "$@"
if (($# == 0)); then
  (($(passed "$build/max.log" /neondot) > 0)) || die "no test of the path neondot ran on a CPU that has it"
  (($(passed "$build/cortex-a57.log" /neondot) == 0)) || die "the path neondot ran on a CPU without it"
fi
