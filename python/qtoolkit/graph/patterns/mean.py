"""Mean and sum over dimensions, but for the mean over height and width (see avg_pool)."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import bind, float_shape
from qtoolkit.nn import functional, pooling
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_KINDS = {
    torch.mean: functional.Mean,
    "mean": functional.Mean,
    torch.sum: functional.Sum,
    "sum": functional.Sum,
}
# Sums of more codes could overflow int32.
_MOST_CODES = (2**31 - 1) // 255


def _reduce(x: Any, dim: Any, keepdim: bool = False) -> None:
    """The parameters of ``mean`` and ``sum`` that can be taken in."""


@register_pattern
class MeanPattern(Pattern):
    """``x.mean(dim)``, ``x.sum(dim)`` and their functions."""

    types = (functional.Mean, functional.Sum)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        kind = _KINDS.get(node.target)
        shape = float_shape(node.args[0]) if node.args else None
        arguments = None if kind is None or shape is None else bind(_reduce, node)
        if kind is None or shape is None or arguments is None:
            return None
        dims = arguments["dim"]
        dims = [dims] if isinstance(dims, int) else list(dims or [])
        codes = 1
        for dim in dims:
            codes *= shape[dim]
        if not dims or codes > _MOST_CODES:
            return None
        return AsModule(kind(dims, bool(arguments["keepdim"])), node.args[:1])

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        assert isinstance(node.args[0], fx.Node)
        return Match(self, (node,), (node.args[0],), needs_codes=True)

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        mean = called_module(match.anchor, module)
        assert isinstance(mean, functional.Mean)
        assert output is not None
        kind = pooling.Sum if isinstance(mean, functional.Sum) else pooling.Mean
        return kind(mean.dims, mean.keepdim, input=inputs[0], output=output)
