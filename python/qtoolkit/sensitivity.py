"""What quantizing one layer alone does to a model's output."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import html
from qtoolkit.batches import gather_batches
from qtoolkit.checkpoint import Checkpoint, fingerprint
from qtoolkit.distributed import is_distributed, on_all_ranks
from qtoolkit.formats import get_format
from qtoolkit.layer_formats import Formats, qconfigs_of
from qtoolkit.layer_simulation import SimulatedLayer, Simulation
from qtoolkit.measures import Deviation, first_tensor
from qtoolkit.progress import progress_bar
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec, get_default_qconfig_mapping
from qtoolkit.text_table import text_table
from qtoolkit.workflow import calibrate, prepare

_NAN = float("nan")
_SAVE_EVERY_SECONDS = 1.0

_Key = tuple[str, str]  # layer and format

Metric = Callable[[Tensor, Tensor], Tensor | float]


def _kl(expected: Tensor, actual: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the probabilities along the last axis, for each sample."""
    divergence = functional.kl_div(
        actual.double().log_softmax(-1),
        expected.double().log_softmax(-1),
        reduction="none",
        log_target=True,
    )
    return divergence.sum(-1).mean()


_METRICS: dict[str, Metric | None] = {"sqnr": None, "cosine": None, "kl": _kl}


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer in one format, all others in float.

    Attributes:
        name: dotted name of the layer.
        kind: its class.
        format: what it was quantized to.
        error: what that does to the model's output: 0 for nothing, and greater is worse. For
            "sqnr" the ratio of noise to signal; NaN if no data reached the layer.
        sqnr: of the model's output in dB.
        weights: how many elements its weight has; 0 without one.
    """

    name: str
    kind: str
    format: str
    error: float
    sqnr: float
    weights: int


@dataclass(frozen=True)
class Sensitivity:
    """What each layer costs in each format; ``print`` it for a table, the worst layers first.

    Attributes:
        metric: name of the error.
        formats: as asked for.
        entries: layers in the order of the network, each with all formats.
    """

    metric: str
    formats: tuple[str, ...]
    entries: tuple[LayerSensitivity, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers in the order of the network."""
        return tuple(dict.fromkeys(entry.name for entry in self.entries))

    def error(self, layer: str, number_format: str) -> float:
        """The error of one layer in one format.

        Raises:
            KeyError: there is no such layer or format.
        """
        for entry in self.entries:
            if (entry.name, entry.format) == (layer, number_format):
                return entry.error
        raise KeyError(f"no sensitivity of {layer!r} in {number_format!r}")

    def worst(self, number_format: str | None = None) -> list[str]:
        """The layers that data reached, those of the greatest error first.

        Args:
            number_format: in which; the first one if None.
        """
        wanted = self.formats[0] if number_format is None else number_format
        found = [e for e in self.entries if e.format == wanted and e.error == e.error]
        return [entry.name for entry in sorted(found, key=lambda entry: -entry.error)]

    def _table(self) -> list[dict[str, LayerSensitivity]]:
        by_layer: dict[str, dict[str, LayerSensitivity]] = {}
        for entry in self.entries:
            by_layer.setdefault(entry.name, {})[entry.format] = entry
        return list(by_layer.values())

    def __str__(self) -> str:
        first = self.formats[0]
        rows = sorted(self._table(), key=lambda row: _descending(row[first].error))
        columns = [f"{name}: {self.metric} error, SQNR" for name in self.formats]
        headings = ["layer", "kind", *columns]
        lines = [headings]
        for row in rows:
            numbers = [
                "not reached" if e.error != e.error else f"{e.error:.3e}  {e.sqnr:6.2f} dB"
                for e in (row[name] for name in self.formats)
            ]
            lines.append([row[first].name, row[first].kind, *numbers])
        return text_table(lines, right=range(2, len(headings)))

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the table as a page with a plot for each format: one file that loads nothing."""
        table = self._table()
        names = [row[self.formats[0]].name for row in table]
        parts = [
            html.figure(
                f"{name}: SQNR of the output",
                html.points(names, [row[name].sqnr for row in table], "dB", f"SQNR with {name}"),
                f"Where that layer alone is quantized to {name}.",
            )
            for name in self.formats
        ]
        headings = ["#", "Layer", "Kind", "Weights"]
        for name in self.formats:
            headings += [f"{name}: error", f"{name}: SQNR (dB)"]
        rows = []
        for i, row in enumerate(table):
            first = row[self.formats[0]]
            cells: list[html.Cell | str] = [
                html.number(i, 0),
                first.name,
                first.kind,
                html.number(first.weights, 0),
            ]
            for name in self.formats:
                error = row[name].error
                shown = html.Cell(f"{error:.3e}", error) if error == error else html.number(_NAN)
                cells += [shown, html.number(row[name].sqnr)]
            rows.append(cells)
        text = html.page(f"Sensitivity ({self.metric})", [*parts, html.table(headings, rows)])
        Path(path).write_text(text, encoding="utf-8")


def _descending(error: float) -> float:
    return float("inf") if error != error else -error


class _Sum:
    """The error of one layer in one format over the batches so far."""

    def __init__(self, values: Sequence[float] | None = None) -> None:
        self.deviation = Deviation()
        self.metric = 0.0
        self.samples = 0
        if values is not None:
            self.add_values(values)

    def values(self) -> list[float]:
        """For another one to add."""
        return [*self.deviation.sums(), self.metric, self.samples]

    def add_values(self, values: Sequence[float]) -> None:
        """Adds what another one's ``values`` gave."""
        self.deviation.add_sums(*values[:5])
        self.metric += values[5]
        self.samples += int(values[6])

    def add(self, expected: Tensor, actual: Tensor, metric: Metric | None) -> None:
        self.deviation.add(expected, actual)
        samples = expected.shape[0] if expected.dim() else 1
        self.samples += samples
        if metric is not None:
            value = float(metric(expected, actual))
            if value != value:
                raise ValueError("sensitivity: the metric gave NaN; check what it computes")
            self.metric += value * samples

    def error(self, metric: str | Metric) -> float:
        found = self.deviation
        if not found.count:
            return _NAN
        if metric == "sqnr":
            if found.signal == 0:
                return 0.0 if found.noise == 0 else float("inf")
            return found.noise / found.signal
        if metric == "cosine":
            return max(0.0, 1 - found.cosine)
        return self.metric / self.samples


