"""A prepared model as the float network that it is, with marks where values will be quantized."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from qtoolkit import ops
from qtoolkit.distributed import remove_synchronizer
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.formats import get_format
from qtoolkit.graph.fuse_qat import unfuse_qat
from qtoolkit.graph.lower import observer_qparams
from qtoolkit.graph.modules import called_module, graph_modules
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.patterns import Match
from qtoolkit.graph.patterns.weighted import integer_weight_and_bias, set_submodule
from qtoolkit.graph.prepare import find_matches, is_observer
from qtoolkit.nn.base import QParams
from qtoolkit.nn.qat.weighted import WEIGHTED, batch_norm_factor, folded_bias
from qtoolkit.nn.weights import swap_channels
from qtoolkit.observers import Observer


class _Mark(nn.Module):
    """Quantizes and dequantizes an activation under a name."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, name: str) -> None:
        super().__init__()
        self.register_buffer("scale", qparams.scale.detach().float().reshape(()).clone())
        self.register_buffer("zero_point", qparams.zero_point.detach().int().reshape(()).clone())
        self.limits = qparams.quant_min, qparams.quant_max
        self.name = name

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``residual`` is what an observer is shown too, see ``Observer.forward``."""
        codes = ops.qdq_quantize(x, self.scale, self.zero_point, *self.limits, self.name)
        return ops.qdq_dequantize(codes, self.scale, self.zero_point)


class _MarkedWeight(nn.Module):
    """A float layer whose weight passes ``qdq_dequantize`` with the scale that it will have, as
    the float tensor that it is."""

    def __init__(self, layer: nn.Module, scale: Tensor, axis: int | None) -> None:
        super().__init__()
        self.layer = layer
        self.register_buffer("scale", scale)
        self.axis = axis

    def forward(self, *inputs: Tensor) -> Tensor:
        weight = ops.qdq_dequantize(self.layer.weight, self.scale, None, self.axis)  # type: ignore[arg-type]
        return functional_call(self.layer, {"weight": weight}, inputs)


@dataclass
class Marked:
    """A prepared model with marks.

    Attributes:
        model: to be traced; the marks are the operators of ``ops.qdq_quantize`` and
            ``ops.qdq_dequantize``, of which the latter stands alone at weights, which are float.
        weight_bits: bits of the weight of each layer that has one, by its dotted name.
        unmarked: layers whose weight cannot be marked, with the reason.
    """

    model: nn.Module
    weight_bits: dict[str, int] = field(default_factory=dict)
    unmarked: dict[str, str] = field(default_factory=dict)


def _plain(layer: nn.Module) -> nn.Module:
    """A QAT layer as the layer of ``torch.nn`` that it extends; changes it."""
    if isinstance(layer, WEIGHTED):
        del layer.weight_fake_quant
        layer.__class__ = next(c for c in type(layer).__mro__ if c.__module__.startswith("torch."))
    return layer


class _Marker:
    def __init__(self, module: fx.GraphModule, prefix: str, marked: Marked) -> None:
        self.module, self.prefix, self.marked = module, prefix, marked
        self.names: dict[fx.Node, str] = {}

    def run(self) -> None:
        unfuse_qat(self.module)
        for match in find_matches(self.module):
            name = self.prefix + str(match.anchor.target)
            self.names[match.output] = name
            branch: Any = match.branch
            if branch is not None and is_observer(called_module(branch, self.module)):
                branch = branch.args[0]
            if isinstance(branch, fx.Node):
                self.names[branch] = f"{name}.branch"
            if match.pattern.has_weight:
                self._mark_weight(match, name)
        for node in list(self.module.graph.nodes):
            observer = called_module(node, self.module)
            if is_observer(observer):
                assert observer is not None
                self._mark_activation(node, observer)
        self.module.graph.lint()
        self.module.recompile()

    def _mark_activation(self, node: fx.Node, observer: nn.Module) -> None:
        value = node.args[0]
        assert isinstance(value, fx.Node)
        spec: Any = observer.spec
        # An input keeps its own name in files.
        own = f"{value.name}_quantize" if value.op == "placeholder" else value.name
        name = self.names.get(value, self.prefix + own)
        _check_integer(spec.format, name)
        set_submodule(self.module, str(node.target), _Mark(observer_qparams(observer), name))

    def _mark_weight(self, match: Match, name: str) -> None:
        layer: Any = called_module(match.anchor, self.module)
        note = note_of(layer)
        assert note is not None
        assert note.qconfig is not None
        spec = note.qconfig.weight
        assert spec is not None
        _check_integer(spec.format, f"{name}.weight")
        weight, _ = integer_weight_and_bias(layer, match, note.qconfig)
        float_layer = _plain(layer)
        if match.batch_norm is not None:
            _fold(float_layer, match.batch_norm)
            node = next(n for n in match.nodes if called_module(n, self.module) is match.batch_norm)
            set_submodule(self.module, str(node.target), nn.Identity())
        axis = 0
        if isinstance(float_layer, nn.ConvTranspose2d):
            axis = 1
            if float_layer.groups > 1:
                self.marked.unmarked[name] = "a grouped transposed convolution has no single axis"
                return
        self.marked.weight_bits[name] = get_format(spec.format).bits
        scale = weight.scale.detach().float().reshape(-1)
        if spec.granularity == "per_tensor":
            marked = _MarkedWeight(float_layer, scale[:1].reshape(()), None)
        else:
            marked = _MarkedWeight(float_layer, scale, axis)
        set_submodule(self.module, str(match.anchor.target), marked)


def _fold(layer: Any, batch_norm: nn.Module) -> None:
    """A batch norm into the layer before it, in place."""
    with torch.no_grad():
        factor = batch_norm_factor(batch_norm)
        bias = folded_bias(layer.bias, batch_norm)
        transposed = isinstance(layer, nn.ConvTranspose2d)
        weight = swap_channels(layer.weight, layer.groups) if transposed else layer.weight
        weight = weight * factor.reshape(-1, *([1] * (weight.dim() - 1)))
        if transposed:
            weight = swap_channels(weight, layer.groups)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)


def _check_integer(number_format: str, name: str) -> None:
    found = get_format(number_format)
    if not found.has_codes or not 4 <= found.bits <= 8:
        raise ValueError(
            f"{name} is of format {number_format}: encodings are of integers of 4 to 8 bits"
        )


def mark_prepared(prepared: nn.Module) -> Marked:
    """A copy of a prepared model in evaluation mode on the CPU, in float, with marks.

    Batch norms that ``convert`` folds are folded. The prepared model is not changed.

    Raises:
        RuntimeError: it has seen no data; names the layer.
        ValueError: a format has no integer encoding, or values are not finite; names the layer.
    """
    model = copy.deepcopy(prepared).eval().cpu()
    remove_synchronizer(model)
    marked = Marked(model)
    for name, module in list(graph_modules(model)):
        _Marker(module, f"{name}." if name else "", marked).run()
    return marked


def float_copy(prepared: nn.Module) -> nn.Module:
    """A copy of a prepared model in evaluation mode on the CPU that neither observes nor
    fake-quantizes: the float model."""
    model = copy.deepcopy(prepared).eval().cpu()
    remove_synchronizer(model)
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.observing = module.fake_quantizing = False
        elif isinstance(module, Observer):
            module.enabled = False
    return model
