"""Fake-quantize operators and observers beside PyTorch's, as multiples of a copy of the tensor.

python benchmarks/fake_quantize.py --threads 2
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import _bench
import torch
from torch import Tensor, nn

import qtoolkit as qt

from _common import markdown_table, medians, time_interleaved  # (examples/)  isort: skip

Function = Callable[[Tensor], Tensor]


class Row(NamedTuple):
    """One line of the table. `fresh` tensors like x are made by each call of ours."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    fresh: int
    dtype: torch.dtype = torch.float32


def forward_backward(function: Function, x: Tensor, grad: Tensor) -> Callable[[], None]:
    leaf = x.clone().requires_grad_()

    def run() -> None:
        leaf.grad = None
        function(leaf).backward(grad)

    return run


def call(observer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return observer(x)

    return run


def operator_rows(
    name: str, ours: Function, theirs: Function | None, x: Tensor, grad: Tensor
) -> dict[str, Row]:
    """Forward; forward and backward, which makes the result and the gradient."""
    return {
        f"{name}, forward": Row(
            lambda: ours(x), theirs and (lambda: theirs(x)), fresh=1, dtype=x.dtype
        ),
        f"{name}, forward + backward": Row(
            forward_backward(ours, x, grad),
            theirs and forward_backward(theirs, x, grad),
            fresh=2,
            dtype=x.dtype,
        ),
    }


def straight_through_rows(x: Tensor, grad: Tensor) -> dict[str, Row]:
    scale, zero_point = torch.tensor([0.05]), torch.tensor([128], dtype=torch.int32)
    channels, groups = x.size(1), 4
    scales = torch.rand(channels) * 0.1 + 0.01
    zeros = torch.zeros(channels, dtype=torch.int32)
    group_scales = torch.rand(*x.shape[:-1], groups) * 0.1 + 0.01
    group_zeros = torch.zeros_like(group_scales, dtype=torch.int32)
    group_size = -(-x.size(-1) // groups)

    def per_tensor(v: Tensor) -> Tensor:
        return qt.ops.fake_quantize_per_tensor(v, scale, zero_point, 0, 255)

    def torch_per_tensor(v: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(v, scale, zero_point, 0, 255)

    rows = operator_rows("per tensor", per_tensor, torch_per_tensor, x, grad)
    rows |= operator_rows(
        "per channel",
        lambda v: qt.ops.fake_quantize_per_channel(v, scales, zeros, 1, -128, 127),
        lambda v: torch.fake_quantize_per_channel_affine(v, scales, zeros, 1, -128, 127),
        x,
        grad,
    )
    rows |= operator_rows(
        f"per group of {group_size}",
        lambda v: qt.ops.fake_quantize_per_group(
            v, group_scales, group_zeros, group_size, -128, 127
        ),
        None,
        x,
        grad,
    )
    rows |= operator_rows(
        "relu and per tensor",
        lambda v: qt.ops.fake_quantize_relu(v, scale, zero_point, 0, 255),
        lambda v: torch_per_tensor(v.relu()),
        x,
        grad,
    )
    rows |= operator_rows("observe and per tensor", *observing(), x, grad)
    rows |= operator_rows(
        "per tensor, bfloat16", per_tensor, torch_per_tensor, x.bfloat16(), grad.bfloat16()
    )
    return rows


def observing() -> tuple[Function, Function | None]:
    """Moving-average observation and fake-quantization, and torch.ao's where there is one."""
    infinity = float("inf")
    state = (torch.tensor(infinity), torch.tensor(-infinity), torch.tensor(1.0))
    zero_point = torch.tensor(0, dtype=torch.int32)

    def ours(v: Tensor) -> Tensor:
        return qt.ops.observe_fake_quantize(v, *state, zero_point, 0.01, 0, 255, False)

    try:
        from torch.ao.quantization import FusedMovingAvgObsFakeQuantize
    except ImportError:
        return ours, None
    return ours, FusedMovingAvgObsFakeQuantize(quant_min=0, quant_max=255)


def learned_rows(x: Tensor, grad: Tensor) -> dict[str, Row]:
    """LSQ and PACT, where the operators are there."""
    rows = {}
    if hasattr(qt.ops, "fake_quantize_lsq"):
        scale = torch.tensor([0.05], requires_grad=True)
        zero_point = torch.tensor([0.0])
        rows |= operator_rows(
            "LSQ",
            lambda v: qt.ops.fake_quantize_lsq(v, scale, None, None, -128, 127, 1e-3),
            lambda v: torch._fake_quantize_learnable_per_tensor_affine(
                v, scale, zero_point, -128, 127, 1e-3
            ),
            x,
            grad,
        )
    if hasattr(qt.ops, "fake_quantize_pact"):
        alpha = torch.tensor([3.0], requires_grad=True)
        rows |= operator_rows(
            "PACT", lambda v: qt.ops.fake_quantize_pact(v, alpha, 255), None, x, grad
        )
    return rows


def observer_rows(x: Tensor) -> dict[str, Row]:
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
        name: Row(call(observer, x), call(theirs[name], x) if name in theirs else None, fresh=0)
        for name, observer in ours.items()
    }


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
    rows = {**straight_through_rows(x, grad), **learned_rows(x, grad), **observer_rows(x)}
    runs: dict[str, Callable[[], Any]] = {}
    for dtype in sorted({row.dtype for row in rows.values()}, key=str):
        source, target = x.to(dtype), torch.empty_like(x, dtype=dtype)
        runs[f"copy into a tensor, {dtype}"] = lambda s=source, t=target: t.copy_(s)
        runs[f"copy into a new tensor, {dtype}"] = source.clone
    for name, row in rows.items():
        runs[name] = row.ours
        if row.theirs:
            runs[f"torch: {name}"] = row.theirs

    ms = medians(time_interleaved(runs, args.rounds, seconds=0.05))
    known = _bench.facts()
    print(f"{'x'.join(map(str, args.shape))}; {_bench.describe(known)}")
    lines = []
    result_rows = {}
    for name, row in rows.items():
        copy_ms = ms[f"copy into a tensor, {row.dtype}"]
        # What PyTorch pays for the first touch of the memory of as many results.
        faults_ms = row.fresh * (ms[f"copy into a new tensor, {row.dtype}"] - copy_ms)
        theirs_ms = ms.get(f"torch: {name}")
        result_rows[name] = {
            "ms": ms[name],
            "copies": ms[name] / copy_ms,
            "page_faults_in_copies": faults_ms / copy_ms,
            "torch_ms": theirs_ms,
        }
        lines.append(
            [
                name,
                f"{ms[name]:.2f}",
                f"{ms[name] / copy_ms:.1f}",
                f"{faults_ms / copy_ms:.1f}",
                f"{theirs_ms:.2f}" if theirs_ms else "-",
                f"{theirs_ms / ms[name]:.2f}" if theirs_ms else "-",
            ]
        )
    header = ["", "qtoolkit ms", "copies", "page faults of torch", "torch ms", "torch / qtoolkit"]
    table = markdown_table(header, lines)
    print(table)
    shape = "x".join(map(str, args.shape))
    result = {
        **known,
        "title": "Fake-quantize operators and observers",
        "command": f"python benchmarks/fake_quantize.py --threads {args.threads}",
        "table": table,
        "notes": [
            f"{shape} elements. `copies`: as multiples of a copy into existing memory of the same "
            "type. `page faults of torch`: what a copy into as many new tensors as the run makes "
            "costs more, in copies; qtoolkit's results lie in huge pages, which have few."
        ],
        "facts": _bench.describe(known),
        "shape": args.shape,
        "rows": result_rows,
        "median_ms": ms,
    }
    _bench.write_json(f"fake_quantize_threads{args.threads}", result)


if __name__ == "__main__":
    main()
