"""What an algorithm works on: a prepared model's layers, and calibration data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, fx, nn

from qtoolkit.algorithms.run_folder import RunFolder
from qtoolkit.algorithms.simulation import Quantizers, silent_observers, simulation
from qtoolkit.graph.modules import called_module, graph_modules
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.patterns import Match
from qtoolkit.graph.patterns.weighted import float_weight
from qtoolkit.graph.prepare import find_matches, is_observer
from qtoolkit.nn.weights import IntegerWeight, pin_weight, pinned_weight, quantize_weight
from qtoolkit.progress import progress_bar
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
            if user.args[:1] == (self.match.output,) and is_observer(called):
                return called
        return None

    def activation(self, x: Tensor) -> Tensor:
        """The fused ReLU of its output, where no addition comes before it."""
        if self.match.residual or not self.match.relu:
            return x
        return x.clamp(0.0, self.match.upper)

    def set_bias(self, bias: Tensor) -> None:
        """Replaces the bias. A new parameter: the calls of a layer that is called several times
        share theirs."""
        self.module.bias = nn.Parameter(bias, requires_grad=False)

    def state(self) -> dict[str, Any]:
        """What algorithms may have changed."""
        pinned, bias = pinned_weight(self.module), self.module.bias
        return {
            "weight": self.module.weight.detach().clone(),
            "bias": None if bias is None else bias.detach().clone(),
            "codes": None if pinned is None else pinned.codes,
            "scale": None if pinned is None else pinned.scale,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        device = self.module.weight.device
        with torch.no_grad():
            self.module.weight.copy_(state["weight"])
        if state["bias"] is not None:
            self.set_bias(state["bias"].to(device))
        if state["codes"] is not None:
            weight = IntegerWeight(state["codes"].to(device), state["scale"].to(device))
            pin_weight(self.module, weight)


class Unit(Protocol):
    """What an algorithm finishes in one step, such as a layer."""

    def state(self) -> dict[str, Any]:
        """What the step may have changed."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        ...


_Unit = TypeVar("_Unit", bound=Unit)


class _Reached(Exception):  # noqa: N818  (no error: it ends a run early)
    """The layer that a run was for has been computed."""


@dataclass
class Context:
    """A prepared model and the data that an algorithm may use.

    Attributes:
        prepared: the result of ``qt.prepare``, in eval mode. Algorithms change it in place.
        batches: inputs of the model, each a tuple of its positional arguments.
        progress: whether to show progress bars.
        folder: keeps finished steps; None without.
        layers: the layers with a weight that are quantized, in the order of the network.
        reference: a copy of ``prepared`` as it was when the context was made: the float network.
    """

    prepared: nn.Module
    batches: Sequence[tuple[Any, ...]]
    progress: bool = True
    folder: RunFolder | None = None
    layers: list[Layer] = field(init=False)
    reference: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.layers = list(_layers(self.prepared))
        self.reference = copy.deepcopy(self.prepared)

    def limited(self, samples: int) -> Context:
        """The same model and layers with the first batches that hold so many samples."""
        few = copy.copy(self)
        few.batches = []
        count = 0
        for batch in self.batches:
            if count >= samples:
                break
            few.batches.append(batch)
            count += next((len(x) for x in batch if isinstance(x, Tensor) and x.dim()), 1)
        return few

    def steps(
        self, units: Iterable[_Unit], description: str, total: int
    ) -> Iterator[tuple[_Unit, bool]]:
        """The units of an algorithm's work, with a progress bar.

        Each comes with whether an earlier run finished it, in which case it has that run's state.
        The state of one that the algorithm has finished is kept before the next one comes.
        """
        bar = progress_bar(units, description, progress=self.progress, total=total)
        for index, unit in enumerate(bar):
            found = None if self.folder is None else self.folder.load(str(index))
            if found is not None:
                unit.load_state(found)
            yield unit, found is not None
            if found is None and self.folder is not None:
                self.folder.save(str(index), unit.state())

    def run(self, batch: tuple[Any, ...], *, reference: bool = False) -> Any:
        """The model on one batch, without gradients; observers record nothing."""
        model = self.reference if reference else self.prepared
        with torch.no_grad(), silent_observers(model):
            return model(*batch)

    def float_module(self, layer: Layer) -> Any:
        """The module of a layer in the float network."""
        return self.reference.get_submodule(layer.path)

    def watch(
        self,
        layers: Sequence[Layer],
        see: Callable[[Layer, Tensor], None],
        *,
        reference: bool = False,
    ) -> None:
        """Runs the model on all batches and shows what layers give: the modules alone, before a
        fused ReLU or addition.

        Args:
            layers: some of ``layers``. A run ends once all of them have been computed.
            see: called with each layer and its output, without gradient.
            reference: watch the float network instead.
        """
        missing: set[Layer] = set()

        def hook(layer: Layer) -> Callable[..., None]:
            def keep(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
                see(layer, output.detach())
                missing.discard(layer)
                if not missing:
                    raise _Reached

            return keep

        handles = [
            (self.float_module(layer) if reference else layer.module).register_forward_hook(
                hook(layer)
            )
            for layer in layers
        ]
        try:
            for batch in self.batches:
                missing.update(layers)
                with suppress(_Reached):
                    self.run(batch, reference=reference)
        finally:
            for handle in handles:
                handle.remove()

    def inputs_of(self, layer: Layer, *, reference: bool = False) -> list[Tensor]:
        """What a layer reads in each of its calls; in the float network if ``reference``."""
        return [args[0].detach() for args, _ in self.calls_of(layer.path, reference=reference)]

    def calls_of(
        self, path: str, *, reference: bool = False
    ) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """The arguments of a module's calls on all batches.

        Args:
            path: its dotted name; "" is the model, whose calls are the batches.
        """
        if not path:
            return [(batch, {}) for batch in self.batches]
        kept: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        model = self.reference if reference else self.prepared

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kept.append((args, kwargs))

        handle = model.get_submodule(path).register_forward_pre_hook(keep, with_kwargs=True)
        try:
            for batch in self.batches:
                self.run(batch, reference=reference)
        finally:
            handle.remove()
        return kept

    def pin(self, layer: Layer, weight: IntegerWeight) -> None:
        """``pin_weight``, for all calls of a layer that is called several times."""
        for other in self.layers:
            if other.module.weight is layer.module.weight:
                pin_weight(other.module, weight)

    def owners(self) -> list[Layer]:
        """The layers without further calls of the same weight."""
        found: dict[nn.Parameter, Layer] = {}
        for layer in self.layers:
            found.setdefault(layer.module.weight, layer)
        return list(found.values())

    @contextmanager
    def simulated(self, *, weights: bool = True, activations: bool = True) -> Iterator[Quantizers]:
        """Inside, the prepared model computes what the converted one will, in float.

        Activations need observers that have seen data.

        Returns:
            What rounds the value of each observer; an algorithm may replace entries.
        """
        with simulation(
            self.prepared, self.layers, weights=weights, activations=activations
        ) as quantizers:
            yield quantizers


def _layers(prepared: nn.Module) -> Iterator[Layer]:
    for prefix, graph in graph_modules(prepared):
        for match in find_matches(graph):
            module = called_module(match.anchor, graph)
            note = note_of(module)
            if not match.pattern.has_weight or note is None or note.qconfig is None:
                continue
            path = f"{prefix}.{match.anchor.target}" if prefix else str(match.anchor.target)
            yield Layer(note.source, path, module, note.qconfig, match, graph)
