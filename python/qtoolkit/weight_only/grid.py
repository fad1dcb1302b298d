"""The numbers that a group of weights may have: codes, a scale and perhaps a zero point."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit.formats import NumberFormat, get_format
from qtoolkit.nn.weight_only import PackedWeight
from qtoolkit.ops import pack_codes

#: Short names of formats.
ALIASES = {"fp8": "fp8_e4m3"}
#: Scales are at least this; a group whose weights are all smaller becomes zeros.
_SMALLEST = 2.0**-100
#: Scale and zero point.
Range = tuple[Tensor, Tensor | None]
# Elements that are worked on together: few enough to stay in a core's cache.
_CHUNK = 1 << 17

# Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_UNKNOWN = (
    "weights have no format {}: use int8, int6, int5, int4, int3, int2, ternary, binary, nf4, fp8, "
    "mxfp4, nvfp4, or fp16 and bf16 to cast"
)
# Shares of a group's range that a search tries, by bits: what few codes gain by clipping.
_SHARES = {8: 0.95, 6: 0.85, 5: 0.8, 4: 0.65, 3: 0.5, 2: 0.25, 1: 0.95}
_STEP = 0.05


@dataclass(frozen=True)
class Grid(ABC):
    """How groups of weights of a format are coded.

    Weights are ``[groups, group_size]``, scales and zero points ``[groups, 1]``. All is float32.

    Attributes:
        format: its row in the table of formats.
        bits: of a code.
        group_size: weights that share a scale.
    """

    format: NumberFormat
    bits: int
    group_size: int

    def table(self) -> Tensor | None:
        """The numbers of a format that has a list, ``[2^bits]``."""
        return None

    @abstractmethod
    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        """Scales and zero points for shares of the ranges [low, high], low <= 0 <= high."""

    @abstractmethod
    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The codes of the nearest numbers."""

    @abstractmethod
    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        """The numbers of codes, without their scale."""

    def snap(self, scale: Tensor, of_tensor: float) -> Tensor:
        """The scales that the format can hold."""
        return scale.clamp(min=_SMALLEST)

    def refits(self, search: bool) -> bool:
        """Whether the scale of least squares for chosen codes is tried too."""
        return search

    def shares(self) -> list[float]:
        """Shares of the range that a search tries, 1 first."""
        least = _SHARES[self.bits]
        step = min(_STEP, (1 - least) / 5)
        return [1 - step * i for i in range(int((1 - least) / step + 1.5))]


