#!/usr/bin/env bash
# Formatting, lint and types: ruff, mypy (from `pip install -e .[dev]`) and clang-format (14 or later, if installed).
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
PATH="${VIRTUAL_ENV:-$PWD/.venv}/bin:$PATH"

for tool in ruff mypy; do
  command -v "$tool" >/dev/null || {
    echo "error: $tool not found; run: pip install --no-build-isolation -e '.[dev]'" >&2
    exit 1
  }
done
ruff check .
ruff format --check .
mypy
if command -v clang-format >/dev/null; then
  git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' | xargs clang-format --dry-run -Werror
else
  echo "clang-format not found: C++ formatting not checked"
fi
