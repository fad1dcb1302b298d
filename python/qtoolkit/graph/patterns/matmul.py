"""Products of two activations."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import functional
from qtoolkit.nn.base import QParams
from qtoolkit.nn.matmul import Matmul
from qtoolkit.qconfig import QConfig

_FUNCTIONS = {torch.matmul, torch.bmm, operator.matmul}
_METHODS = {"matmul", "bmm", "__matmul__"}

# More products of 8-bit codes than this could overflow an int32 sum: 255 * 255 each.
_MOST_PRODUCTS = 2**31 // (255 * 255)


@register_pattern
class MatmulPattern(Pattern):
    """``a @ b``, ``torch.matmul``, ``torch.bmm`` of two activations, such as queries and keys.

    A product with a parameter is left in float: written as ``nn.Linear`` it has an int8 weight with
    a scale for each output channel.
    """

    types = (functional.Matmul,)
    float_output = True

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        shapes = [float_shape(operand) for operand in node.args]
        if any(shape is None or len(shape) < 2 for shape in shapes):
            return None
        if any(operand.op == "get_attr" for operand in node.all_input_nodes):
            return None
        if shapes[0][-1] not in range(1, _MOST_PRODUCTS + 1):  # type: ignore[index]
            return None
        return AsModule(functional.Matmul(), node.args)

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        a, b = node.args
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        return Match(self, (node,), (a, b))

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        return Matmul(inputs[0], inputs[1], output=output)
