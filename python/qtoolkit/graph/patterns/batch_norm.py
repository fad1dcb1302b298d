"""Batch norm that no layer before it can take in, with ReLU."""

from __future__ import annotations

from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import Match, Pattern, register_pattern
from qtoolkit.nn import elementwise
from qtoolkit.nn.base import QParams
from qtoolkit.nn.qat.weighted import batch_norm_factor, folded_bias
from qtoolkit.qconfig import QConfig


@register_pattern
class BatchNormPattern(Pattern):
    """``nn.BatchNorm2d``."""

    types = (nn.BatchNorm2d,)
    dimensions = 4

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.BatchNorm2d)
        return None if module.track_running_stats else "it has no running statistics"

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        chain = Chain([node], taken)
        chain.follow_relu(module)
        return Match(self, tuple(chain.nodes), (node.args[0],), chain.relu, chain.upper)

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        batch_norm = called_module(match.anchor, module)
        assert output is not None
        return elementwise.BatchNorm2d(
            batch_norm_factor(batch_norm),
            folded_bias(None, batch_norm),
            input=inputs[0],
            output=output,
            relu=match.relu,
            upper=match.upper,
        )
