"""How far a quantized model is from the float one, layer by layer."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit import html
from qtoolkit.batches import input_batches
from qtoolkit.graph.capture import Capture
from qtoolkit.graph.modules import bound_arguments, graph_modules
from qtoolkit.graph.notes import note_of
from qtoolkit.graph.prepare import is_observer, rewritten
from qtoolkit.graph.report import Report, get_report
from qtoolkit.layer_times import timed_calls
from qtoolkit.measures import Deviation, ValueCounts, first_tensor
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.weights import IntegerWeight, dequantized, swap_channels
from qtoolkit.text_table import text_table

_NAN = float("nan")
_Key = tuple[str, str]  # the part of the model, and the node of the float graph


@dataclass(frozen=True)
class LayerComparison:
    """One layer.

    Attributes:
        name: dotted name in the float model.
        kind: class of the quantized layer, or of the float one.
        sqnr: signal-to-quantization-noise ratio of its output in dB, over all batches; the noise of
            all layers before it is in it; NaN if no batch reached it.
        cosine: of the angle between its float and its quantized output.
        minimum: the least value of its float output; NaN if no batch reached it.
        maximum: the greatest.
        low: the least value that the codes of its output can hold; NaN if it gives floats.
        high: the greatest.
        weight_sqnr: signal-to-noise ratio of its quantized weight in dB, against the float model's
            with batch norm folded in; NaN without such weight. Algorithms that move scales between
            layers, and training, change weights: it is not of rounding alone then.
        latency_ms: how long it takes as a module by itself, for the first batch; the least of some
            runs.
        counts: how many float outputs fall into each of some bins of equal width.
        bins: where the first bin begins and the last one ends.
        reason: why it stayed in float; empty if it did not.
    """

    name: str
    kind: str
    sqnr: float
    cosine: float = _NAN
    minimum: float = _NAN
    maximum: float = _NAN
    low: float = _NAN
    high: float = _NAN
    weight_sqnr: float = _NAN
    latency_ms: float = field(default=_NAN, compare=False)
    counts: tuple[float, ...] = ()
    bins: tuple[float, float] = (_NAN, _NAN)
    reason: str = ""


@dataclass(frozen=True)
class Comparison:
    """Layers in the order of the network, and the whole; ``print`` it for a table.

    Attributes:
        layers: those that are quantized, and those that stayed in float.
        sqnr: of the model's output in dB.
        cosine: of the model's output.
    """

    layers: tuple[LayerComparison, ...]
    sqnr: float
    cosine: float = _NAN

    def __str__(self) -> str:
        headings = ("layer", "SQNR (dB)", "cosine", "weight (dB)", "values", "range of codes", "")
        rows: list[tuple[str, ...]] = [headings]
        for layer in self.layers:
            values = _span(layer.minimum, layer.maximum)
            chosen = _span(layer.low, layer.high)
            note = f"float: {layer.reason}" if layer.reason else ""
            numbers = (f"{layer.sqnr:.2f}", f"{layer.cosine:.5f}", f"{layer.weight_sqnr:.2f}")
            rows.append((layer.name, *(_dash(n) for n in numbers), values, chosen, note))
        rows.append(("output", f"{self.sqnr:.2f}", f"{self.cosine:.5f}", "", "", "", ""))
        return text_table(rows, right=range(1, len(headings) - 1))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as a page with plots: one file that loads nothing from elsewhere.

        It has a table of all layers, sorted by a click on a heading, with the histogram of each
        layer's values and the range of its codes; SQNR by depth; and latency by layer.
        """
        names = [layer.name for layer in self.layers]
        parts = [
            html.paragraph(
                f"Output: SQNR {self.sqnr:.2f} dB, cosine {self.cosine:.6f}. "
                f"{len(self.layers)} layers, {sum(bool(x.reason) for x in self.layers)} in float."
            ),
            html.figure(
                "SQNR by depth",
                html.points(names, [x.sqnr for x in self.layers], "dB", "SQNR of each layer"),
                "Of each layer's output; the noise of all layers before it is in it.",
            ),
            html.figure(
                "Latency by layer",
                html.bars(names, [x.latency_ms for x in self.layers], "ms", "latency by layer"),
                "Each layer by itself, for the first batch; a compiled model is faster.",
            ),
            "<h2>Layers</h2>",
            html.paragraph(
                "Histograms: the float model's values, counts on a logarithmic scale; shaded "
                "between the two lines: the range of the codes."
            ),
            html.table(
                [
                    "#", "Layer", "Kind", "SQNR (dB)", "Cosine", "Weight (dB)", "Least",
                    "Greatest", "ms", "Values and range of codes",
                ],
                [_row(i, layer) for i, layer in enumerate(self.layers)],
            ),
        ]  # fmt: skip
        Path(path).write_text(html.page("Quantized against float", parts), encoding="utf-8")