def sensitivity(
    model: nn.Module,
    loader: Iterable[Any],
    formats: Formats = ("int8",),
    metric: str | Metric = "sqnr",
    *,
    target: str = "x86",
    example_inputs: Any = None,
    max_batches: int | None = 8,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """How much each layer alone costs when it is quantized, its weight and what it reads.

    The float network runs once for each batch; for a layer only what depends on it runs again. So
    the cost is about half a forward pass for each layer, format and batch, on a few batches. Where
    a part of the model cannot be traced, all of it runs for each.

    Under ``torch.distributed`` each rank runs on its share of the data (as with
    ``DistributedSampler``), and all get the result of all data.

    Args:
        model: the float model; it is not changed.
        loader: batches without labels or with them: tensors; tuples that begin with the inputs; or
            dicts of arguments of ``forward``. It should give the same batches in each run.
        formats: names ("int8", "int4", "w4a4", "fp16", ...), or a dict of names with a ``QConfig``
            each.
        metric: what the error is: "sqnr" (noise over signal), "cosine" (1 - cosine), "kl" (of the
            classes' probabilities along the last axis), all of the model's first output; or
            metric(float output, output) that gives a number, greater where it is worse.
        target: the runtime that the formats are for, see ``get_default_qconfig_mapping``.
        example_inputs: what ``model.forward`` takes, as a tuple; if None, the first input of the
            first batch, or all that its dict names.
        max_batches: use so many batches at most; they are kept in memory.
        resume: a file that keeps what was done when the run is interrupted; the same call then goes
            on from there. Each rank has its own (``.rank1``). It cannot tell a metric from another
            of the same name.
        progress: show progress bars.

    Raises:
        ValueError: no data; a batch holds NaN or infinite values; the model gives NaN; an unknown
            format, metric or target; the model has no layer to quantize; or the file is of
            another run.
        TypeError: a batch of another kind.
        RuntimeError: it failed on another rank.
    """
    if isinstance(metric, str) and metric not in _METRICS:
        raise ValueError(f"unknown metric {metric!r}: use {', '.join(_METRICS)} or a callable")
    function = _METRICS[metric] if isinstance(metric, str) else metric
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    qconfigs = qconfigs_of(formats, target)
    with on_all_ranks("sensitivity"):
        inputs, batches = gather_batches(
            loader, model, "sensitivity", example_inputs, max_batches, progress=progress
        )
        plain = {key: None if q is None else q.to_dict() for key, q in qconfigs.items()}
        identity = "" if resume is None else fingerprint(model, plain, name, *batches)
        kept = Checkpoint(_own(resume), identity)
    layers: list[SimulatedLayer] = []
    sums: dict[_Key, _Sum] = {}
    for spec, group in _by_activation(qconfigs, target).items():
        simulation = _calibrated(model, inputs, batches, spec, target, progress=progress)
        layers = simulation.layers
        with on_all_ranks("sensitivity"):
            run = _Measuring(simulation, group, function, kept)
            run.over(batches, progress=progress)
        sums.update(run.sums)
    if not layers:
        raise ValueError("sensitivity: the model has no layer that can be quantized")
    sums = _of_all_ranks(sums)
    entries = []
    for layer in layers:
        for key, qconfig in qconfigs.items():
            error, sqnr = 0.0, float("inf")
            if qconfig is not None:
                total = sums[layer.name, key]
                error, sqnr = total.error(metric), total.deviation.sqnr
            entries.append(
                LayerSensitivity(layer.name, layer.kind, key, error, sqnr, layer.weights)
            )
    return Sensitivity(name, tuple(qconfigs), tuple(entries))


def _own(path: str | os.PathLike[str] | None) -> str | os.PathLike[str] | None:
    """The file of this rank."""
    if path is None or not is_distributed():
        return path
    return f"{os.fspath(path)}.rank{dist.get_rank()}"


def _by_activation(
    qconfigs: dict[str, QConfig | None], target: str
) -> dict[TensorSpec, dict[str, QConfig]]:
    """The formats, by what activations are calibrated for; those of floats need no ranges, and go
    with the others."""
    given = {key: qconfig for key, qconfig in qconfigs.items() if qconfig is not None}
    needs_range = {
        key: qconfig.activation
        for key, qconfig in given.items()
        if qconfig.activation is not None and get_format(qconfig.activation.format).has_codes
    }
    eight = get_default_qconfig_mapping(target).global_qconfig
    assert eight is not None
    assert eight.activation is not None
    first = next(iter(needs_range.values()), eight.activation)
    result: dict[TensorSpec, dict[str, QConfig]] = {first: {}}
    for key, qconfig in given.items():
        result.setdefault(needs_range.get(key, first), {})[key] = qconfig
    return result


def _calibrated(
    model: nn.Module,
    inputs: tuple[Any, ...],
    batches: list[tuple[Any, ...]],
    activation: TensorSpec,
    target: str,
    *,
    progress: bool,
) -> Simulation:
    default = get_default_qconfig_mapping(target).global_qconfig
    assert default is not None
    mapping = QConfigMapping().set_global(QConfig(activation, default.weight))
    return Simulation(calibrate(prepare(model, mapping, inputs), batches, progress=progress).eval())


class _Measuring:
    """The errors of the layers of one calibrated model.

    Args:
        simulation: that model.
        formats: what each layer is quantized to.
        metric: None for what follows from the sums of squares.
        kept: has what an earlier run did.
    """

    def __init__(
        self,
        simulation: Simulation,
        formats: dict[str, QConfig],
        metric: Metric | None,
        kept: Checkpoint,
    ) -> None:
        self.simulation = simulation
        self.formats = formats
        self.metric = metric
        self.kept = kept
        #: Where no data has reached a layer, its sum stays empty.
        self.sums = {
            (layer.name, key): _Sum(kept.state.get(f"{layer.name} {key}"))
            for layer in simulation.layers
            for key in formats
        }
        self.pairs = [
            (layer, key)
            for layer in simulation.layers
            for key, qconfig in formats.items()
            if simulation.reached(layer, qconfig)
        ]
        self.saved = time.monotonic()

    def over(self, batches: list[tuple[Any, ...]], *, progress: bool) -> None:
        """Measures what is not done yet; keeps it also where it is interrupted."""
        try:
            for index, inputs in enumerate(progress_bar(batches, "sensitivity", progress=progress)):
                missing = [
                    (layer, key)
                    for layer, key in self.pairs
                    if self.sums[layer.name, key].deviation.count <= index
                ]
                if missing:
                    self._measure(index, inputs, missing)
        finally:
            self.kept.save()

    def _measure(
        self, index: int, inputs: tuple[Any, ...], missing: list[tuple[SimulatedLayer, str]]
    ) -> None:
        expected = first_tensor(self.simulation.run(*inputs), "sensitivity")
        if bool(expected.isnan().any()):
            raise ValueError(f"sensitivity: the float model gives NaN for batch {index}")
        for layer, key in missing:
            output = self.simulation.run_with(layer, self.formats[key])
            total = self.sums[layer.name, key]
            total.add(expected, first_tensor(output, "sensitivity"), self.metric)
            self.kept.state[f"{layer.name} {key}"] = total.values()
            if time.monotonic() - self.saved > _SAVE_EVERY_SECONDS:
                self.kept.save()
                self.saved = time.monotonic()


def _of_all_ranks(sums: dict[_Key, _Sum]) -> dict[_Key, _Sum]:
    """The sums over all ranks' data."""
    if not is_distributed():
        return sums
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {key: total.values() for key, total in sums.items()})
    result = {key: _Sum() for key in sums}
    for own in gathered:
        for key, values in own.items():
            result[key].add_values(values)
    return result
