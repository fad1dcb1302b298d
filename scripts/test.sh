#!/usr/bin/env bash
# Sets everything up and runs every test: ctest (C++), then pytest (Python). Arguments go to pytest:
#   ./scripts/test.sh -k observers
set -euo pipefail
export QTOOLKIT_TESTS=ON
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
set_up

failed=()
say "C++ tests (ctest)"
# Only failures and the summary: a line for each of hundreds of tests hides them.
ctest --test-dir "$ROOT/$(build_folder)" --no-tests=error --output-on-failure --parallel "$(nproc)" |
  { grep -vE '^ +Start +[0-9]+:| Passed +[0-9.]+ sec$' || true; } ||
  failed+=(ctest)
say "Python tests (pytest)"
python -m pytest "$@" || failed+=(pytest)

if ((${#failed[@]})); then die "failed: ${failed[*]}"; fi
say "All tests passed"
