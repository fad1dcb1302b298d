"""Multiplication of two tensors, with ReLU."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import elementwise, functional
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_FUNCTIONS = {operator.mul, operator.imul, torch.mul, torch.multiply}
_METHODS = {"mul", "mul_", "multiply"}


@register_pattern
class MulPattern(Pattern):
    """``a * b``, ``a *= b``, ``torch.mul``, ``a.mul(b)``; shapes may be broadcast, as the gate of
    squeeze-and-excitation is."""

    types = (functional.Mul,)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        if any(float_shape(arg) is None for arg in node.args):
            return None
        return AsModule(functional.Mul(), node.args)

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        a, b = node.args
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        chain = Chain([node], taken)
        chain.follow_relu(module)
        return Match(self, tuple(chain.nodes), (a, b), chain.relu, chain.upper, needs_codes=True)

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        assert output is not None
        return elementwise.Mul(
            inputs[0], inputs[1], output=output, relu=match.relu, upper=match.upper
        )
