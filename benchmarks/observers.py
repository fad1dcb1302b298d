"""Observers beside torch.ao's, as multiples of a pass that reads the tensor.

python benchmarks/observers.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import _bench
import torch
from torch import Tensor, nn

import qtoolkit as qt

from _common import markdown_table, time_interleaved  # (examples/)  isort: skip

Runs = dict[str, Callable[[], Any]]
LAST = torch.channels_last


def calls(observer: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            observer(x)

    return run


def observer_runs(x: Tensor) -> Runs:
    """Observers that have seen a batch of that range, as they are for most of a calibration."""
    spec, make = qt.TensorSpec, qt.observers.make_observer

    def per_channel() -> nn.Module:
        return make(spec("int8", "per_channel", 1, None, True, "per_channel_minmax"))

    last, half = x.to(memory_format=LAST), x.bfloat16()
    runs: Runs = {
        # The fastest pass that PyTorch has: its maximum of floats takes longer.
        "a pass that reads": lambda: x.view(torch.int32).amax(),
        "minmax": calls(make(spec(observer="minmax")), x),
        "minmax, bfloat16": calls(make(spec(observer="minmax")), half),
        "minmax, a transposed slice": calls(
            make(spec(observer="minmax")), x.transpose(1, 2)[:, :, 1:]
        ),
        "moving_average": calls(make(spec(observer="moving_average")), x),
        "per_channel_minmax, axis 1": calls(per_channel(), x),
        "per_channel_minmax, axis 1, channels_last": calls(per_channel(), last),
        "per_group_minmax, groups of 32": calls(
            make(spec("int4", "per_group", 0, 32, True, "per_group_minmax")), x
        ),
    }
    for name in ("histogram", "percentile", "mse", "entropy"):
        runs[name] = calls(make(spec(observer=name)), x)
    runs["histogram, bfloat16"] = calls(make(spec(observer="histogram")), half)
    return runs


def torch_runs(x: Tensor) -> Runs:
    """torch.ao's, by the names of ours."""
    try:
        from torch.ao.quantization import observer as ao
    except ImportError:
        return {}
    return {
        "minmax": calls(ao.MinMaxObserver(), x),
        "moving_average": calls(ao.MovingAverageMinMaxObserver(), x),
        "per_channel_minmax, axis 1": calls(ao.PerChannelMinMaxObserver(ch_axis=1), x),
        "per_channel_minmax, axis 1, channels_last": calls(
            ao.PerChannelMinMaxObserver(ch_axis=1), x.to(memory_format=LAST)
        ),
        "histogram": calls(ao.HistogramObserver(), x),
    }


def measured(runs: Runs, rounds: int, seconds: float) -> dict[str, tuple[float, float]]:
    """Minimum and median in ms."""
    samples = time_interleaved(runs, rounds, seconds)
    return {name: (min(times), statistics.median(times)) for name, times in samples.items()}


def observer_table(ms: dict[str, tuple[float, float]]) -> str:
    read = ms["a pass that reads"]
    lines = []
    for name, (least, median) in ms.items():
        if name.startswith("torch.ao: "):
            continue
        theirs = ms.get(f"torch.ao: {name}")
        lines.append(
            [
                name,
                f"{least:.2f}",
                f"{median:.2f}",
                f"{least / read[0]:.2f}",
                f"{median / read[1]:.2f}",
                f"{theirs[0]:.2f}" if theirs else "-",
                f"{theirs[1]:.2f}" if theirs else "-",
            ]
        )
    header = ["", "least ms", "median ms", "passes (least)", "passes (median)"]
    return markdown_table([*header, "torch.ao least ms", "torch.ao median ms"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, default=[32, 64, 112, 112])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    x = torch.randn(args.shape)
    runs = observer_runs(x)
    runs |= {f"torch.ao: {name}": run for name, run in torch_runs(x).items()}
    observers = measured(runs, args.rounds, 0.02)

    known = _bench.facts()
    table = observer_table(observers)
    shape = "x".join(map(str, args.shape))
    print(f"{shape}; {_bench.describe(known)}\n{table}")
    result = {
        **known,
        "title": "Observers",
        "command": f"python benchmarks/observers.py --threads {args.threads}",
        "table": table,
        "notes": [
            f"{shape} float32 elements. `passes`: as multiples of a pass that reads the tensor. "
            "The observers have seen a batch with the same range, so none of them widens.",
        ],
        "facts": _bench.describe(known),
        "shape": args.shape,
        "least_and_median_ms": observers,
    }
    _bench.write_json(f"observers_threads{args.threads}", result)


if __name__ == "__main__":
    main()
