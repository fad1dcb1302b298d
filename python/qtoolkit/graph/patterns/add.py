"""Addition of two tensors, with ReLU."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import elementwise, functional
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_FUNCTIONS = {operator.add, operator.iadd, torch.add}
_METHODS = {"add", "add_"}


@register_pattern
class AddPattern(Pattern):
    """``a + b``, ``a += b``, ``torch.add``, ``a.add_(b)``; shapes may be broadcast."""

    types = (functional.Add,)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target not in (_FUNCTIONS if node.op == "call_function" else _METHODS):
            return None
        if len(node.args) != 2 or node.kwargs:
            return None
        a, b = node.args
        shapes = float_shape(a), float_shape(b)
        if None in shapes:
            return None
        return AsModule(functional.Add(broadcast=shapes[0] != shapes[1]), (a, b))

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        a, b = node.args
        assert isinstance(a, fx.Node)
        assert isinstance(b, fx.Node)
        chain = Chain([node], taken)
        chain.follow_relu(module)
        add = called_module(node, module)
        assert isinstance(add, functional.Add)
        return Match(
            self,
            tuple(chain.nodes),
            (a, b),
            chain.relu,
            chain.upper,
            needs_codes=add.broadcast,
        )

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        assert output is not None
        return elementwise.Add(
            inputs[0], inputs[1], output=output, relu=match.relu, upper=match.upper
        )
