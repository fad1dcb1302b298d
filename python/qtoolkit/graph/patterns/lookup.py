"""Functions of one value: activations, and arithmetic with a number; several in a row become one
table."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as torch_functional

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.notes import qconfig_of
from qtoolkit.graph.patterns.fusing import only_user
from qtoolkit.graph.patterns.registry import AsModule, Match, Pattern, register_pattern
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.shapes import bind, float_shape
from qtoolkit.nn import functional
from qtoolkit.nn.base import QParams
from qtoolkit.nn.lookup import Lookup, describe_function, tabulate
from qtoolkit.qconfig import QConfig

# A function or method, and the module whose parameters follow its first argument.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    torch.sigmoid: nn.Sigmoid,
    torch_functional.sigmoid: nn.Sigmoid,
    "sigmoid": nn.Sigmoid,
    torch.tanh: nn.Tanh,
    torch_functional.tanh: nn.Tanh,
    "tanh": nn.Tanh,
    torch_functional.silu: nn.SiLU,
    torch_functional.mish: nn.Mish,
    torch_functional.gelu: nn.GELU,
    torch_functional.hardswish: nn.Hardswish,
    torch_functional.hardsigmoid: nn.Hardsigmoid,
    torch_functional.leaky_relu: nn.LeakyReLU,
    torch_functional.elu: nn.ELU,
    torch_functional.celu: nn.CELU,
    torch.celu: nn.CELU,
    torch_functional.selu: nn.SELU,
    torch.selu: nn.SELU,
    torch_functional.softplus: nn.Softplus,
    torch_functional.softsign: nn.Softsign,
    torch_functional.softshrink: nn.Softshrink,
    torch_functional.hardshrink: nn.Hardshrink,
    torch_functional.logsigmoid: nn.LogSigmoid,
    torch_functional.tanhshrink: nn.Tanhshrink,
    torch_functional.threshold: nn.Threshold,
    torch_functional.hardtanh: nn.Hardtanh,
    torch.abs: functional.Abs,
    "abs": functional.Abs,
}
_ACTIVATIONS = tuple(set(_FUNCTIONS.values()) - {nn.Hardtanh})  # ReLU's pattern has that

_WITH_NUMBER = {
    operator.add: "add",
    torch.add: "add",
    "add": "add",
    operator.sub: "sub",
    torch.sub: "sub",
    "sub": "sub",
    operator.mul: "mul",
    torch.mul: "mul",
    "mul": "mul",
    operator.truediv: "div",
    torch.div: "div",
    "div": "div",
}
_NEGATIONS = {operator.neg, torch.neg, "neg"}
_CLAMPS = {torch.clamp, torch.clip, "clamp", "clip"}


# Its inverse and its products must be finite, as those of an observer's scale.
_SMALLEST_SCALE = 2.0**-100
# Where a function stays within this share of its output's step, its input need not be told apart.
_FLAT = 0.25
_POINTS = 4096


def _flat_length(values: Tensor, tolerance: float) -> int:
    """The last place whose value differs from none before it by more than the tolerance."""
    spread = torch.maximum(values.cummax(0).values - values, values - values.cummin(0).values)
    return int((spread <= tolerance).nonzero().max())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _activation(node: fx.Node) -> nn.Module | None:
    kind = _FUNCTIONS[node.target]
    arguments = bind(kind.__init__, node)
    # Modules without parameters take any and refuse them.
    if arguments is None or arguments.pop("args", ()) or arguments.pop("kwargs", {}):
        return None
    if "inplace" in arguments:
        arguments["inplace"] = False  # it changes no value, and the input may be used elsewhere
    return kind(**arguments)


def _clamp(x: Any, min: Any = None, max: Any = None) -> None:
    """The parameters of the clamp functions."""


def _clamp_as_module(node: fx.Node) -> nn.Module | None:
    arguments = bind(_clamp, node)
    if arguments is None:
        return None
    low, high = arguments["min"], arguments["max"]
    if low == 0 and high is None:
        return nn.ReLU()
    if _is_number(low) and _is_number(high) and low < high:
        return nn.Hardtanh(low, high)
    return None


def _with_number(node: fx.Node) -> AsModule | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    operation = _WITH_NUMBER[node.target]
    for place in (0, 1):
        x, number = node.args[place], node.args[1 - place]
        if float_shape(x) is None or not _is_number(number):
            continue
        if place == 1 and operation == "div":
            return None  # it has a pole
        layer = functional.WithNumber(operation, number, reverse=place == 1)  # type: ignore[arg-type]
        return AsModule(layer, (x,))
    return None


def _is_function(node: fx.Node, module: fx.GraphModule) -> bool:
    """True for a layer of one value, also a ReLU, that is to be quantized."""
    called = called_module(node, module)
    types = (*LookupPattern.types, nn.ReLU, nn.Hardtanh)
    return is_plain(called, types) and qconfig_of(called) is not None


def _name_of(function: nn.Module | None) -> str:
    if isinstance(function, functional.WithNumber):
        return f"{function.op_name} {function.number:g}"
    return str(getattr(function, "op_name", type(function).__name__))


def _function_of(match: Match, module: fx.GraphModule) -> Callable[[Tensor], Tensor]:
    """All nodes of a match, one after the other."""
    functions = [called_module(node, module) for node in match.nodes]

    def all_of_them(x: Tensor) -> Tensor:
        for function in functions:
            assert function is not None
            x = function(x)
        return x

    return all_of_them


def tabulated(match: Match, module: fx.GraphModule, input: QParams, output: QParams) -> Lookup:
    """The table of all nodes of a match, one after the other."""
    layers = [called_module(node, module) for node in match.nodes]
    names = ", ".join(_name_of(layer) for layer in layers)
    table = tabulate(_function_of(match, module), input=input, output=output)
    functions = [describe_function(layer) for layer in layers if layer is not None]
    return Lookup(names, table, input=input, output=output, functions=functions)


@register_pattern
class LookupPattern(Pattern):
    """``nn.SiLU``, ``torch.sigmoid``, ``F.gelu``, ``x + 3``, ``x.clamp(-1, 1)``, …"""

    types = (*_ACTIVATIONS, functional.WithNumber)

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        if not node.args:
            return None
        if node.target in _WITH_NUMBER:
            return _with_number(node)
        if float_shape(node.args[0]) is None:
            return None
        layer: nn.Module | None = None
        if node.target in _NEGATIONS:
            layer = functional.WithNumber("mul", -1)
        elif node.target in _CLAMPS:
            layer = _clamp_as_module(node)
        elif node.target in _FUNCTIONS:
            layer = _activation(node)
        return None if layer is None else AsModule(layer, node.args[:1])

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        assert isinstance(node.args[0], fx.Node)
        nodes = [node]
        user = only_user(node)
        while user is not None and user not in taken and _is_function(user, module):
            nodes.append(user)
            user = only_user(user)
        return Match(self, tuple(nodes), (node.args[0],), needs_codes=True)

    def input_range(
        self, match: Match, module: fx.GraphModule, low: float, high: float, output: QParams
    ) -> tuple[float, float]:
        x = torch.linspace(low, high, _POINTS)
        with torch.no_grad():
            y = _function_of(match, module)(x)
        if not bool(torch.isfinite(y).all()):
            return low, high
        tolerance = _FLAT * float(output.scale)
        left, right = _flat_length(y, tolerance), _flat_length(y.flip(0), tolerance)
        return float(x[left]), float(x[-1 - right])

    def output_qparams(
        self, match: Match, module: fx.GraphModule, inputs: list[QParams], observed: QParams
    ) -> QParams:
        """A product with a positive number keeps the codes and changes the scale alone."""
        x = inputs[0]
        scale = x.scale.clone()
        for node in match.nodes:
            called = called_module(node, module)
            if not isinstance(called, functional.WithNumber) or called.op_name not in (
                "mul",
                "div",
            ):
                return observed
            scale = called(scale)
        same_format = (x.quant_min, x.quant_max) == (observed.quant_min, observed.quant_max)
        if not same_format or not _SMALLEST_SCALE <= float(scale) < math.inf:
            return observed
        return replace(x, scale=scale)

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        assert output is not None
        return tabulated(match, module, inputs[0], output)
