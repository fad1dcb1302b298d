"""Float modules that stand for operators written as Python expressions or function calls.

``prepare`` puts them in place of ``a + b``, ``torch.cat``, ``x.mean((2, 3))``, so that every
operator that can be quantized is a module with a name of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Add(nn.Module):
    """``a + b`` of two tensors of one shape."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "add"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Cat(nn.Module):
    """``torch.cat(xs, dim)``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "cat"

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.dim)


class GlobalAvgPool2d(nn.Module):
    """``x.mean((2, 3), keepdim)`` of ``[N, C, H, W]``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "mean"

    def __init__(self, keepdim: bool) -> None:
        super().__init__()
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), self.keepdim)
