"""Fake-quantization on a GPU as a share of a device copy's bandwidth, forward and backward.

    python benchmarks/cuda_fake_quantize.py [--elements 67108864] [--types float32 bfloat16]

Bandwidth is the bytes that an operator has to move over its time: each input is read once and each
result written once in every pass that the operator cannot do without. 100 % is that of copying a
tensor of the same size and type. Times are medians of CUDA events; tensors do not fit the caches.
Results go to benchmarks/results/cuda_fake_quantize.json.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import _bench
import torch
from torch import Tensor

from qtoolkit import ops

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# name, the call, the bytes it has to move
Case = tuple[str, Callable[[], Any], int]


def median_ms(call: Callable[[], Any], rounds: int) -> float:
    """The median time of one call on the device, after a warm-up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def cases(elements: int, dtype: torch.dtype) -> Iterator[Case]:
    """Every operator on [N, 64, 32, 32] of about that many elements."""
    channels, side = 64, 32
    batch = max(1, elements // (channels * side * side))
    shape = (batch, channels, side, side)
    x = torch.randn(shape, dtype=dtype, device="cuda")
    grad = torch.randn(shape, dtype=dtype, device="cuda")
    size, mask_size = x.numel() * x.element_size(), (x.numel() + 7) // 8
    qtoolkit = torch.ops.qtoolkit

    def device(value: float | list[float], kind: torch.dtype = torch.float32) -> Tensor:
        return torch.tensor(value, dtype=kind, device="cuda")

    scale, zero_point = device(0.02), device(3, torch.int32)
    scales = torch.rand(channels, device="cuda") * 0.02 + 0.01
    zero_points = torch.zeros(channels, dtype=torch.int32, device="cuda")
    learned, shift = device([0.02]), device([1.4])
    last = torch.channels_last
    x_last, grad_last = x.to(memory_format=last), grad.to(memory_format=last)

    def forward(t: Tensor, s: Tensor, z: Tensor, axis: int | None, group: int | None, relu: bool):
        return lambda: qtoolkit.fake_quantize_mask(t, s, z, axis, group, 0, 255, relu)

    with_mask = 2 * size + mask_size
    yield "per tensor", forward(x, scale, zero_point, None, None, False), with_mask
    yield "relu", forward(x, scale, zero_point, None, None, True), with_mask
    yield "per channel", forward(x, scales, zero_points, 1, None, False), with_mask
    yield (
        "per channel, channels_last",
        forward(x_last, scales, zero_points, 1, None, False),
        with_mask,
    )
    groups = (*shape[:-1], side // 32)
    group_scales = torch.rand(groups, device="cuda") * 0.02 + 0.01
    group_zeros = torch.zeros(groups, dtype=torch.int32, device="cuda")
    yield (
        "per group of 32",
        forward(x, group_scales, group_zeros, None, 32, False),
        with_mask + group_scales.numel() * 8,
    )
    mask = torch.randint(256, (mask_size,), dtype=torch.uint8, device="cuda")
    yield (
        "all of these, backward",
        lambda: qtoolkit.fake_quantize_mask_backward(grad, mask, 0),
        with_mask,
    )
    known = [device(float("inf")), device(-float("inf")), scale.clone(), zero_point.clone()]
    yield (
        "observe",
        lambda: qtoolkit.observe_fake_quantize_mask(x, *known, 0.01, 0, 255, False),
        3 * size + mask_size,
    )
    yield "min_max", lambda: ops.min_max(x), size

    for layout, t, g in (("", x, grad), (", channels_last", x_last, grad_last)):
        for name, s, z, axis in (
            ("LSQ", learned, None, None),
            ("LSQ+ per channel", scales, zero_points.float(), 1),
        ):
            if axis is None and layout:
                continue
            yield (
                f"{name}{layout}",
                lambda t=t, s=s, z=z, axis=axis: ops.fake_quantize_lsq(t, s, z, axis, 0, 255, 1.0),
                2 * size,
            )
            yield (
                f"{name}{layout}, backward",
                lambda t=t, g=g, s=s, z=z, axis=axis: qtoolkit.fake_quantize_lsq_backward(
                    g, t, s, z, axis, 0, 255, 1.0
                ),
                3 * size,
            )
    yield "PACT", lambda: ops.fake_quantize_pact(x, shift, 15), 2 * size
    yield (
        "PACT, backward",
        lambda: qtoolkit.fake_quantize_pact_backward(grad, x, shift, 15),
        3 * size,
    )

    few = 2 * size
    yield "ternary", lambda: qtoolkit.fake_quantize_ternary(x, learned, shift, None), few
    yield (
        "binary",
        lambda: qtoolkit.fake_quantize_binary_mask(x, learned, None, 1.0),
        few + mask_size,
    )
    yield (
        "fp8_e4m3",
        lambda: qtoolkit.fake_quantize_float_mask(x, learned, None, 3, -6, 448.0),
        few + mask_size,
    )
    yield (
        "mxfp4",
        lambda: qtoolkit.fake_quantize_block_float(x, None, 32, 1, 0, 6.0, "e8m0"),
        few,
    )
    yield (
        "nvfp4",
        lambda: qtoolkit.fake_quantize_block_float(x, learned, 16, 1, 0, 6.0, "e4m3"),
        few,
    )

    weight, bias = torch.rand(channels, device="cuda"), torch.randn(channels, device="cuda")
    mean, var = torch.zeros(channels, device="cuda"), torch.ones(channels, device="cuda")
    for layout, t, g in (("", x, grad), (", channels_last", x_last, grad_last)):
        yield (
            f"batch norm, relu, observe{layout}",
            lambda t=t: qtoolkit.batch_norm_act(
                *(t, weight, bias, mean, var, None, True, 0.1, 1e-5, True, None, *known, 0.01),
                *(False, 0, 255),
            ),
            3 * size + mask_size,
        )
        yield (
            f"batch norm, relu, observe{layout}, backward",
            lambda t=t, g=g: qtoolkit.batch_norm_act_backward(
                g, t, weight, mean, var, mask, True, [True, True, True, False]
            ),
            5 * size + 2 * mask_size,
        )


def measure(elements: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """One row for each operator; the copy's first."""
    source = torch.randn(elements, dtype=dtype, device="cuda")
    target = torch.empty_like(source)
    copy_ms = median_ms(lambda: target.copy_(source), rounds)
    copy_rate = 2 * source.numel() * source.element_size() / copy_ms
    rows = [{"name": "copy", "ms": copy_ms, "gb_per_s": copy_rate / 1e6, "share": 1.0}]
    for name, call, size in cases(elements, dtype):
        ms = median_ms(call, rounds)
        rate = size / ms
        rows.append({"name": name, "ms": ms, "gb_per_s": rate / 1e6, "share": rate / copy_rate})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--elements", type=int, default=64 * 2**20)
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"], choices=list(TYPES))
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "No GPU: torch.cuda.is_available() is false. This benchmark measures the CUDA "
            "operators; benchmarks/fake_quantize.py measures those of the CPU."
        )
    from _common import markdown_table

    results = {}
    for name in args.types:
        results[name] = measure(args.elements, TYPES[name], args.rounds)
        print(f"\n{name}, {args.elements} elements, {torch.cuda.get_device_name()}")
        print(
            markdown_table(
                ["", "ms", "GB/s", "of a copy"],
                [
                    [
                        row["name"],
                        f"{row['ms']:.3f}",
                        f"{row['gb_per_s']:.0f}",
                        f"{row['share']:.0%}",
                    ]
                    for row in results[name]
                ],
            )
        )
    _bench.write_json(
        "cuda_fake_quantize",
        {
            **_bench.facts(),
            "gpu": torch.cuda.get_device_name(),
            "date": datetime.date.today().isoformat(),
            "elements": args.elements,
            "results": results,
        },
    )


if __name__ == "__main__":
    main()
