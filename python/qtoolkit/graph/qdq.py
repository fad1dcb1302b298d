"""A converted model as the same network in float, with quantize and dequantize where it has codes.

That is the QDQ form that other runtimes read. Each value that was codes passes
``ops.qdq_quantize``, under the name of the layer that makes it, and ``ops.qdq_dequantize``.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.graph.modules import called_module, free_name, graph_modules
from qtoolkit.graph.patterns.weighted import set_submodule
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.same_values import asks_fact
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.moving import MovingModule
from qtoolkit.nn.plan import Plan
from qtoolkit.nn.pooling import MaxPool2d

_CUTS = {torch.chunk, torch.split, "chunk", "split"}
# They change no value and no place of a value.
_COPIES = {"contiguous", "clone", "detach"}


class FloatForm(nn.Module):
    """Calls ``float_forward`` of a quantized layer."""

    def __init__(self, layer: QuantizedModule) -> None:
        super().__init__()
        layer.prepare_float()
        self.layer = layer

    def forward(self, *inputs: Any) -> Tensor:
        return self.layer.float_forward(*inputs)


@dataclass(frozen=True)
class _Codes:
    """The quantization of a value, in buffers of the graph's module."""

    scale: str
    zero_point: str
    quant_min: int
    quant_max: int


def _dtype_max(quant_min: int) -> int:
    return 127 if quant_min < 0 else 255


class _Rewriter:
    def __init__(self, module: fx.GraphModule, prefix: str, branches: bool) -> None:
        self.module = module
        self.graph = module.graph
        self.prefix = prefix
        self.branches = branches
        #: How the values that were codes are quantized.
        self.codes: dict[fx.Node, _Codes] = {}
        #: The float value of a node of the graph.
        self.real: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self._rewrite(node)
        self.graph.lint()
        self.module.recompile()

    def _rewrite(self, node: fx.Node) -> None:
        sources = [arg for arg in node.all_input_nodes if arg in self.codes]
        for arg in node.all_input_nodes:
            node.replace_input_with(arg, self.real.get(arg, arg))
        called = called_module(node, self.module)
        if isinstance(called, QuantizedModule):
            self._rewrite_layer(node, called, sources)
        elif sources and not asks_fact(node):
            self._move(node, sources[0], node.name)

    def _rewrite_layer(self, node: fx.Node, layer: QuantizedModule, sources: list[fx.Node]) -> None:
        name = self.prefix + str(node.target)
        set_submodule(self.module, str(node.target), FloatForm(layer))
        if isinstance(layer, MovingModule | MaxPool2d):
            if sources:
                self._move(node, sources[0], str(node.target))
            return
        output = self._register(f"{node.name}_output", layer, "output")
        value = node
        if getattr(layer, "residual_scale", None) is not None:
            value = self._add_residual(node, layer, name)
        value = self._clip(value, layer, output)
        if output is not None:
            self.codes[node] = output
            value = self._quantize(value, output, name)
        self.real[node] = value

    def _register(self, name: str, layer: nn.Module, prefix: str) -> _Codes | None:
        """A layer's scale and zero point as buffers of this graph's module."""
        scale = getattr(layer, f"{prefix}_scale", None)
        if scale is None:
            return None
        names = (
            free_name(self.module, f"{name}_scale"),
            free_name(self.module, f"{name}_zero_point"),
        )
        self.module.register_buffer(names[0], scale.reshape(()))
        self.module.register_buffer(names[1], getattr(layer, f"{prefix}_zero_point").reshape(()))
        if prefix == "output":
            return _Codes(*names, layer.quant_min, layer.quant_max)  # type: ignore[arg-type]
        # What is no output keeps the whole range of its storage.
        low = -128 if int(layer.quant_min) < 0 else 0  # type: ignore[arg-type]
        return _Codes(*names, low, _dtype_max(low))

    def _after(self, node: fx.Node, function: Any, *args: Any) -> fx.Node:
        with self.graph.inserting_after(node):
            return self.graph.call_function(function, args)

    def _quantize(self, value: fx.Node, codes: _Codes, name: str) -> fx.Node:
        """Puts quantize and dequantize after a value; gives what dequantize does."""
        with self.graph.inserting_after(value):
            scale = self.graph.get_attr(codes.scale)
        with self.graph.inserting_after(scale):
            zero_point = self.graph.get_attr(codes.zero_point)
        limits = codes.quant_min, codes.quant_max
        quantized = self._after(
            zero_point, ops.qdq_quantize, value, scale, zero_point, *limits, name
        )
        return self._after(quantized, ops.qdq_dequantize, quantized, scale, zero_point)

    def _add_residual(self, node: fx.Node, layer: QuantizedModule, name: str) -> fx.Node:
        """The addition of a residual as an operator of its own, and a branch's codes before it."""
        x, residual = node.args
        node.args = (x,)
        branch = None
        if self.branches:
            branch = self._register(f"{node.name}_branch", layer, "branch")
        value = node if branch is None else self._quantize(node, branch, f"{name}.branch")
        return self._after(value, operator.add, value, residual)

    def _clip(self, value: fx.Node, layer: QuantizedModule, output: _Codes | None) -> fx.Node:
        """ReLU and an upper bound, where the range of the output's codes does not imply them."""
        clips_low, upper = layer.relu, getattr(layer, "upper", None)
        if output is not None:
            clips_low = clips_low and int(layer.output_zero_point) > layer.quant_min
            if layer.quant_max == _dtype_max(layer.quant_min):
                upper = None
        if upper is not None and layer.relu:
            return self._after(value, functional.hardtanh, value, 0.0, upper)
        if upper is not None:
            return self._after(value, torch.clamp, value, None, upper)
        return self._after(value, functional.relu, value) if clips_low else value

    def _move(self, node: fx.Node, source: fx.Node, name: str) -> None:
        """A node that only moves values: its output is quantized as its input."""
        self.codes[node] = self.codes[source]
        # A cut gives several tensors: its parts are quantized where they are taken from it.
        if node.target not in _CUTS | _COPIES:
            self.real[node] = self._quantize(node, self.codes[node], self.prefix + name)


def to_qdq(model: nn.Module, *, branches: bool = True) -> nn.Module:
    """A copy of a converted model in float, with quantize and dequantize in its graphs.

    Its inputs and outputs are those of the model, which is not changed. Values differ from the
    model's by what PyTorch's float operators round, which may move a code by one step.

    Args:
        model: the converted model.
        branches: quantize what a convolution adds a residual to, where the layer has a range for
            it. Without, the sum is quantized alone, which is more exact; for runtimes that compute
            the convolution and the addition at once.

    Raises:
        ValueError: the model is compiled, or simulates a format in float; or a quantized layer
            has no float form.
    """
    for name, module in model.named_modules():
        if isinstance(module, Plan):
            raise ValueError(
                f"{name or 'this model'} is a compiled plan, whose layers are one operator: export "
                "the result of qt.convert instead"
            )
        if is_observer(module):
            raise ValueError(
                f"{name} simulates a format that has no integer kernel (see qt.explain), which "
                "cannot be written as codes: prepare it with integer formats of up to 8 bits"
            )
    model = copy.deepcopy(model).eval().cpu()
    for name, module in list(graph_modules(model)):
        _Rewriter(module, f"{name}." if name else "", branches).run()
    if isinstance(model, QuantizedModule):
        return FloatForm(model)
    # Quantized layers outside of graphs read and write floats, see qt.quantize_dynamic.
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, QuantizedModule) and not isinstance(module, FloatForm):
                setattr(module, name, FloatForm(child))
    return model
