"""What is measured of two versions of a tensor, and of its values, batch by batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def first_tensor(output: Any, function: str) -> Tensor:
    """A model's first output.

    Raises:
        TypeError: it is no tensor; names the function that needs one.
    """
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, dict) and output:
        return first_tensor(next(iter(output.values())), function)
    if not isinstance(output, Tensor):
        raise TypeError(f"{function} needs a model that returns tensors: {type(output).__name__}")
    return output


class Deviation:
    """How far values are from those expected: sums over all that was added.

    Attributes:
        signal: sum of squares of what was expected.
        noise: sum of squares of the differences.
        power: sum of squares of the actual values.
        product: sum of expected times actual.
        count: how many pairs of tensors were added.
    """

    def __init__(self) -> None:
        self.signal = self.noise = self.power = self.product = 0.0
        self.count = 0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Adds a tensor and what it should be, of the same shape."""
        expected, actual = expected.double(), actual.double()
        self.signal += float(expected.square().sum())
        self.noise += float((expected - actual).square().sum())
        self.power += float(actual.square().sum())
        self.product += float((expected * actual).sum())
        self.count += 1

    def sums(self) -> list[float]:
        """All sums, for another ``Deviation`` to add."""
        return [self.signal, self.noise, self.power, self.product, self.count]

    def add_sums(
        self, signal: float, noise: float, power: float, product: float, count: float
    ) -> None:
        """Adds what another one's ``sums`` gave."""
        self.signal += signal
        self.noise += noise
        self.power += power
        self.product += product
        self.count += int(count)

    @property
    def sqnr(self) -> float:
        """Signal-to-quantization-noise ratio in dB; NaN if nothing was added."""
        if self.count == 0:
            return float("nan")
        if self.noise == 0:
            return float("inf")
        if self.signal == 0:
            return float("-inf")
        return 10 * math.log10(self.signal / self.noise)

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; NaN if nothing but zeros was added."""
        scale = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / scale if scale > 0 else float("nan")


class ValueCounts:
    """A histogram that grows with its values: where one lies outside, bins are joined in pairs, so
    that no count is lost.

    Attributes:
        counts: of bins of equal width, float64 ``[64]``.
        low: where the first bin begins; NaN before the first value.
        high: where the last one ends.
        minimum: the least finite value.
        maximum: the greatest.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(64, dtype=torch.float64)
        self.low = self.high = self.minimum = self.maximum = float("nan")

    def add(self, values: Tensor) -> None:
        """Counts the finite values of a tensor."""
        values = values.detach().flatten().float()
        values = values[torch.isfinite(values)]
        if values.numel() == 0:
            return
        least, greatest = (float(v) for v in torch.aminmax(values))
        if math.isnan(self.low):
            self.minimum, self.maximum = least, greatest
            # A constant gets bins around it.
            margin = 0.0 if least < greatest else max(abs(least), 1e-6) * 1e-3
            self.low, self.high = least - margin, greatest + margin
        self.minimum, self.maximum = min(self.minimum, least), max(self.maximum, greatest)
        while self.low > least or self.high < greatest:
            self._grow(downwards=self.low > least)
        found = torch.histc(values, len(self.counts), self.low, self.high)
        self.counts += found.cpu().double()

    def filled(self) -> tuple[tuple[float, ...], float, float]:
        """The counts from the first bin that has any to the last one, where that begins and where
        this one ends; no counts before the first value."""
        held = self.counts.nonzero().flatten()
        if len(held) == 0:
            return (), self.low, self.high
        first, last = int(held[0]), int(held[-1])
        width = (self.high - self.low) / len(self.counts)
        counts = tuple(self.counts[first : last + 1].tolist())
        return counts, self.low + first * width, self.low + (last + 1) * width

    def _grow(self, *, downwards: bool) -> None:
        pairs = self.counts.reshape(-1, 2).sum(1)
        empty = torch.zeros_like(pairs)
        width = self.high - self.low
        if downwards:
            self.low -= width
            self.counts = torch.cat((empty, pairs))
        else:
            self.high += width
            self.counts = torch.cat((pairs, empty))
