"""Statistics of float tensors for observers. `qtoolkit.ops` says what all share."""

import torch
from torch import Tensor


def min_max(x: Tensor) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of a float tensor, 0-dim float32; both NaN if x holds a NaN.

    On CPU, these operators read x where it is, whatever its strides, and need memory for the
    results only. Raises ValueError if x is empty.
    """
    return torch.ops.qtoolkit.min_max(x)


def min_max_per_channel(x: Tensor, ch_axis: int) -> tuple[Tensor, Tensor]:
    """Minimum and maximum along every other dimension, float32 [x.size(ch_axis)]; see min_max."""
    return torch.ops.qtoolkit.min_max_per_channel(x, ch_axis)


def min_max_per_group(x: Tensor, group_size: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Minimum and maximum of each `group_size` neighbours along an axis; see min_max.

    Returns:
        float32 tensors of x's shape, but with ceil(x.size(axis) / group_size) along the axis; the
        last group may be short.
    """
    return torch.ops.qtoolkit.min_max_per_group(x, group_size, axis)


def histogram(x: Tensor, bins: int, lower: float, upper: float) -> Tensor:
    """Counts of x in `bins` equal bins over [lower, upper], int64 [bins]; see min_max.

    Values outside and NaN are not counted. Raises ValueError if x is empty.
    """
    return torch.ops.qtoolkit.histogram(x, bins, lower, upper)


def histogram_min_max(
    x: Tensor, bins: int, lower: float, upper: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`histogram` and `min_max` in one pass: counts, minimum, maximum."""
    return torch.ops.qtoolkit.histogram_min_max(x, bins, lower, upper)


def rebin_histogram(
    counts: Tensor, old_lower: float, old_upper: float, lower: float, upper: float
) -> Tensor:
    """The counts of [old_lower, old_upper] in as many bins over [lower, upper], which includes it.

    Each bin is cut into 16 parts, which move whole: no count is lost. Runs on the CPU.

    Args:
        counts: int64 [bins]; below 2^59.

    Raises:
        ValueError: the new range does not include the old one.
    """
    return torch.ops.qtoolkit.rebin_histogram(counts, old_lower, old_upper, lower, upper)


def range_l2(
    counts: Tensor, min_val: Tensor, max_val: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The part of a histogram's range that `levels` codes represent with the least squared error.

    1e-5 of the values at a time is cut from the end that gets more bins shorter by it, until the
    error rises: the search of caffe2's NormMinimization and torch.ao's HistogramObserver, but that
    the whole range is kept where it is the better one. Runs on the CPU.

    Args:
        counts: int64 [bins], not all zero, in bins of equal width over [min_val, max_val].
        min_val, max_val: float32, one element each.
        levels: number of codes, from 2 to 2^16.

    Returns:
        The least and the greatest value of the range, 0-dim float32.
    """
    return torch.ops.qtoolkit.range_l2(counts, min_val, max_val, levels)


def range_kl(
    counts: Tensor, min_val: Tensor, max_val: Tensor, levels: int
) -> tuple[Tensor, Tensor]:
    """The range around 0 that changes a histogram the least in Kullback-Leibler divergence.

    Arguments and results as in `range_l2`. Zero is a code of every range, so the bin that holds it
    counts as its greater neighbour at most. Source: Migacz, "8-bit inference with TensorRT", 2017.
    """
    return torch.ops.qtoolkit.range_kl(counts, min_val, max_val, levels)


def range_mse(
    counts: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The range of a histogram whose scale and zero point quantize it with the least squared error.

    Each end is tried at every hundredth of its distance from 0, for affine codes both ends at all
    pairs of them; values lie in the middle of their bin, and at 0 in the bin that holds 0.
    Histogram and results as in `range_l2`.
    """
    return torch.ops.qtoolkit.range_mse(counts, min_val, max_val, quant_min, quant_max, symmetric)


def range_mse_per_channel(
    x: Tensor, ch_axis: int, quant_min: int, quant_max: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """The range of each channel that quantizes it with the least squared error.

    Tried are hundredths of the channel's own range, both ends at once. A channel that holds NaN or
    infinity has the range NaN. Runs on the CPU.

    Returns:
        Least and greatest values, float32 [x.size(ch_axis)].
    """
    return torch.ops.qtoolkit.range_mse_per_channel(x, ch_axis, quant_min, quant_max, symmetric)
