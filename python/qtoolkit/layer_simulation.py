"""One layer of a float network quantized, the others not: what comes out, at the cost of what
depends on that layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.fake_quantize import make_fake_quantize
from qtoolkit.formats import get_format
from qtoolkit.graph.modules import bound_arguments, called_module, graph_modules
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.patterns import Match
from qtoolkit.graph.patterns.weighted import float_weight
from qtoolkit.graph.prepare import find_matches, is_observer
from qtoolkit.graph.same_values import origin
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn.weights import swap_channels
from qtoolkit.observers import Observer
from qtoolkit.ops import fake_quantize_per_tensor
from qtoolkit.qconfig import QConfig, TensorSpec

_Round = Callable[[Tensor], Tensor]
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, eq=False)
class SimulatedLayer:
    """A layer that can be quantized.

    Attributes:
        name: dotted name in the user's model.
        kind: its class.
        module: the float layer, batch norm folded in.
        match: the nodes that it is quantized with.
        graph: the captured part that they belong to.
    """

    name: str
    kind: str
    module: Any
    match: Match
    graph: fx.GraphModule

    @property
    def weights(self) -> int:
        """How many elements its weight has; 0 without one."""
        return self.module.weight.numel() if self.match.pattern.has_weight else 0

    @property
    def channels(self) -> int:
        """How many output channels its weight has; 0 without one."""
        return float_weight(self.module).shape[0] if self.weights else 0

    def products(self) -> int:
        """How many products of a weight and an activation one sample of the example inputs takes;
        0 without a weight, or where shapes are not known."""
        node = self.match.anchor
        if isinstance(self.module, nn.ConvTranspose2d):  # each input meets all weights, not output
            node = self.match.inputs[0]
            observed = is_observer(called_module(node, self.graph))
            node = node.all_input_nodes[0] if observed else node
        shape = float_shape(node)
        if not self.weights or not shape or shape[0] == 0:
            return 0
        if isinstance(self.module, nn.Linear):
            rows = torch.Size(shape[:-1]).numel()
        else:
            rows = shape[0] * torch.Size(shape[2:]).numel()
        return self.weights * rows // shape[0]


class _Run(fx.Interpreter):
    """Runs a captured part in which some nodes may read rounded values and weights."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.captured = module
        self.rounded: dict[fx.Node, dict[fx.Node, _Round]] = {}
        self.weights: dict[fx.Node, Tensor] = {}

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> Any:
        rounded = self.rounded.get(n, {})

        def load(node: fx.Node) -> Any:
            value = self.env[node]
            return rounded[node](value) if node in rounded else value

        return fx.map_arg(n.args, load), fx.map_arg(n.kwargs, load)

    def run_node(self, n: fx.Node) -> Any:
        weight = self.weights.get(n)
        if weight is None:
            return super().run_node(n)
        module: Any = called_module(n, self.captured)
        kept = module.weight.data
        module.weight.data = weight
        try:
            return super().run_node(n)
        finally:
            module.weight.data = kept

    def run_after(self, values: dict[fx.Node, Any], changed: set[fx.Node]) -> Any:
        """The output where some nodes give other values; only what depends on them is computed.

        Args:
            values: of all nodes, from a run without that.
            changed: those nodes.
        """
        self.env = dict(values)
        changed = set(changed)
        nodes = list(self.captured.graph.nodes)
        for node in nodes:
            if node in changed or not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
                self.env[node] = self.run_node(node)
        return self.env[nodes[-1]]


