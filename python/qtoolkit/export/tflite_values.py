"""Values of a TFLite graph: their shapes, the order in which they are stored, and their codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from qtoolkit import ops
from qtoolkit.export.tflite_flatbuffer import Quantization

NHWC = (0, 2, 3, 1)
LOWEST, HIGHEST = -128, 127
#: The code of a factor of one.
ONE = 127


class FreeSize(int):
    """A size that depends on the batch, with its value for the example inputs."""


class FixedBatchError(Exception):
    """An operator needs to know the batch; the message says which."""


def is_unit(size: int) -> bool:
    """Whether a dimension has one element, whatever the batch is."""
    return size == 1 and not isinstance(size, FreeSize)


@dataclass(frozen=True)
class Value:
    """A value of the graph in the file.

    Attributes:
        shape: its sizes in PyTorch.
        order: dimension i of what is stored is dimension ``order[i]`` in PyTorch.
        tensor: in the file; -1 for a constant, which gets there when it is used.
        quantization: of codes, None in float.
        array: a constant, in PyTorch's order.
        name: of a constant.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    tensor: int = -1
    quantization: Quantization | None = None
    array: NDArray[Any] | None = None
    name: str = ""

    @property
    def rank(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape as it is stored."""
        return tuple(self.shape[dim] for dim in self.order)

    def axis(self, dim: int) -> int:
        """Where a dimension of PyTorch's is stored."""
        return self.order.index(dim % self.rank)


@dataclass(frozen=True)
class Weight:
    """Constant codes of a layer, with scales along a dimension."""

    codes: Tensor
    scale: Tensor
    axis: int | None

    def real(self) -> Tensor:
        """The numbers."""
        return ops.qdq_dequantize(self.codes, self.scale, None, self.axis)

    def scales(self, channels: int) -> tuple[float, ...]:
        """A scale for each channel."""
        return tuple(self.scale.reshape(-1).expand(channels).tolist())


@dataclass(frozen=True)
class Out:
    """What an operator writes: codes under a name, within bounds; or a float."""

    quantization: Quantization | None = None
    name: str = ""
    low: int = LOWEST
    high: int = HIGHEST

    def code(self, real: float) -> int:
        """The code of a number, at most the bounds."""
        assert self.quantization is not None
        inverse = np.float32(1) / np.float32(self.quantization.scale[0])
        code = float(np.rint(np.float32(real) * inverse)) + self.quantization.zero_point
        return int(min(max(code, self.low), self.high))

    def clipped(self, low: float | None, high: float | None) -> Out:
        """Within bounds of real numbers, too. Rounding is monotonous, so codes may be clipped in
        place of what they are made from."""
        out = self
        if low is not None:
            out = replace(out, low=out.code(low))
        if high is not None:
            out = replace(out, high=out.code(high))
        return out

    @property
    def activation(self) -> str | None:
        """The activation function of an operator that gives these bounds; None if none does."""
        if self.quantization is None or (self.low, self.high) == (LOWEST, HIGHEST):
            return "NONE"
        free = replace(self, low=LOWEST, high=HIGHEST)
        if self.low != free.code(0.0):
            return None
        if self.high == HIGHEST:
            return "RELU"
        return "RELU6" if self.high == free.code(6.0) else None


FLOAT = Out()


def groups_of(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of equally many elements into as many parts as have equally many each."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        dims, results = [], []
        if i < len(old) and j < len(new):
            a, b = int(old[i]), int(new[j])
            dims, results, i, j = [i], [j], i + 1, j + 1
            while a != b:
                if a < b:
                    a, dims, i = a * int(old[i]), [*dims, i], i + 1
                else:
                    b, results, j = b * int(new[j]), [*results, j], j + 1
        elif groups:  # sizes of one at the end
            groups[-1][0].extend(range(i, len(old)))
            groups[-1][1].extend(range(j, len(new)))
            break
        else:
            dims, results = list(range(i, len(old))), list(range(j, len(new)))
            i, j = len(old), len(new)
        groups.append((dims, results))
    return groups
