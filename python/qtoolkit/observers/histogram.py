"""Histogram of all data, and the range with the least squared error."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.formats import get_format
from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec

# A value counts as this many units: a part of a count can move, and the total stays exact.
UNITS_PER_VALUE = 2**16
# Widths that a float32 histogram can divide into bins; outside, the values are scaled first.
_NARROW, _WIDE = 1e-30, 1e38


def _countable(lower: float, upper: float) -> bool:
    """Whether float32 can divide a range into bins."""
    return _NARROW <= upper - lower <= _WIDE


def _count(x: Tensor, bins: int, lower: float, upper: float) -> Tensor:
    """Counts of x, which lies in [lower, upper], int64 [bins]; a range of one point is bin 0."""
    if lower == upper:
        counts = torch.zeros(bins, dtype=torch.int64, device=x.device)
        counts[0] = x.numel()
        return counts
    if not _countable(lower, upper):
        # Powers of two: no float32 is rounded.
        factor = 0.25 if upper - lower > _WIDE else 2.0**80
        x, lower, upper = x.float() * factor, lower * factor, upper * factor
    return ops.histogram(x, bins, lower, upper)


@register_observer("histogram")
class HistogramObserver(Observer):
    """Keeps a histogram and chooses the range that quantizes it with the least squared error.

    The histogram covers [min_val, max_val] of all tensors seen. When the range grows, the counts
    move to the new bins; none is lost. `qtoolkit.ops.range_l2` is the search; a
    subclass that overrides `search` chooses another range.

    The buffer `histogram`, int64 [bins], holds counts times UNITS_PER_VALUE.

    Args:
        spec: how the tensor is quantized.
        bins: number of bins.
        name: the module that the tensor belongs to.

    Attributes:
        chosen: the range that was chosen instead of what `search` finds, or None; not saved in the
            state dict, and forgotten by `reset`.
    """

    options: ClassVar[tuple[str, ...]] = ("bins",)

    histogram: Tensor
    chosen: tuple[Tensor, Tensor] | None = None  # of the class: older pickles lack it

    def __init__(self, spec: TensorSpec | None = None, *, bins: int = 2048, name: str = "") -> None:
        super().__init__(spec, name=name)
        if bins < 2:
            raise ValueError(f"HistogramObserver: needs at least 2 bins, got {bins}")
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64))

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="histogram")

    def observe(self, x: Tensor) -> None:
        """Counts the values of x; where some lie outside the histogram, it is widened first."""
        counts = None
        lower, upper = self._bounds()
        if _countable(lower, upper):
            counts, min_val, max_val = ops.histogram_min_max(x, self.bins, lower, upper)
        else:
            min_val, max_val = ops.min_max(x)
        # The range is needed on the host, so the check costs no further synchronisation.
        least, greatest = min_val.item(), max_val.item()
        if not (math.isfinite(least) and math.isfinite(greatest)):
            if self.on_nonfinite == "error":
                self.check_finite(min_val, max_val)
            self._checked(min_val, max_val)  # warns
            return
        if counts is None or least < lower or greatest > upper:
            self._widen(min(least, lower), max(greatest, upper))
            counts = _count(x, self.bins, *self._bounds())
        self.histogram += UNITS_PER_VALUE * counts

    def value_range(self) -> tuple[Tensor, Tensor]:
        """The range that `search` finds, or `chosen`; needs the histogram on the host."""
        if self.chosen is not None:
            return self.chosen
        state = (self.histogram, self.min_val, self.max_val)
        low, high = self.search(*(tensor.cpu() for tensor in state))
        return low.to(self.min_val.device), high.to(self.min_val.device)

    def search(self, counts: Tensor, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The range to quantize of a histogram over [min_val, max_val], on the CPU."""
        return ops.range_l2(counts, min_val, max_val, 2 ** get_format(self.spec.format).bits)

    def reset(self) -> None:
        """Forgets all data."""
        super().reset()
        self.chosen = None
        self.histogram.zero_()

    @classmethod
    def merge_states(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the histograms, over the range of all data."""
        merged = super().merge_states(state)
        total = torch.zeros_like(state["histogram"][0])
        bounds = zip(*(state[name].tolist() for name in ("min_val", "max_val")))
        lower, upper = merged["min_val"].tolist(), merged["max_val"].tolist()
        for rank, (lows, highs) in enumerate(bounds):
            for index, (low, high) in enumerate(zip(lows, highs)):
                if low <= high:
                    counts = state["histogram"][rank, index]
                    total[index] += _rebinned(counts, low, high, lower[index], upper[index])
        return {**merged, "histogram": total}

    def _bounds(self) -> tuple[float, float]:
        return self.min_val.item(), self.max_val.item()

    def _widen(self, lower: float, upper: float) -> None:
        """Moves the counts to bins over [lower, upper], which includes the present range."""
        old = self._bounds()
        if old[0] <= old[1]:
            self.histogram.copy_(_rebinned(self.histogram, *old, lower, upper))
        self.min_val.fill_(lower)
        self.max_val.fill_(upper)


def _rebinned(
    counts: Tensor, old_lower: float, old_upper: float, lower: float, upper: float
) -> Tensor:
    """The counts in as many bins over [lower, upper], which includes [old_lower, old_upper]."""
    if (lower, upper) == (old_lower, old_upper):
        return counts
    moved = ops.rebin_histogram(counts.cpu(), old_lower, old_upper, lower, upper)
    return moved.to(counts.device)