@dataclass(frozen=True)
class IntegerGrid(Grid):
    """Equal steps: int2 to int8 and ternary.

    Attributes:
        symmetric: without zero points.
    """

    symmetric: bool = True

    @property
    def middle(self) -> int:
        """The code of 0 in a symmetric group."""
        return 1 << (self.bits - 1)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and the highest code."""
        if self.format.kind == "ternary":
            return self.middle - 1, self.middle + 1
        return 0, (1 << self.bits) - 1

    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        lowest, highest = self.limits
        for share in shares:
            if self.symmetric:
                largest = torch.maximum(-low, high) * share
                yield largest / (highest - self.middle), None
            else:
                scale = ((high - low) * (share / (highest - lowest))).clamp(min=_SMALLEST)
                yield scale, (low * -share / scale).round_().clamp_(lowest, highest)

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        zero = self.middle if zero_point is None else zero_point
        return (weight * (1 / scale)).round_().add_(zero).clamp_(*self.limits)

    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes - (self.middle if zero_point is None else zero_point)


@dataclass(frozen=True)
class BinaryGrid(Grid):
    """+scale and -scale."""

    def table(self) -> Tensor:
        return torch.tensor([-1.0, 1.0])

    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        # The best scale is the mean of |w|, which refitting finds from any.
        yield torch.maximum(-low, high) / 2, None

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        return (weight >= 0).float()

    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes * 2 - 1

    def refits(self, search: bool) -> bool:
        return True


@dataclass(frozen=True)
class Nf4Grid(Grid):
    """Quantiles of the normal distribution."""

    def table(self) -> Tensor:
        return torch.tensor(_NF4)

    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        for share in shares:
            yield torch.maximum(-low, high) * share, None

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        table = self.table().to(weight.device)
        return torch.bucketize(weight * (1 / scale), (table[1:] + table[:-1]) / 2).float()

    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.table().to(codes.device)[codes.int()]


@dataclass(frozen=True)
class FloatGrid(Grid):
    """fp8, under float32 scales."""

    def table(self) -> Tensor:
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()

    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        yield torch.maximum(-low, high) / self.format.max_value, None

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        largest = self.format.max_value
        small = (weight * (1 / scale)).clamp_(-largest, largest).to(torch.float8_e4m3fn)
        return small.view(torch.uint8).float()

    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()

    def shares(self) -> list[float]:
        return [1.0]


@dataclass(frozen=True)
class BlockFloatGrid(Grid):
    """mxfp4 and nvfp4: 4-bit floats under scales of a format of their own."""

    def table(self) -> Tensor:
        return torch.tensor([*_E2M1, *(-x for x in _E2M1)])

    def candidates(self, low: Tensor, high: Tensor, shares: list[float]) -> Iterator[Range]:
        largest = torch.maximum(-low, high)
        if self.format.scale_format == "e8m0":
            # The OCP specification's, which may clip the largest weight, and the one above.
            power = largest.clamp(min=_SMALLEST).log2().floor() - 2
            for i in range(len(shares[:2])):
                yield (power + i).exp2(), None
            return
        for share in shares:
            yield largest * (share / self.format.max_value), None

    def codes(self, weight: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        numbers = torch.tensor(_E2M1, device=weight.device)
        # Half goes to the even mantissa: up to every second number, down to the others.
        ends = (numbers[1:] + numbers[:-1]) / 2
        ends[::2] = torch.nextafter(ends[::2], torch.full_like(ends[::2], torch.inf))
        x = weight * (1 / scale)
        return torch.bucketize(x.abs(), ends, right=True).float() + (x < 0) * 8

    def levels(self, codes: Tensor, zero_point: Tensor | None) -> Tensor:
        return self.table().to(codes.device)[codes.int()]

    def snap(self, scale: Tensor, of_tensor: float) -> Tensor:
        if self.format.scale_format == "e8m0":
            return scale
        step = max(of_tensor / (448 * self.format.max_value), _SMALLEST)
        return (scale / step).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float() * step

    def refits(self, search: bool) -> bool:
        return False


def make_grid(format: str, group_size: int | None, symmetric: bool | None = None) -> Grid:
    """The grid of a format.

    Args:
        format: a name of the table of formats, or of ``ALIASES``.
        group_size: None: that of the format, or whole rows (then it is 0 until a weight is known).
        symmetric: without zero points; None: for integers of 5 bits and more.

    Raises:
        ValueError: the format is unknown or has no place in weights of codes; the group is none.
    """
    try:
        row = get_format(ALIASES.get(format, format))
    except ValueError:
        raise ValueError(_UNKNOWN.format(repr(format))) from None
    if row.kind == "block_float" and group_size not in (None, row.block_size):
        raise ValueError(f"{row.name} has groups of {row.block_size}, not {group_size}")
    size = row.block_size or group_size or 0
    if symmetric is False and (row.kind != "integer" or not row.signed):
        raise ValueError(f"{format} has no zero points: leave symmetric out")
    if row.kind == "integer" and row.signed:
        return IntegerGrid(row, row.bits, size, row.bits > 4 if symmetric is None else symmetric)
    if row.kind == "ternary":
        return IntegerGrid(row, 2, size)
    if row.kind == "binary":
        return BinaryGrid(row, 1, size)
    if row.name == "nf4":
        return Nf4Grid(row, 4, size)
    if row.name == "fp8_e4m3":
        return FloatGrid(row, 8, size)
    if row.name in ("mxfp4", "nvfp4"):
        return BlockFloatGrid(row, 4, size)
    raise ValueError(_UNKNOWN.format(repr(format)))


def grouped(matrix: Tensor, group_size: int) -> Tensor:
    """``[N, K]`` as ``[N * groups, group_size]``; a short last group ends with zeros."""
    padded = functional.pad(matrix, (0, -matrix.size(1) % group_size))
    return padded.reshape(-1, group_size)


def choose_range(
    grid: Grid,
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    search: bool = True,
    of_tensor: float = 0.0,
) -> Range:
    """Scales and zero points of groups, float32 ``[groups, 1]``.

    Args:
        weight: float32 ``[groups, group_size]``.
        importance: what a squared error of each weight counts, of the same shape or None for 1.
        search: try shares of the range, each with the scale of least squares for its codes; else
            the whole range is used.
        of_tensor: the largest magnitude of the whole tensor, which nvfp4 needs.
    """
    low = weight.amin(1, keepdim=True).clamp_(max=0)
    high = weight.amax(1, keepdim=True).clamp_(min=0)
    shares = grid.shares() if search else [1.0]
    if isinstance(grid, BlockFloatGrid):
        return _least_error(grid, weight, importance, low, high, shares, of_tensor)
    # A power of two for each group, so that squares of huge and tiny weights are numbers.
    unit = torch.maximum(-low, high).clamp(min=_SMALLEST).log2().floor().exp2()
    scale, zero_point = _least_error(
        grid, weight / unit, importance, low / unit, high / unit, shares, of_tensor
    )
    return (scale * unit).clamp(min=_SMALLEST), zero_point


def _least_error(
    grid: Grid,
    weight: Tensor,
    importance: Tensor | None,
    low: Tensor,
    high: Tensor,
    shares: list[float],
    of_tensor: float,
) -> Range:
    found = [
        (grid.snap(wide, of_tensor), zero) for wide, zero in grid.candidates(low, high, shares)
    ]
    refits = 2 if grid.refits(len(shares) > 1) else 0
    best_scale, best_zero = found[0]
    if len(found) + refits == 1:
        return best_scale, best_zero
    least = torch.full_like(best_scale, torch.inf)
    for i in range(len(found) + refits):
        if i < len(found):
            scale, zero_point = found[i]
        else:
            scale = _least_squares(grid, weight, importance, best_scale, best_zero)
            zero_point = best_zero
        levels = grid.levels(grid.codes(weight, scale, zero_point), zero_point)
        error = (levels * scale).sub_(weight).square_()
        if importance is not None:
            error *= importance
        total = error.sum(1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        best_scale = torch.where(better, scale, best_scale)
        if zero_point is not None and best_zero is not None:
            best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def _least_squares(
    grid: Grid,
    weight: Tensor,
    importance: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
) -> Tensor:
    """The scale of least squared error for the codes that a scale gives."""
    levels = grid.levels(grid.codes(weight, scale, zero_point), zero_point)
    weighted = levels if importance is None else levels * importance
    power = (weighted * levels).sum(1, keepdim=True)
    fitted = (weighted * weight).sum(1, keepdim=True) / power
    return torch.where(fitted > 0, fitted, scale)


@dataclass
class Coded:
    """A matrix ``[N, K]`` whose groups have scales, and perhaps codes.

    Attributes:
        grid: what the numbers are.
        scale, zero_point: float32 ``[N, groups]``; zero_point may be None.
        codes: uint8 ``[N, K]``.
    """

    grid: Grid
    scale: Tensor
    zero_point: Tensor | None
    codes: Tensor

    def dequantized(self) -> Tensor:
        """The values, float32 ``[N, K]``."""
        return self.packed().dequantized()

    def packed(self) -> PackedWeight:
        """The codes packed."""
        return PackedWeight(
            self.grid.format.name,
            self.grid.bits,
            self.grid.group_size,
            self.codes.size(1),
            pack_codes(self.codes, self.grid.bits),
            self.scale,
            None if self.zero_point is None else self.zero_point.to(torch.uint8),
            _table_of(self.grid, self.codes.device),
        )


def _table_of(grid: Grid, device: torch.device) -> Tensor | None:
    table = grid.table()
    return None if table is None else table.to(device)


def code_matrix(
    grid: Grid,
    matrix: Tensor,
    importance: Tensor | None = None,
    *,
    search: bool = True,
    of_tensor: float | None = None,
) -> Coded:
    """Rounds a matrix to the nearest numbers, in ranges that ``choose_range`` finds.

    Args:
        matrix: ``[N, K]``, any float dtype, finite.
        importance: float32 ``[K]``, what a squared error in each column counts, or None for 1.
        of_tensor: as in ``choose_range``, where the matrix is a part of the tensor.
    """
    rows, columns = matrix.shape
    size = grid.group_size
    groups = -(-columns // size)
    scale = torch.empty(rows, groups, device=matrix.device)
    zero_point: Tensor | None = None
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=matrix.device)
    if of_tensor is None:
        of_tensor = float(matrix.abs().max()) if isinstance(grid, BlockFloatGrid) else 0.0
    weights = None if importance is None else grouped(importance[None].float(), size)
    step = max(1, _CHUNK // max(columns, 1))
    for begin in range(0, rows, step):
        part = grouped(matrix[begin : begin + step].float(), size)
        count = part.size(0) // groups
        each = None if weights is None else weights.repeat(count, 1)
        if each is None and columns % size:
            each = grouped(torch.ones(1, columns, device=matrix.device), size).repeat(count, 1)
        ranges = choose_range(grid, part, each, search=search, of_tensor=of_tensor)
        chosen = grid.codes(part, *ranges).to(torch.uint8).reshape(count, -1)
        codes[begin : begin + count] = chosen[:, :columns]
        scale[begin : begin + count] = ranges[0].reshape(count, groups)
        if ranges[1] is not None:
            if zero_point is None:
                zero_point = torch.empty_like(scale)
            zero_point[begin : begin + count] = ranges[1].reshape(count, groups)
    return Coded(grid, scale, zero_point, codes)
