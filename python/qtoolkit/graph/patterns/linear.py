"""Linear, with ReLU."""

from __future__ import annotations

from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import Match, Pattern, register_pattern
from qtoolkit.graph.patterns.weighted import (
    integer_weight_and_bias,
    set_submodule,
    too_many_products,
)
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn.base import QParams
from qtoolkit.nn.linear import Linear
from qtoolkit.nn.qat import weighted
from qtoolkit.qconfig import QConfig


def _takes_batch_norm(node: fx.Node, module: fx.GraphModule) -> bool:
    """A batch norm is per output feature only over [N, C]; over [N, L, C] it is over L.

    A layer that is prepared for training knows; before, the shape tells.
    """
    linear = called_module(node, module)
    if isinstance(linear, weighted.Linear):
        return linear.folds_batch_norm
    shape = float_shape(node)
    return shape is not None and len(shape) == 2


@register_pattern
class LinearPattern(Pattern):
    """``nn.Linear``."""

    types = (nn.Linear,)
    float_output = True
    has_weight = True

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Linear)
        return too_many_products(module.weight)

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        chain = Chain([node], taken)
        if _takes_batch_norm(node, module):
            chain.follow_batch_norm(module)
        chain.follow_relu(module)
        return Match(
            self,
            tuple(chain.nodes),
            (node.args[0],),
            chain.relu,
            chain.upper,
            chain.batch_norm,
        )

    def prepare_qat(self, match: Match, module: fx.GraphModule, qconfig: QConfig) -> None:
        name = str(match.anchor.target)
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        assert qconfig.weight is not None
        set_submodule(
            module, name, weighted.make_linear(linear, qconfig.weight, name, match.batch_norm)
        )

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        linear = module.get_submodule(str(match.anchor.target))
        assert isinstance(linear, nn.Linear)
        weight, bias = integer_weight_and_bias(linear, match, qconfig)
        return Linear(
            weight, bias, input=inputs[0], output=output, relu=match.relu, upper=match.upper
        )
