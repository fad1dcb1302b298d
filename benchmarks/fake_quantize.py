"""Fake-quantize operators and observers beside PyTorch's, as multiples of a copy of the tensor.

python benchmarks/fake_quantize.py --threads 2
"""

from __future__ import annotations

import argparse
import warnings

import _bench
import torch
from torch import nn

import qtoolkit as qt

from _common import markdown_table, medians, time_interleaved  # (examples/)  isort: skip


def forward_backward(function, x: torch.Tensor, grad: torch.Tensor):
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(grad)

    return run


def call(observer: nn.Module, x: torch.Tensor):
    def run() -> torch.Tensor:
        with torch.no_grad():
            return observer(x)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=4, default=[32, 64, 112, 112])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)

    torch.manual_seed(0)
    x, grad = torch.randn(args.shape), torch.randn(args.shape)
    target = torch.empty_like(x)
    channels = args.shape[1]
    scale, zero_point = torch.tensor([0.05]), torch.tensor([128], dtype=torch.int32)
    scales = torch.rand(channels) * 0.1 + 0.01
    zero_points = torch.zeros(channels, dtype=torch.int32)

    functions = {
        "per tensor": (
            lambda v: qt.ops.fake_quantize_per_tensor(v, scale, zero_point, 0, 255),
            lambda v: torch.fake_quantize_per_tensor_affine(v, scale, zero_point, 0, 255),
        ),
        "per channel": (
            lambda v: qt.ops.fake_quantize_per_channel(v, scales, zero_points, 1, -128, 127),
            lambda v: torch.fake_quantize_per_channel_affine(
                v, scales, zero_points, 1, -128, 127
            ),
        ),
    }  # fmt: skip
    pairs = {}
    for name, (ours, theirs) in functions.items():
        pairs[f"fake_quantize {name}, forward"] = (
            lambda ours=ours: ours(x),
            lambda theirs=theirs: theirs(x),
        )
        pairs[f"fake_quantize {name}, forward + backward"] = (
            forward_backward(ours, x, grad),
            forward_backward(theirs, x, grad),
        )
    pairs |= observer_pairs(x)
    runs = {"copy into a tensor": lambda: target.copy_(x), "copy into a new tensor": x.clone}
    for name, (ours, theirs) in pairs.items():
        runs[name] = ours
        if theirs:
            runs[f"torch: {name}"] = theirs

    ms = medians(time_interleaved(runs, args.rounds, seconds=0.05))
    copy_ms = ms["copy into a tensor"]
    known = _bench.facts()
    print(f"{'x'.join(map(str, args.shape))} float32; {_bench.describe(known)}")
    print(
        f"copy into an existing tensor {copy_ms:.2f} ms, new {ms['copy into a new tensor']:.2f} ms"
    )
    rows = []
    for name in pairs:
        theirs_ms = ms.get(f"torch: {name}")
        rows.append(
            [
                name,
                f"{ms[name]:.2f}",
                f"{ms[name] / copy_ms:.1f}",
                f"{theirs_ms:.2f}" if theirs_ms else "-",
                f"{theirs_ms / ms[name]:.2f}" if theirs_ms else "-",
            ]
        )
    header = ["", "qtoolkit ms", "copies", "torch ms", "torch / qtoolkit"]
    print(markdown_table(header, rows))
    result = {**known, "shape": args.shape, "median_ms": ms}
    _bench.write_json(f"fake_quantize_threads{args.threads}", result)


def observer_pairs(x: torch.Tensor) -> dict:
    """Observers, and torch.ao's where this PyTorch has them."""
    activation = qt.TensorSpec("uint8", observer="minmax")
    weight = qt.TensorSpec("int8", "per_channel", axis=1, symmetric=True,
                           observer="per_channel_minmax")  # fmt: skip
    histogram = qt.TensorSpec("uint8", observer="histogram")
    ours = {
        "MinMaxObserver": qt.observers.make_observer(activation),
        "PerChannelMinMaxObserver": qt.observers.make_observer(weight),
        "HistogramObserver": qt.observers.make_observer(histogram),
    }
    try:
        from torch.ao.quantization import observer as ao
    except ImportError:
        theirs = {}
    else:
        theirs = {
            "MinMaxObserver": ao.MinMaxObserver(),
            "PerChannelMinMaxObserver": ao.PerChannelMinMaxObserver(ch_axis=1),
            "HistogramObserver": ao.HistogramObserver(),
        }
    return {
        name: (call(observer, x), call(theirs[name], x) if name in theirs else None)
        for name, observer in ours.items()
    }


if __name__ == "__main__":
    main()
