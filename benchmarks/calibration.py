"""What calibrating a network costs, as multiples of FP32 inference of the same images.

python benchmarks/calibration.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import _bench
import torch
from torch import Tensor, nn

import qtoolkit as qt

from _common import make_model, markdown_table  # (examples/)  isort: skip

Runs = dict[str, Callable[[], Any]]


def calibration_runs(name: str, batches: list[Tensor]) -> Runs:
    """FP32 inference and calibration from the start, in both layouts."""
    model = make_model(name, 1000).eval()
    layouts = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    runs: Runs = {}
    for label, layout in layouts.items():
        inputs = [batch.to(memory_format=layout) for batch in batches]
        plain = make_model(name, 1000).eval()
        plain.load_state_dict(model.state_dict())
        plain.to(memory_format=layout)
        prepared = qt.prepare(model, example_inputs=(batches[0],)).to(memory_format=layout)

        def infer(plain: nn.Module = plain, inputs: list[Tensor] = inputs) -> None:
            with torch.no_grad():
                for batch in inputs:
                    plain(batch)

        def calibrate(prepared: nn.Module = prepared, inputs: list[Tensor] = inputs) -> None:
            for module in prepared.modules():
                if isinstance(module, qt.observers.Observer):
                    module.reset()
            qt.calibrate(prepared, inputs, progress=False)

        runs[f"FP32, {label}"] = infer
        runs[f"calibrate, {label}"] = calibrate
    return runs


def time_in_turns(runs: Runs, rounds: int) -> dict[str, tuple[float, float]]:
    """Minimum and median in ms; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (min(t[1:]), statistics.median(t[1:])) for name, t in times.items()}


def table_of(name: str, ms: dict[str, tuple[float, float]]) -> str:
    lines = []
    for label, (least, median) in ms.items():
        fp32 = ms[f"FP32, {label.split(', ')[1]}"]
        ratios = [f"{least / fp32[0]:.2f}", f"{median / fp32[1]:.2f}"]
        lines.append([label, f"{least:.0f}", f"{median:.0f}", *ratios])
    header = [name, "least ms", "median ms", "of FP32 (least)", "of FP32 (median)"]
    return markdown_table(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="images of a batch")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)

    batches = [
        _bench.structured_images(args.batch, args.size, seed) for seed in range(args.batches)
    ]
    ms = time_in_turns(calibration_runs(args.model, batches), args.rounds)
    known = _bench.facts()
    table = table_of(args.model, ms)
    print(f"{_bench.describe(known)}\n{table}")
    result = {
        **known,
        "title": f"Calibration of {args.model}",
        "command": f"python benchmarks/calibration.py --model {args.model} "
        f"--threads {args.threads}",
        "table": table,
        "notes": [
            f"{args.batches} batches of {args.batch} images of {args.size} x {args.size}, from the "
            "start, with the default QConfig (histograms); beside FP32 inference of the same "
            "images in the same layout."
        ],
        "facts": _bench.describe(known),
        "least_and_median_ms": ms,
    }
    _bench.write_json(f"calibration_{args.model}_threads{args.threads}", result)


if __name__ == "__main__":
    main()
