"""Bilinear upsampling; the nearest one only moves values."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.resizing import as_upsample
from qtoolkit.nn import functional, upsample
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig


@register_pattern
class UpsamplePattern(Pattern):
    """``F.interpolate`` and ``nn.Upsample`` in mode ``"bilinear"``."""

    types = (functional.UpsampleBilinear2d,)
    dimensions = 4
    # Values lie between those of the input.
    shares_range = True

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        return as_upsample(node, functional.UpsampleBilinear2d)

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
        called = called_module(match.anchor, module)
        assert isinstance(called, functional.UpsampleBilinear2d)
        assert output is not None
        return upsample.UpsampleBilinear2d(
            called.scale_factors,
            called.align_corners,
            called.recompute,
            input=inputs[0],
            output=output,
        )

    def arguments(self, match: Match, inputs: list[fx.Node]) -> tuple[Any, ...]:
        return (*inputs, *match.anchor.args[1:])
