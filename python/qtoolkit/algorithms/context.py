"""What an algorithm works on: a prepared model's layers, and calibration data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.modules import called_module, graph_modules
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.patterns import Match
from qtoolkit.graph.patterns.weighted import float_weight
from qtoolkit.graph.prepare import find_matches, is_observer
from qtoolkit.nn.weights import IntegerWeight, dequantized, pinned_weight, quantize_weight
from qtoolkit.observers import Observer
from qtoolkit.ops import fake_quantize_per_tensor
from qtoolkit.qconfig import QConfig, TensorSpec


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer with a weight that is to be quantized.

    Attributes:
        name: dotted name in the user's model.
        path: dotted name in the prepared model.
        module: the float layer, such as ``nn.Conv2d``, batch norm folded in.
        qconfig: how it is quantized.
        match: the nodes that it is quantized with, such as a ReLU.
        graph: the captured graph that these nodes belong to.
    """

    name: str
    path: str
    module: Any
    qconfig: QConfig
    match: Match
    graph: fx.GraphModule

    @property
    def weight_spec(self) -> TensorSpec:
        """How its weight is quantized."""
        assert self.qconfig.weight is not None
        return self.qconfig.weight

    def integer_weight(self) -> IntegerWeight:
        """The weight as ``convert`` would make it codes now."""
        pinned = pinned_weight(self.module)
        if pinned is not None:
            return pinned
        return quantize_weight(float_weight(self.module).detach(), self.weight_spec, self.name)

    def output_observer(self) -> nn.Module | None:
        """The observer of its output, after what is fused; None where that is read in float."""
        for user in self.match.output.users:
            called = called_module(user, self.graph)
            if is_observer(called):
                return called
        return None


class _Reached(Exception):  # noqa: N818  (no error: it ends a run early)
    """The layer that a run was for has been computed."""


@dataclass
class Context:
    """A prepared model and the data that an algorithm may use.

    Attributes:
        prepared: the result of ``qt.prepare``, in eval mode. Algorithms change it in place.
        batches: inputs of the model, each a tuple of its positional arguments.
        progress: whether to show progress bars.
    """

    prepared: nn.Module
    batches: Sequence[tuple[Any, ...]]
    progress: bool = True
    layers: list[Layer] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = list(_layers(self.prepared))

    def run(self, batch: tuple[Any, ...]) -> Any:
        """The model on one batch, without gradients."""
        with torch.no_grad():
            return self.prepared(*batch)

    def watch(self, layers: Sequence[Layer], see: Callable[[Layer, Tensor], None]) -> None:
        """Runs the model on all batches and shows what layers give: the modules alone, before a
        fused ReLU or addition.

        Args:
            layers: some of ``layers``. A run ends once all of them have been computed.
            see: called with each layer and its output, without gradient.
        """
        missing: set[Layer] = set()

        def hook(layer: Layer) -> Callable[..., None]:
            def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
                see(layer, output.detach())
                missing.discard(layer)
                if not missing:
                    raise _Reached

            return keep

        handles = [layer.module.register_forward_hook(hook(layer)) for layer in layers]
        try:
            for batch in self.batches:
                missing.update(layers)
                with suppress(_Reached):
                    self.run(batch)
        finally:
            for handle in handles:
                handle.remove()

    def inputs_of(self, layer: Layer) -> list[Tensor]:
        """What a layer reads on each batch that reaches it."""
        kept: list[Tensor] = []

        def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            kept.append(inputs[0].detach())
            raise _Reached

        handle = layer.module.register_forward_pre_hook(keep)
        try:
            for batch in self.batches:
                with suppress(_Reached):
                    self.run(batch)
        finally:
            handle.remove()
        return kept

    @contextmanager
    def simulated(self, *, weights: bool = True, activations: bool = True) -> Iterator[None]:
        """Inside, the prepared model computes what the converted one will, in float.

        Activations need observers that have seen data.
        """
        with ExitStack() as stack:
            if weights:
                stack.enter_context(_quantized_weights(self.layers))
            if activations:
                stack.enter_context(_quantized_activations(self.prepared, self.layers))
            yield


def _layers(prepared: nn.Module) -> Iterator[Layer]:
    for prefix, graph in graph_modules(prepared):
        for match in find_matches(graph):
            module = called_module(match.anchor, graph)
            note = note_of(module)
            if not match.pattern.has_weight or note is None or note.qconfig is None:
                continue
            path = f"{prefix}.{match.anchor.target}" if prefix else str(match.anchor.target)
            yield Layer(note.source, path, module, note.qconfig, match, graph)


@contextmanager
def _quantized_weights(layers: list[Layer]) -> Iterator[None]:
    kept = [(layer.module, layer.module.weight.data) for layer in layers]
    try:
        for layer in layers:
            weight = layer.integer_weight()
            layer.module.weight.data = dequantized(weight, layer.module)
        yield
    finally:
        for module, data in kept:
            module.weight.data = data


@contextmanager
def _quantized_activations(prepared: nn.Module, layers: list[Layer]) -> Iterator[None]:
    handles = []
    enabled: list[Any] = []
    # What is added to a residual is not rounded before that.
    branches = {called_module(layer.match.branch, layer.graph) for layer in layers}
    observers: list[Any] = [
        module for module in prepared.modules() if is_observer(module) and module not in branches
    ]
    try:
        for observer in observers:
            if isinstance(observer, Observer) and observer.enabled:
                observer.enabled = False
                enabled.append(observer)
            scale, zero_point = observer.calculate_qparams()
            limits = observer.spec.quant_min, observer.spec.quant_max

            def quantize(
                _: nn.Module,
                __: Any,
                output: Tensor,
                scale: Tensor = scale,
                zero_point: Tensor = zero_point,
                limits: tuple[int, int] = limits,
            ) -> Tensor:
                return fake_quantize_per_tensor(output, scale, zero_point, *limits)

            handles.append(observer.register_forward_hook(quantize))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for observer in enabled:
            observer.enabled = True
