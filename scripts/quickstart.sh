#!/usr/bin/env bash
# Sets everything up and runs the main job: ResNet-18 from FP32 to INT8, then the saved model in a C++ program.
# Arguments go to examples/resnet18.py:
#   ./scripts/quickstart.sh --data ~/images --pretrained
set -euo pipefail
# shellcheck source=scripts/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
set_up

output="$ROOT/results"
say "The main job (examples/resnet18.py)"
python examples/resnet18.py "$@" --output "$output"

say "The saved model in C++ (examples/cpp)"
cmake -S examples/cpp -B build/examples-cpp -G Ninja --log-level=WARNING \
  -DCMAKE_PREFIX_PATH="$(python -m qtoolkit --cmake-prefix)" -DPython_EXECUTABLE="$VIRTUAL_ENV/bin/python"
cmake --build build/examples-cpp
# shellcheck disable=SC2012
model=$(ls -t "$output"/*_int8.pt | head -n 1)
build/examples-cpp/classify "$model" --batch "${model%_int8.pt}_batch.pt"
say "Done: tables and models are in results/"
