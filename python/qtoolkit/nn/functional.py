"""Float modules that stand for operators written as Python expressions or function calls.

``prepare`` puts them in place of ``a + b``, ``torch.cat``, ``x.mean((2, 3))``, so that every
operator that can be quantized is a module with a name of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Add(nn.Module):
    """``a + b`` of two tensors.

    Args:
        broadcast: True if their shapes differ.
    """

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "add"

    def __init__(self, *, broadcast: bool = False) -> None:
        super().__init__()
        self.broadcast = broadcast

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Mul(nn.Module):
    """``a * b`` of two tensors."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "mul"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b


class Matmul(nn.Module):
    """``a @ b`` of two activations."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "matmul"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


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


class Mean(nn.Module):
    """``x.mean(dims, keepdim)``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "mean"

    def __init__(self, dims: list[int], keepdim: bool) -> None:
        super().__init__()
        self.dims = dims
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)


class Sum(Mean):
    """``x.sum(dims, keepdim)``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "sum"

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, self.keepdim)


class Pad(nn.Module):
    """``functional.pad(x, pad, mode)``, with 0 where the mode is ``"constant"``."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, x: Tensor, pad: list[int]) -> Tensor:
        return functional.pad(x, pad, self.mode)


class Upsample2d(nn.Module):
    """``functional.interpolate`` of ``[N, C, H, W]``: by factors, or to a size given at the call.

    Args:
        mode: ``"nearest"``, ``"nearest-exact"`` or ``"bilinear"``.
        scale_factors: for height and width; None where the size is given.
        align_corners: of mode ``"bilinear"``.
        recompute: positions follow from the sizes, not from the factors.
    """

    def __init__(
        self,
        mode: str,
        scale_factors: list[float] | None,
        align_corners: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.mode = mode
        self.scale_factors = scale_factors
        self.align_corners = align_corners
        self.recompute = recompute

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        return functional.interpolate(
            x,
            size,
            self.scale_factors,
            self.mode,
            self.align_corners if self.mode == "bilinear" else None,
            True if self.recompute else None,
        )


class UpsampleNearest2d(Upsample2d):
    """``Upsample2d`` in mode ``"nearest"`` or ``"nearest-exact"``, which only moves values."""


class UpsampleBilinear2d(Upsample2d):
    """``Upsample2d`` in mode ``"bilinear"``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "interpolate"


class WithNumber(nn.Module):
    """``x + 3``, ``3 - x``, ``x * 0.5``, ``x / 6``: a tensor and a number.

    Args:
        operation: ``"add"``, ``"sub"``, ``"mul"`` or ``"div"``; the name by which
            ``QConfigMapping.set_module_type`` knows it.
        number: the number.
        reverse: True for ``number - x``.
    """

    def __init__(self, operation: str, number: float, *, reverse: bool = False) -> None:
        super().__init__()
        self.op_name = self.operation = operation
        self.number = number
        self.reverse = reverse

    def forward(self, x: Tensor) -> Tensor:
        if self.op_name == "add":
            return x + self.number
        if self.op_name == "mul":
            return x * self.number
        if self.op_name == "div":
            return x / self.number
        return self.number - x if self.reverse else x - self.number


class Abs(nn.Module):
    """``torch.abs(x)``."""

    #: The name by which ``QConfigMapping.set_module_type`` knows it.
    op_name = "abs"

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


class StochasticDepth(nn.Module):
    """``torchvision.ops.stochastic_depth``: in training whole samples become 0 with probability p.

    Args:
        p: the probability.
        mode: ``"row"`` draws for each sample, ``"batch"`` once for all.
    """

    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p = p
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        survival = 1.0 - self.p
        size = [x.shape[0] if self.mode == "row" else 1] + [1] * (x.dim() - 1)
        kept = torch.empty(size, dtype=x.dtype, device=x.device).bernoulli_(survival)
        return x * (kept / survival if survival > 0.0 else kept)