def _dash(text: str) -> str:
    return "-" if text == "nan" else text


def _span(low: float, high: float) -> str:
    return "-" if low != low else f"{low:.4g} .. {high:.4g}"


def _row(index: int, layer: LayerComparison) -> list[html.Cell | str]:
    chosen = None if layer.low != layer.low else (layer.low, layer.high)
    width = layer.high - layer.low if chosen else None
    plot = "not reached by the data"
    if layer.counts:
        label = f"{layer.name}: values {_span(layer.minimum, layer.maximum)}"
        label += f", codes {_span(*chosen)}" if chosen else ", float"
        plot = html.histogram(layer.counts, *layer.bins, chosen, label)
    return [
        html.number(index, 0),
        layer.name,
        f"{layer.kind}: {layer.reason}" if layer.reason else layer.kind,
        html.number(layer.sqnr),
        html.number(layer.cosine, 5),
        html.number(layer.weight_sqnr),
        html.number(layer.minimum, 3),
        html.number(layer.maximum, 3),
        html.number(layer.latency_ms, 3),
        html.Cell(plot, width),
    ]


class _Seen:
    """What is measured of one layer while the batches run."""

    def __init__(self) -> None:
        self.deviation = Deviation()
        self.values = ValueCounts()
        self.latency_ms = _NAN


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


def _compared_layers(model: nn.Module) -> dict[_Key, nn.Module]:
    """The layers that have a counterpart in the float model, quantized ones and others."""
    result = {}
    for part, module in graph_modules(model):
        for node in module.graph.nodes:
            if node.op != "call_module":
                continue
            layer = module.get_submodule(str(node.target))
            if isinstance(layer, QuantizedModule):
                name = layer.float_node
            else:
                note = note_of(layer)
                name = "" if note is None else note.float_node
            if name:
                result[(part, name)] = layer
    return result


def _real(layer: nn.Module, output: Tensor) -> Tensor:
    if not isinstance(layer, QuantizedModule) or layer.output_scale is None:
        return output
    codes = output.to(torch.int32) - layer.output_zero_point
    return codes.float() * layer.output_scale


def compare(
    model: nn.Module,
    quantized: nn.Module,
    loader: Iterable[Any],
    max_batches: int | None = None,
    *,
    progress: bool = True,
) -> Comparison:
    """Each layer of a quantized model beside the float one's, on real data.

    ``print`` the result for a table; ``result.to_html(path)`` writes a page with plots.

    Args:
        model: the float model.
        quantized: what ``qt.convert`` made of it; neither is changed.
        loader: batches: tensors; tuples that begin with the inputs; or dicts of arguments of
            ``forward``.
        max_batches: stop after so many.
        progress: show a progress bar.

    Raises:
        ValueError: ``quantized`` is not converted; the loader is empty; a batch holds NaN or
            infinite values; or the float model gives NaN.
        TypeError: a batch of another kind, or a model that returns no tensors.
    """
    report = get_report(quantized)
    if report is None or any(is_observer(module) for module in quantized.modules()):
        raise ValueError("compare needs the result of qt.convert as its second argument")
    quantized = copy.deepcopy(quantized)
    layers = _compared_layers(quantized)
    seen = {key: _Seen() for key in layers}
    whole = Deviation()
    expected: dict[Any, list[Tensor]] = {}
    captured: nn.Module | None = None
    first: tuple[Any, ...] = ()
    batches = input_batches(
        loader, model, "compare", inputs=report.inputs, max_batches=max_batches, progress=progress
    )
    with ExitStack() as stack, torch.no_grad():
        for key, layer in layers.items():
            hook = layer.register_forward_hook(_measure(key, seen[key], expected))
            stack.callback(hook.remove)
        for index, inputs in enumerate(batches):
            if captured is None:
                captured = Capture(model, inputs).model
                _record_float(captured, {node for _, node in layers}, expected)
                first = inputs
            expected.clear()
            reference = first_tensor(captured(*inputs), "compare")
            if bool(reference.isnan().any()):
                raise ValueError(f"compare: the float model gives NaN for batch {index}")
            whole.add(reference, first_tensor(quantized(*inputs), "compare"))
    with torch.no_grad():
        _time_layers(quantized, {layers[key]: seen[key] for key in layers}, first)
    weights = _weight_deviations(model, first, layers, report)
    return Comparison(tuple(_rows(layers, seen, weights, report)), whole.sqnr, whole.cosine)