class Simulation:
    """A calibrated model in which one layer at a time is quantized.

    Args:
        prepared: the result of ``qt.prepare``, calibrated, in eval mode. It computes in float, and
            is taken over.
    """

    def __init__(self, prepared: nn.Module) -> None:
        self.model = prepared
        for module in prepared.modules():
            if isinstance(module, Observer):
                module.enabled = False
        graphs = dict(graph_modules(prepared))
        self._runs = {graph: _Run(graph) for graph in graphs.values()}
        #: Only where the model as a whole is one graph is there a prefix to be kept.
        self._whole = self._runs[graphs[""]] if list(graphs) == [""] else None
        for graph, run in self._runs.items():
            if self._whole is None:
                graph.forward = _forward(graph, run)
        self._values: dict[fx.Node, Any] = {}
        self._inputs: tuple[Any, ...] = ()
        self._weights: dict[tuple[SimulatedLayer, TensorSpec], Tensor] = {}
        self._qparams: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self.layers = [
            layer
            for prefix, graph in graphs.items()
            for layer in _layers(graph, f"{prefix}." if prefix else "")
        ]

    def observers(self) -> list[nn.Module]:
        """What ``prepare`` put on activations."""
        return [module for module in self.model.modules() if is_observer(module)]

    def run(self, *inputs: Any) -> Any:
        """The float output; the runs of ``run_with`` that follow are for the same inputs."""
        self._inputs = inputs
        with torch.no_grad():
            if self._whole is None:
                return self.model(*inputs)
            self._values = {}
            arguments = bound_arguments(self._whole.captured, inputs, {})
            output = self._whole.run(*arguments)
            self._values = self._whole.env
            return output

    def reached(self, layer: SimulatedLayer, qconfig: QConfig) -> bool:
        """Whether calibration has seen what the layer reads."""
        try:
            self._rounding(layer, qconfig)
        except RuntimeError:  # an observer without data
            return False
        return True

    def run_with(self, layer: SimulatedLayer, qconfig: QConfig) -> Any:
        """The output where one layer, which data has reached, reads rounded inputs and has a
        rounded weight."""
        run = self._runs[layer.graph]
        run.rounded, run.weights = self._rounding(layer, qconfig)
        try:
            with torch.no_grad():
                if self._whole is None:
                    return self.model(*self._inputs)
                return run.run_after(self._values, {*run.rounded, *run.weights})
        finally:
            run.rounded, run.weights = {}, {}

    def _rounding(
        self, layer: SimulatedLayer, qconfig: QConfig
    ) -> tuple[dict[fx.Node, dict[fx.Node, _Round]], dict[fx.Node, Tensor]]:
        """What its nodes read rounded, and its weight."""
        rounded: dict[fx.Node, dict[fx.Node, _Round]] = {}
        if qconfig.activation is not None:
            functions = {
                node: self._round(node, layer, qconfig.activation) for node in layer.match.inputs
            }
            for node in layer.match.nodes:
                read = {n: functions[n] for n in node.all_input_nodes if n in functions}
                if read:
                    rounded[node] = read
        weights: dict[fx.Node, Tensor] = {}
        if layer.weights and qconfig.weight is not None:
            key = layer, qconfig.weight
            if key not in self._weights:
                self._weights[key] = _rounded_weight(layer, qconfig.weight)
            weights[layer.match.anchor] = self._weights[key]
        return rounded, weights

    def _round(self, node: fx.Node, layer: SimulatedLayer, spec: TensorSpec) -> _Round:
        """How a value that a layer reads is rounded."""
        if spec.format in _HALVES:
            return lambda x: _half(x, spec.format)
        observer: Any = called_module(origin(node, layer.graph), layer.graph)
        if not is_observer(observer):
            return lambda x: x
        if observer not in self._qparams:
            self._qparams[observer] = observer.calculate_qparams()
        scale, zero_point = self._qparams[observer]
        low, high = spec.quant_min, spec.quant_max
        return lambda x: fake_quantize_per_tensor(x, scale, zero_point, low, high)


def _forward(graph: fx.GraphModule, run: _Run) -> Callable[..., Any]:
    return lambda *args, **kwargs: run.run(*bound_arguments(graph, args, kwargs))


def _layers(graph: fx.GraphModule, prefix: str) -> list[SimulatedLayer]:
    result = []
    for match in find_matches(graph):
        module = called_module(match.anchor, graph)
        note = note_of(module)
        if module is not None and note is not None:
            kind = type(module).__name__
            result.append(SimulatedLayer(note.source, kind, module, match, graph))
    return result


def _half(x: Tensor, number_format: str) -> Tensor:
    """Rounded to a float of 16 bits, saturating."""
    dtype = _HALVES[number_format]
    largest = torch.finfo(dtype).max
    return x.clamp(-largest, largest).to(dtype).to(x.dtype)


def _rounded_weight(layer: SimulatedLayer, spec: TensorSpec) -> Tensor:
    """A layer's weight after rounding, in its own layout."""
    weight = float_weight(layer.module).detach()
    if spec.format in _HALVES:
        rounded = _half(weight, spec.format)
    else:
        if not get_format(spec.format).has_codes:
            raise ValueError(f"weights of format {spec.format} cannot be simulated")
        fake_quantize = make_fake_quantize(spec, f"{layer.name}.weight", is_weight=True)
        fake_quantize = fake_quantize.to(weight.device)
        fake_quantize.allocate(weight)
        codes, scale = fake_quantize.integer_codes(weight)
        rounded = codes.float() * scale.reshape(-1, *([1] * (codes.dim() - 1)))
    if isinstance(layer.module, nn.ConvTranspose2d):
        rounded = swap_channels(rounded, layer.module.groups)
    return rounded
