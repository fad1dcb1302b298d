"""Average pooling: windows, adaptive, and the mean over height and width."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as torch_functional

from qtoolkit.graph.modules import called_module, pair
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import bind, float_shape
from qtoolkit.nn import functional, pooling
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig


def _mean(x: Any, dim: Any, keepdim: bool = False) -> None:
    """The parameters of ``mean`` that can be taken in."""


def _avg_pool2d(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> None:
    """The parameters of ``F.avg_pool2d``, whose own signature cannot be read."""


@register_pattern
class AvgPoolPattern(Pattern):
    """``nn.AvgPool2d``, ``nn.AdaptiveAvgPool2d``, ``x.mean((2, 3))`` and their functions."""

    types = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, functional.GlobalAvgPool2d)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        shape = float_shape(node.args[0]) if node.args else None
        if shape is None or len(shape) != 4:
            return None
        if node.target in (torch_functional.adaptive_avg_pool2d,):
            size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
            return AsModule(nn.AdaptiveAvgPool2d(size), node.args[:1])  # type: ignore[arg-type]
        if node.target is torch_functional.avg_pool2d:
            arguments = bind(_avg_pool2d, node)
            return None if arguments is None else AsModule(nn.AvgPool2d(**arguments), node.args[:1])
        if node.target in (torch.mean, "mean"):
            arguments = bind(_mean, node)
            dims = arguments and arguments["dim"]
            if isinstance(dims, list | tuple) and sorted(d % 4 for d in dims) == [2, 3]:
                return AsModule(
                    functional.GlobalAvgPool2d(bool(arguments and arguments["keepdim"])),
                    node.args[:1],
                )
        return None

    def unsupported(self, module: nn.Module) -> str | None:
        if isinstance(module, nn.AdaptiveAvgPool2d) and not _is_fixed(module.output_size):
            return "an output size of None has no integer kernel"
        return None

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        assert isinstance(node.args[0], fx.Node)
        return Match(self, (node,), (node.args[0],))

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        pool = called_module(match.anchor, module)
        assert output is not None
        if isinstance(pool, functional.GlobalAvgPool2d):
            return pooling.GlobalAvgPool2d(pool.keepdim, input=inputs[0], output=output)
        if isinstance(pool, nn.AdaptiveAvgPool2d):
            return pooling.AdaptiveAvgPool2d(pair(pool.output_size), input=inputs[0], output=output)
        assert isinstance(pool, nn.AvgPool2d)
        return pooling.AvgPool2d(
            pair(pool.kernel_size),
            pair(pool.stride),
            pair(pool.padding),
            pool.ceil_mode,
            pool.count_include_pad,
            pool.divisor_override,
            input=inputs[0],
            output=output,
        )


def _is_fixed(size: Any) -> bool:
    return isinstance(size, int) or (
        isinstance(size, list | tuple) and all(isinstance(s, int) for s in size)
    )
