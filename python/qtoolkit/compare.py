"""How far a quantized model is from the float one, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.capture import Capture
from qtoolkit.graph.modules import bound_arguments, graph_modules
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report, model_inputs
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.progress import batch_bar


@dataclass(frozen=True)
class LayerComparison:
    """One layer.

    Attributes:
        name: dotted name in the float model.
        kind: class of the quantized layer.
        sqnr: signal-to-quantization-noise ratio of its output in dB, over all batches; the noise of
            all layers before it is in it; NaN if no batch reached it.
    """

    name: str
    kind: str
    sqnr: float


@dataclass(frozen=True)
class Comparison:
    """Layers in the order of the network, and the whole; ``print`` it for a table.

    Attributes:
        layers: the quantized layers.
        sqnr: of the model's output in dB.
    """

    layers: tuple[LayerComparison, ...]
    sqnr: float

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers] + [len("output")])
        lines = [f"{'layer'.ljust(width)}  SQNR (dB)"]
        lines += [f"{layer.name.ljust(width)}  {layer.sqnr:9.2f}" for layer in self.layers]
        return "\n".join([*lines, f"{'output'.ljust(width)}  {self.sqnr:9.2f}"])


class _Energy:
    """Sums of squares of a signal and of its error."""

    def __init__(self) -> None:
        self.measured = False
        self.signal = 0.0
        self.noise = 0.0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        self.measured = True
        expected, actual = expected.double(), actual.double()
        self.signal += float(expected.square().sum())
        self.noise += float((expected - actual).square().sum())

    @property
    def sqnr(self) -> float:
        if not self.measured:
            return float("nan")
        if self.noise == 0:
            return float("inf")
        if self.signal == 0:
            return float("-inf")
        return 10 * float(torch.log10(torch.tensor(self.signal / self.noise, dtype=torch.double)))


class _FloatRun(fx.Interpreter):
    """Runs a captured graph and keeps the values of some nodes."""

    def __init__(
        self, module: fx.GraphModule, wanted: set[str], values: dict[Any, list[Tensor]]
    ) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.values = values
        self.part = ""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.wanted and isinstance(result, Tensor):
            # Later in-place operators would change it.
            self.values.setdefault((self.part, n.name), []).append(result.clone())
        return result


def _quantized_layers(model: nn.Module) -> dict[tuple[str, str], QuantizedModule]:
    """The layers that have a counterpart: by part of the model and node of the float graph."""
    result = {}
    for part, module in graph_modules(model):
        for node in module.graph.nodes:
            if node.op != "call_module":
                continue
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, QuantizedModule) and layer.float_node:
                result[(part, layer.float_node)] = layer
    return result


def _real(layer: QuantizedModule, output: Tensor) -> Tensor:
    if layer.output_scale is None:
        return output
    codes = output.to(torch.int32) - layer.output_zero_point
    return codes.float() * layer.output_scale


def _first_tensor(value: Any) -> Tensor:
    while isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, dict):
        return _first_tensor(next(iter(value.values())))
    if not isinstance(value, Tensor):
        raise TypeError(f"compare needs a model that returns tensors, got {type(value).__name__}")
    return value


def compare(
    model: nn.Module,
    quantized: nn.Module,
    loader: Iterable[Any],
    max_batches: int | None = None,
    *,
    progress: bool = True,
) -> Comparison:
    """SQNR of every quantized layer's output and of the model's, on real data.

    Args:
        model: the float model.
        quantized: what ``qt.convert`` made of it; neither is changed.
        loader: batches: tensors, or tuples whose first entry is the input.
        max_batches: stop after so many.
        progress: show a progress bar.

    Raises:
        ValueError: ``quantized`` is not converted, or the loader is empty.
    """
    report = get_report(quantized)
    if report is None or any(is_observer(module) for module in quantized.modules()):
        raise ValueError("compare needs the result of qt.convert as its second argument")
    quantized = copy.deepcopy(quantized)
    layers = _quantized_layers(quantized)
    energies = {key: _Energy() for key in layers}
    whole = _Energy()
    expected: dict[Any, list[Tensor]] = {}
    captured: nn.Module | None = None

    for key, layer in layers.items():

        def measure(
            module: nn.Module, args: Any, output: Tensor, key: tuple[str, str] = key
        ) -> None:
            assert isinstance(module, QuantizedModule)
            # A part that is called several times gives its values in the order of the calls.
            if expected.get(key):
                energies[key].add(expected[key].pop(0), _real(module, output))

        layer.register_forward_hook(measure)

    batches = 0
    with torch.no_grad():
        for batch in batch_bar(loader, max_batches, "compare", progress=progress):
            inputs = model_inputs(batch, report.inputs)
            if captured is None:
                captured = Capture(model, inputs).model
                _record_float(captured, {node for _, node in layers}, expected)
            expected.clear()
            reference = _first_tensor(captured(*inputs))
            whole.add(reference, _first_tensor(quantized(*inputs)))
            batches += 1
    if batches == 0:
        raise ValueError("compare got no data: the loader is empty")
    return Comparison(
        tuple(
            LayerComparison(layer.source, layer.kind(), energies[key].sqnr)
            for key, layer in layers.items()
        ),
        whole.sqnr,
    )


def _record_float(model: nn.Module, wanted: set[str], values: dict[Any, list[Tensor]]) -> None:
    """Makes every captured part keep the values of the wanted nodes whenever it runs."""
    for part, module in graph_modules(model):
        run = _FloatRun(module, wanted, values)
        run.part = part
        module.forward = _runner(module, run)


def _runner(module: fx.GraphModule, run: _FloatRun) -> Callable[..., Any]:
    return lambda *args, **kwargs: run.run(*bound_arguments(module, args, kwargs))
