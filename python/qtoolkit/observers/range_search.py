"""Search of the range that quantizes a histogram with the least squared error."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# NumPy, as these arrays are small: torch's threads cost more to wake than there is to compute
# (0.3 ms against 12 and more for 16 candidates while the other core is busy).
Array = NDArray[np.float64]

# Share of all values by which a step of the search shortens one end of the range.
_STEP = 1e-5
# Candidate ranges whose errors are computed together. Few at first, as most searches end early.
_FIRST_CHUNK = 16
_LARGEST_CHUNK = 128


def l2_range(counts: Tensor, levels: int) -> tuple[int, int]:
    """First and last bin of the range to quantize, found by greedy search.

    1e-5 of the values at a time is cut from the end of the range that gets more bins shorter by
    it, until the squared error of quantizing to `levels` codes rises. It is the search of caffe2's
    NormMinimization and of torch.ao's HistogramObserver, but errors of many candidates are
    computed at once, and the whole range is kept where it is the better one.

    Args:
        counts: int64 [bins], not all zero.
        levels: number of codes that the range is divided into.
    """
    values = counts.cpu().numpy()
    candidates = _shrinking_ranges(np.cumsum(values).tolist())
    occupied = values.nonzero()[0]
    mass = values[occupied].astype(np.float64)
    first_bin = occupied.astype(np.float64)

    def errors_of(ranges: list[tuple[int, int]]) -> list[float]:
        bounds = np.array(ranges, dtype=np.float64)
        return squared_errors(first_bin, mass, bounds[:, :1], bounds[:, 1:], levels).tolist()

    whole = best = (0, values.size - 1)
    # The first cut is not held against the whole range: where a few values lie far out, one cut
    # may raise the error and the next ones lower it.
    lowest = float("inf")
    chunk_size = _FIRST_CHUNK
    rising = False
    while not rising and (chunk := list(islice(candidates, chunk_size))):
        for candidate, error in zip(chunk, errors_of(chunk)):
            rising = error > lowest
            if rising:
                break
            best, lowest = candidate, error
        chunk_size = min(2 * chunk_size, _LARGEST_CHUNK)
    return best if lowest < errors_of([whole])[0] else whole


def _shrinking_ranges(cumulative: list[int]) -> Iterator[tuple[int, int]]:
    """The ranges that the search tries in turn, which do not depend on their errors."""
    total = cumulative[-1]
    start, end = 0, len(cumulative) - 1
    lower, upper = 0.0, 1.0
    while lower < upper:
        next_lower, next_upper = lower + _STEP, upper - _STEP
        left = bisect_left(cumulative, next_lower * total, start, end)
        right = bisect_right(cumulative, next_upper * total, start + 1, end + 1) - 1
        if left == start and right == end:
            # Both stay until the upper end has come down to the last bin's share: all at once.
            steps = int((upper - cumulative[end] / total) / _STEP)
            upper -= max(steps, 1) * _STEP
        elif left - start > end - right:
            lower, start = next_lower, left
            yield start, end
        else:
            upper, end = next_upper, right
            yield start, end


def squared_errors(first_bin: Array, mass: Array, start: Array, end: Array, levels: int) -> Array:
    """Squared error of each candidate range, in units of (bin width)^2.

    Values are taken as uniform in their bin, and quantized to the centre of one of `levels` cells
    of equal width; beyond the range to the outermost centre.

    Args:
        first_bin, mass: position and count of each occupied bin, [n].
        start, end: first and last bin of each candidate, [candidates, 1].
    """
    cell = (end - start + 1) / levels
    begin = first_bin - start
    stop = begin + 1
    cell_of_begin = np.clip(np.floor(begin / cell), 0, levels - 1)
    cell_of_stop = np.clip(np.floor(stop / cell), 0, levels - 1)
    # Three times the integral of the squared distance: to the end of the first cell, over the
    # whole cells between, from the beginning of the last cell. With begin and stop in one cell
    # the middle term is minus one cell, and the sum is right again.
    half_cubed = (cell / 2) ** 3
    distance = begin - (cell_of_begin + 0.5) * cell
    head = half_cubed - distance * distance * distance
    middle = (cell_of_stop - cell_of_begin - 1) * (2 * half_cubed)
    distance = stop - (cell_of_stop + 0.5) * cell
    tail = distance * distance * distance + half_cubed
    return ((head + middle + tail) * mass).sum(axis=1) / 3