def _measure(key: _Key, seen: _Seen, expected: dict[Any, list[Tensor]]) -> Callable[..., None]:
    def measure(module: nn.Module, _: Any, output: Any) -> None:
        # A part that is called several times gives its values in the order of the calls.
        if expected.get(key) and isinstance(output, Tensor):
            value = expected[key].pop(0)
            seen.deviation.add(value, _real(module, output))
            seen.values.add(value)

    return measure


def _time_layers(
    quantized: nn.Module, layers: dict[nn.Module, _Seen], inputs: tuple[Any, ...], runs: int = 3
) -> None:
    """Sets the least latency of each layer over some runs."""

    def took(layer: nn.Module, ms: float) -> None:
        seen = layers[layer]
        seen.latency_ms = ms if seen.latency_ms != seen.latency_ms else min(seen.latency_ms, ms)

    with timed_calls(layers, took):
        for _ in range(runs):
            quantized(*inputs)


def _weight_deviations(
    model: nn.Module, inputs: tuple[Any, ...], layers: dict[_Key, nn.Module], report: Report
) -> dict[str, float]:
    """SQNR of the quantized weights in dB, by layer."""
    floats = rewritten(model, inputs, fold=True).model if report.recipe is not None else model
    result = {}
    for layer in layers.values():
        codes = getattr(layer, "weight", None)
        if not isinstance(layer, QuantizedModule) or not isinstance(codes, Tensor):
            continue
        try:
            original = floats.get_submodule(layer.source)
        except AttributeError:
            continue
        weight, scale = getattr(original, "weight", None), getattr(layer, "weight_scale", None)
        if weight is None or scale is None or weight.shape != codes.shape:
            continue
        deviation = Deviation()
        if isinstance(original, nn.ConvTranspose2d):
            codes = swap_channels(codes, original.groups)  # output channels first, as scales are
        real = dequantized(IntegerWeight(codes, scale), original)
        deviation.add(weight.detach(), real)
        result[layer.source] = deviation.sqnr
    return result


def _rows(
    layers: dict[_Key, nn.Module],
    seen: dict[_Key, _Seen],
    weights: dict[str, float],
    report: Report,
) -> Iterable[LayerComparison]:
    floats = {layer.name: layer for layer in report.floats}
    for key, layer in layers.items():
        found = seen[key]
        low = high = _NAN
        reason = ""
        if isinstance(layer, QuantizedModule):
            name, kind = layer.source, layer.kind()
            if layer.output_scale is not None:
                scale, zero_point = float(layer.output_scale), int(layer.output_zero_point)
                low = scale * (layer.quant_min - zero_point)
                high = scale * (layer.quant_max - zero_point)
        else:
            note = note_of(layer)
            assert note is not None
            name, kind = note.source, type(layer).__name__
            known = floats.pop(name, None)
            reason = "stays in float" if known is None else known.reason
        counts, first, last = found.values.filled()
        yield LayerComparison(
            name,
            kind,
            found.deviation.sqnr,
            found.deviation.cosine,
            found.values.minimum,
            found.values.maximum,
            low,
            high,
            weights.get(name, _NAN),
            found.latency_ms,
            counts,
            (first, last),
            reason,
        )
    for left in floats.values():
        yield LayerComparison(left.name, left.kind, _NAN, reason=left.reason)


def _record_float(model: nn.Module, wanted: set[str], values: dict[Any, list[Tensor]]) -> None:
    """Makes every captured part keep the values of the wanted nodes whenever it runs."""
    for part, module in graph_modules(model):
        run = _FloatRun(module, wanted, values)
        run.part = part
        module.forward = _runner(module, run)


def _runner(module: fx.GraphModule, run: _FloatRun) -> Callable[..., Any]:
    return lambda *args, **kwargs: run.run(*bound_arguments(module, args, kwargs))
