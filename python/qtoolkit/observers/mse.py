"""The scale with the least squared error over all data."""

from __future__ import annotations

from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.histogram import HistogramObserver
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("mse")
class MSEObserver(HistogramObserver):
    """Keeps a histogram and chooses the scale and zero point that quantize it with least error.

    Unlike `HistogramObserver`'s greedy search, which needs no codes, it compares the squared errors
    of the very scales and zero points (`qtoolkit.ops.range_mse`), so it suits symmetric codes and
    few bits better.
    """

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="mse")

    def search(self, counts: Tensor, min_val: Tensor, max_val: Tensor) -> tuple[Tensor, Tensor]:
        """The range with the least squared error."""
        spec = self.spec
        return ops.range_mse(
            counts, min_val, max_val, spec.quant_min, spec.quant_max, spec.symmetric
        )
