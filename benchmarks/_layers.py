"""Where the time of a converted or compiled network goes, layer by layer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Layer:
    """One layer or step: multiply-adds, and the least milliseconds of several runs."""

    name: str
    kind: str
    macs: int
    ms: float


def of_plan(report: Any) -> list[Layer]:
    """The steps of a model that `qt.compile(..., profile=True)` made, from its `plan`."""
    return [
        Layer(step.name, step.kernel, step.multiplications, step.ms or 0.0) for step in report.steps
    ]


def of_modules(model: nn.Module, images: Tensor, runs: int = 20) -> list[Layer]:
    """The modules without children that one call runs, in their order, timed from outside."""
    layers: dict[str, Layer] = {}
    started = 0.0

    def start(module: nn.Module, inputs: Any) -> None:
        nonlocal started
        started = time.perf_counter()

    def stop(name: str, module: nn.Module, output: Any) -> None:
        ms = (time.perf_counter() - started) * 1e3
        weight = getattr(module, "weight", None)
        counts = isinstance(weight, Tensor) and weight.dim() > 1 and isinstance(output, Tensor)
        macs = output.numel() * weight[0].numel() if counts else 0
        found = layers.setdefault(name, Layer(name, type(module).__name__, macs, ms))
        found.ms = min(found.ms, ms)

    hooks = []
    for name, module in model.named_modules():
        if next(module.children(), None) is None:
            hooks.append(module.register_forward_pre_hook(start))
            hooks.append(
                module.register_forward_hook(lambda m, _, out, name=name: stop(name, m, out))
            )
    try:
        with torch.inference_mode():
            for _ in range(runs):
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return list(layers.values())
