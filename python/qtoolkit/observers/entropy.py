"""The range that changes the distribution least, in Kullback-Leibler divergence."""

from __future__ import annotations

from torch import Tensor

from qtoolkit import ops
from qtoolkit.formats import get_format
from qtoolkit.observers.histogram import HistogramObserver
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("entropy")
class EntropyObserver(HistogramObserver):
    """Keeps a histogram and chooses the range around 0 with the least divergence from it.

    The search is `qtoolkit.ops.range_kl`, that of TensorRT's entropy calibration: it takes much of
    a long tail off. Source: Migacz, "8-bit inference with TensorRT", 2017.
    """

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="entropy")

    def search(self, counts: Tensor, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The range with the least divergence."""
        return ops.range_kl(counts, min_val, max_val, 2 ** get_format(self.spec.format).bits)
