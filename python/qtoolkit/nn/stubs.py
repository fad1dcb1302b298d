"""Marks of a float model: where quantized parts begin and end, and operators as modules."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Stub(nn.Module):
    """A border between float and quantized parts; returns its input. Capture keeps its call."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class QuantStub(Stub):
    """Where values become codes. Not needed: ``prepare`` finds such places itself.

    Args:
        qconfig: how this value is quantized, for ``qtoolkit.quantization``; the model's if None.
    """

    def __init__(self, qconfig: object = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig


class DeQuantStub(Stub):
    """Where codes become float values again; functions after it are computed in float.

    Args:
        qconfig: accepted, without effect.
    """

    def __init__(self, qconfig: object = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig


class FloatFunctional(nn.Module):
    """Operators as methods of a module. Not needed: operators of Python are quantized as well."""

    def forward(self, x: Tensor) -> Tensor:
        """Raises RuntimeError: its methods are what is called."""
        raise RuntimeError("FloatFunctional is called by its methods, such as .add(x, y)")

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """``x + y``."""
        return torch.add(x, y)

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x + y`` with a number."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """``x * y``."""
        return torch.mul(x, y)

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """``x * y`` with a number."""
        return torch.mul(x, y)

    def cat(self, xs: list[Tensor], dim: int = 0) -> Tensor:
        """``torch.cat(xs, dim)``."""
        return torch.cat(xs, dim)

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """``relu(x + y)``."""
        return functional.relu(torch.add(x, y))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """``x @ y``."""
        return torch.matmul(x, y)
