"""ConvTranspose2d, with batch norm and ReLU."""

from __future__ import annotations

from torch import fx, nn

from qtoolkit.graph.modules import pair
from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import Match, Pattern, register_pattern
from qtoolkit.graph.patterns.weighted import (
    float_weight,
    integer_weight_and_bias,
    set_submodule,
    too_many_products,
)
from qtoolkit.nn.base import QParams
from qtoolkit.nn.conv import ConvTranspose2d
from qtoolkit.nn.qat import weighted
from qtoolkit.qconfig import QConfig


@register_pattern
class ConvTransposePattern(Pattern):
    """``nn.ConvTranspose2d`` called without an output size."""

    types = (nn.ConvTranspose2d,)
    dimensions = 4
    float_output = True
    has_weight = True

    def unsupported(self, module: nn.Module) -> str | None:
        return too_many_products(float_weight(module))

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
            return None
        chain = Chain([node], taken)
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
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.ConvTranspose2d)
        assert qconfig.weight is not None
        made = weighted.make_conv_transpose2d(conv, qconfig.weight, name, match.batch_norm)
        set_submodule(module, name, made)

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        conv = module.get_submodule(str(match.anchor.target))
        assert isinstance(conv, nn.ConvTranspose2d)
        weight, bias = integer_weight_and_bias(conv, match, qconfig)
        return ConvTranspose2d(
            weight,
            bias,
            stride=pair(conv.stride),
            padding=pair(conv.padding),
            output_padding=pair(conv.output_padding),
            dilation=pair(conv.dilation),
            groups=conv.groups,
            input=inputs[0],
            output=output,
            relu=match.relu,
            upper=match.upper,
        )
