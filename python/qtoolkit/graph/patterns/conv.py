"""Conv2d and Conv1d, with batch norm, residual addition and ReLU."""

from __future__ import annotations

from torch import fx, nn

from qtoolkit.graph.modules import pair
from qtoolkit.graph.patterns.branch import branch_qparams
from qtoolkit.graph.patterns.fusing import Chain
from qtoolkit.graph.patterns.registry import Match, Pattern, register_pattern
from qtoolkit.graph.patterns.weighted import (
    integer_weight_and_bias,
    set_submodule,
    too_many_products,
)
from qtoolkit.nn.base import QParams
from qtoolkit.nn.conv import Conv1d, make_conv2d
from qtoolkit.nn.qat import weighted
from qtoolkit.qconfig import QConfig


def symmetric_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """The padding on both sides; None where the two sides differ ("same" with an even kernel)."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        kernel, dilation = pair(conv.kernel_size), pair(conv.dilation)
        total = [dilation[i] * (kernel[i] - 1) for i in range(2)]
        return None if any(t % 2 for t in total) else (total[0] // 2, total[1] // 2)
    return pair(conv.padding)


@register_pattern
class ConvPattern(Pattern):
    """``nn.Conv2d``."""

    types: tuple[type[nn.Module], ...] = (nn.Conv2d,)
    dimensions = 4
    float_output = True
    has_weight = True

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv2d)
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} has no integer kernel"
        if symmetric_padding(module) is None:
            return "padding='same' that differs between the sides has no integer kernel"
        return too_many_products(module.weight)

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        if len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        chain = Chain([node], taken)
        chain.follow_batch_norm(module)
        chain.follow_add(module)
        chain.follow_relu(module)
        residual = () if chain.residual is None else (chain.residual,)
        return Match(
            self,
            tuple(chain.nodes),
            (node.args[0], *residual),
            chain.relu,
            chain.upper,
            chain.batch_norm,
            chain.branch,
        )

    def prepare_qat(self, match: Match, module: fx.GraphModule, qconfig: QConfig) -> None:
        name = str(match.anchor.target)
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        assert qconfig.weight is not None
        set_submodule(
            module, name, weighted.make_conv2d(conv, qconfig.weight, name, match.batch_norm)
        )

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        conv = module.get_submodule(str(match.anchor.target))
        assert isinstance(conv, nn.Conv2d)
        weight, bias = integer_weight_and_bias(conv, match, qconfig)
        padding = symmetric_padding(conv)
        assert padding is not None
        return make_conv2d(
            weight,
            bias,
            conv.groups,
            stride=pair(conv.stride),
            padding=padding,
            dilation=pair(conv.dilation),
            input=inputs[0],
            residual=inputs[1] if match.residual else None,
            branch=branch_qparams(match, module, qconfig, inputs, output),
            output=output,
            relu=match.relu,
            upper=match.upper,
        )


@register_pattern
class Conv1dPattern(ConvPattern):
    """``nn.Conv1d``."""

    types = (nn.Conv1d,)
    dimensions = 3

    def unsupported(self, module: nn.Module) -> str | None:
        assert isinstance(module, nn.Conv1d)
        if module.padding_mode != "zeros":
            return f"padding_mode={module.padding_mode!r} has no integer kernel"
        if _padding1d(module) is None:
            return "padding='same' that differs between the sides has no integer kernel"
        return too_many_products(module.weight)

    def prepare_qat(self, match: Match, module: fx.GraphModule, qconfig: QConfig) -> None:
        name = str(match.anchor.target)
        conv = module.get_submodule(name)
        assert isinstance(conv, nn.Conv1d)
        assert qconfig.weight is not None
        set_submodule(
            module, name, weighted.make_conv1d(conv, qconfig.weight, name, match.batch_norm)
        )

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        conv = module.get_submodule(str(match.anchor.target))
        assert isinstance(conv, nn.Conv1d)
        weight, bias = integer_weight_and_bias(conv, match, qconfig)
        padding = _padding1d(conv)
        assert padding is not None
        return Conv1d(
            weight,
            bias,
            stride=conv.stride[0],
            padding=padding,
            dilation=conv.dilation[0],
            groups=conv.groups,
            input=inputs[0],
            residual=inputs[1] if match.residual else None,
            branch=branch_qparams(match, module, qconfig, inputs, output),
            output=output,
            relu=match.relu,
            upper=match.upper,
        )


def _padding1d(conv: nn.Conv1d) -> int | None:
    """The padding on both sides; None where the two sides differ."""
    if isinstance(conv.padding, str):
        total = 0 if conv.padding == "valid" else conv.dilation[0] * (conv.kernel_size[0] - 1)
        return None if total % 2 else total // 2
    return conv.padding[0]
