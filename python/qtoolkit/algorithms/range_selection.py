"""Range selection: how much of the outliers of activations is cut off, judged by the output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.observers import HistogramObserver
from qtoolkit.observers.percentile import percentile_range

#: Of the values of a tensor, in percent; more than that is cut off by no usual quantizer.
_PERCENTILES = (99.999, 99.99)


@register_algorithm("range_selection")
@dataclass(frozen=True)
class RangeSelection(Algorithm):
    """Chooses between the ranges of least squared error and those of two percentiles, for all
    activations with an observer "histogram" alike.

    What a wider step or a lost outlier costs depends on the layers behind it, so no tensor alone
    tells: the quantized network is run with each, and that counts whose outputs are nearest to the
    float network's. The histograms are there already, so nothing is observed again.

    Args:
        samples: use so many samples at most.
    """

    samples: int = 64

    stage = AFTER

    def run(self, context: Context) -> None:
        observers = [
            module
            for module in context.prepared.modules()
            if type(module) is HistogramObserver and module.calibrated() and module.pinned is None
        ]
        choice = _Choice(observers)
        for unit, done in context.steps([choice], "range selection", 1):
            if observers and not done:
                unit.decide(context.limited(self.samples))


class _Choice:
    """The one step of it.

    Attributes:
        percentile: that of all ranges, or None for those of least squared error.
    """

    def __init__(self, observers: list[HistogramObserver]) -> None:
        self.observers = observers
        self.percentile: float | None = None

    def state(self) -> dict[str, Any]:
        """The percentile."""
        return {"percentile": self.percentile}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        self.choose(state["percentile"])

    def choose(self, percentile: float | None) -> None:
        """Sets the range of each observer."""
        self.percentile = percentile
        for observer in self.observers:
            if percentile is None:
                observer.chosen = None
                continue
            state = (observer.histogram, observer.min_val, observer.max_val)
            counts, least, greatest = (tensor.cpu() for tensor in state)
            low, high = percentile_range(counts, least, greatest, percentile)
            device = observer.min_val.device
            observer.chosen = low.to(device), high.to(device)

    def decide(self, context: Context) -> None:
        """Chooses the percentile with the least error of the outputs."""
        wanted = [list(_tensors(context.run(b, reference=True))) for b in context.batches]
        errors: dict[float | None, float] = {}
        for percentile in (None, *_PERCENTILES):
            self.choose(percentile)
            with context.simulated():
                found = [list(_tensors(context.run(batch))) for batch in context.batches]
            errors[percentile] = _error(found, wanted)
        self.choose(min(errors, key=lambda percentile: errors[percentile]))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The float tensors of a model's output."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _error(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> float:
    """Noise over signal, summed over the outputs: a large one does not hide a small one."""
    total = 0.0
    for ours, theirs in zip(zip(*found), zip(*wanted)):
        noise = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs))
        signal = sum(float(b.double().square().sum()) for b in theirs)
        total += noise / signal if signal else noise
    return total
