#!/usr/bin/env bash
# The engine's tests under sanitizers, without PyTorch: many threads on one plan under ThreadSanitizer, damaged plans
# under AddressSanitizer. Each stress test takes $1 seconds (60).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH"
export QTOOLKIT_STRESS_SECONDS="${1:-60}"

for sanitizer in thread address; do
  build="build/sanitize-$sanitizer"
  # -Wno-error: the optimizer sees more to warn of in instrumented code.
  cmake -S . -B "$build" -G Ninja --log-level=WARNING -DQTOOLKIT_TORCH=OFF -DQTOOLKIT_TESTS=ON \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo "-DCMAKE_CXX_FLAGS=-fsanitize=$sanitizer -fno-sanitize-recover=all -Wno-error"
  cmake --build "$build"
  "$build/qtoolkit_tests" --gtest_filter='Plan*'
done
