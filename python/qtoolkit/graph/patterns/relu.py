"""ReLU and ReLU6 that no layer before them can take in, and Hardtanh."""

from __future__ import annotations

import torch
from torch import fx, nn
from torch.nn import functional as torch_functional

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.fusing import relu_bound
from qtoolkit.graph.patterns.lookup import tabulated
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import elementwise
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_RELU = {torch.relu, torch.relu_, torch_functional.relu, torch_functional.relu_, "relu", "relu_"}
_RELU6 = {torch_functional.relu6}


@register_pattern
class ReLUPattern(Pattern):
    """``nn.ReLU``, ``nn.ReLU6``, ``nn.Hardtanh`` and their functions."""

    types = (nn.ReLU, nn.Hardtanh)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target not in _RELU | _RELU6 or not node.args or float_shape(node.args[0]) is None:
            return None
        # The inplace flag is left out: it changes no value, and the input may be used elsewhere.
        return AsModule(nn.ReLU6() if node.target in _RELU6 else nn.ReLU(), node.args[:1])

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        assert isinstance(node.args[0], fx.Node)
        return Match(self, (node,), (node.args[0],), *relu_bound(called_module(node, module)))

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        assert output is not None
        if not match.relu:
            return tabulated(match, module, inputs[0], output)
        return elementwise.ReLU(inputs[0], output=output, upper=match.upper)
