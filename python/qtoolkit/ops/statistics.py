"""Statistics of float tensors for observers. `qtoolkit.ops` says what all share."""

import torch
from torch import Tensor


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a float tensor, 0-dim float32; both NaN if x holds a NaN.

    Raises ValueError if x is empty.
    """
    return torch.ops.qtoolkit.min_max(x)


def min_max_per_channel(x: Tensor, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along every other dimension, float32 [x.size(ch_axis)]; see min_max."""
    return torch.ops.qtoolkit.min_max_per_channel(x, ch_axis)


def histogram(x: Tensor, bins: int, lower: float, upper: float) -> Tensor:
    """Counts of x in `bins` equal bins over [lower, upper], int64 [bins].

    Values outside and NaN are not counted. Raises ValueError if x is empty.
    """
    return torch.ops.qtoolkit.histogram(x, bins, lower, upper)
