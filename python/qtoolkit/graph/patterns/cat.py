"""Concatenation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import elementwise, functional
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_FUNCTIONS = {torch.cat, torch.concat, torch.concatenate}


@register_pattern
class CatPattern(Pattern):
    """``torch.cat``."""

    types = (functional.Cat,)
    shares_range = True

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.op != "call_function" or node.target not in _FUNCTIONS:
            return None
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        if not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            return None
        if any(float_shape(tensor) is None for tensor in tensors):
            return None
        return AsModule(functional.Cat(dim), (list(tensors),))

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        tensors: Any = node.args[0]
        return Match(self, (node,), tuple(tensors))

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        cat = called_module(match.anchor, module)
        assert isinstance(cat, functional.Cat)
        assert output is not None
        return elementwise.Cat(inputs, cat.dim, output=output)

    def arguments(self, match: Match, inputs: list[fx.Node]) -> tuple[Any, ...]:
        return (inputs,)
