"""The range that covers most values, whatever the few outside."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.observers.histogram import HistogramObserver
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("percentile")
class PercentileObserver(HistogramObserver):
    """Keeps a histogram and covers `percentile` per cent of the values.

    Half of the others lie below the range and half above. Values are taken as even in their bin, so
    the range is exact to the width of a bin.

    Args:
        spec: how the tensor is quantized.
        percentile: above 0 and at most 100.
        bins: number of bins.
        name: the module that the tensor belongs to.
    """

    options = ("bins", "percentile")

    def __init__(
        self,
        spec: TensorSpec | None = None,
        *,
        percentile: float = 99.99,
        bins: int = 2048,
        name: str = "",
    ) -> None:
        super().__init__(spec, bins=bins, name=name)
        if not 0.0 < percentile <= 100.0:
            raise ValueError(
                f"PercentileObserver: percentile must be above 0 and at most 100, got {percentile}"
            )
        self.percentile = percentile

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="percentile")

    def search(self, counts: Tensor, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The range between the two quantiles."""
        return percentile_range(counts, min_val, max_val, self.percentile)


def percentile_range(
    counts: Tensor, min_val: Tensor, max_val: Tensor, percentile: float
) -> tuple[Tensor, Tensor]:
    """The range that holds so many percent of a histogram's values, as many beyond either end.

    Args:
        counts: [bins], over [min_val, max_val], all on the CPU.
    """
    values = counts.double()
    outside = (1.0 - percentile / 100.0) / 2.0 * values.sum()
    width = (max_val.double() - min_val.double()) / values.numel()
    low = min_val.double() + width * _place(values, outside)
    high = max_val.double() - width * _place(values.flip(0), outside)
    return low.float(), high.float()


def _place(values: Tensor, wanted: Tensor) -> Tensor:
    """Where, in bins from the first one, `wanted` values lie before."""
    until = values.cumsum(0)
    index = torch.searchsorted(until, wanted, right=True).clamp(max=until.numel() - 1)
    before = until[index] - values[index]
    return index + (wanted - before) / values[index].clamp(min=1.0)
