"""Round to nearest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from qtoolkit.weight_only.grid import Grid, code_matrix
from qtoolkit.weight_only.method import Inputs, Result, WeightMethod, register_weight_method


@register_weight_method("rtn")
@dataclass(frozen=True)
class RoundToNearest(WeightMethod):
    """Every weight becomes the nearest number of its group.

    The group's range is that of least squared error among shares of the whole range, with the scale
    of least squares for its codes: Banner et al., "Post-Training 4-Bit Quantization of
    Convolutional Networks for Rapid-Deployment" (2019), by search instead of analysis.

    Args:
        search: else the range is the whole one.
    """

    search: bool = True

    def quantize(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs | None
    ) -> list[Result]:
        return [Result(code_matrix(grid, weight, search=self.search)) for weight in weights]
