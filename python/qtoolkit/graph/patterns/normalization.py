"""Softmax and layer norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as torch_functional

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.shapes import bind, float_shape
from qtoolkit.nn import normalization
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig

_SOFTMAX = {torch.softmax, torch_functional.softmax, "softmax"}


def _softmax(x: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> None:
    """The parameters of the softmax functions; the third one of ``torch.softmax`` is a dtype."""


def _layer_norm(
    x: Any, normalized_shape: Any, weight: None = None, bias: None = None, eps: float = 1e-5
) -> None:
    """The parameters of ``F.layer_norm``; for one with a weight see ``idioms``."""


class _NormPattern(Pattern):
    """One layer without a weight."""

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        return Match(self, (node,), (node.args[0],), needs_codes=True)


@register_pattern
class SoftmaxPattern(_NormPattern):
    """``nn.Softmax``, ``F.softmax``, ``torch.softmax``."""

    types = (nn.Softmax,)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target not in _SOFTMAX or not node.args or float_shape(node.args[0]) is None:
            return None
        arguments = bind(_softmax, node)
        if arguments is None or not isinstance(arguments["dim"], int):
            return None
        # Codes know no dtype; the result is float32 where float32 is asked for.
        if not {arguments["_stacklevel"], arguments["dtype"]} <= {3, 5, None, torch.float32}:
            return None
        return AsModule(nn.Softmax(arguments["dim"]), node.args[:1])

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Softmax)
        return "it names no dimension" if module.dim is None else None

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        softmax = called_module(match.anchor, module)
        assert isinstance(softmax, nn.Softmax)
        assert softmax.dim is not None
        assert output is not None
        return normalization.Softmax(softmax.dim, input=inputs[0], output=output)


@register_pattern
class LayerNormPattern(_NormPattern):
    """``nn.LayerNorm``, ``F.layer_norm``."""

    types = (nn.LayerNorm,)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if node.target is not torch_functional.layer_norm or float_shape(node.args[0]) is None:
            return None
        arguments = bind(_layer_norm, node)
        if arguments is None or arguments["weight"] is not None or arguments["bias"] is not None:
            return None
        shape = arguments["normalized_shape"]
        if any(isinstance(size, fx.Node) for size in shape):
            return None
        norm = nn.LayerNorm(list(shape), arguments["eps"], elementwise_affine=False)
        return AsModule(norm, node.args[:1])

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        norm = called_module(match.anchor, module)
        assert isinstance(norm, nn.LayerNorm)
        assert output is not None
        return normalization.LayerNorm(
            norm.normalized_shape,
            norm.weight,
            norm.bias,
            norm.eps,
            input=inputs[0],
            output=output,
        )
