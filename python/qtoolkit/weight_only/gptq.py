"""GPTQ: each column's rounding error is taken up by the columns that are still to be rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit.weight_only.grid import Coded, Grid, code_matrix
from qtoolkit.weight_only.method import Inputs, Result, WeightMethod, register_weight_method

# By how much damping grows where a Hessian cannot be factored, and how often.
_GROWTH, _TRIES = 10.0, 8


@register_weight_method("gptq")
@dataclass(frozen=True)
class Gptq(WeightMethod):
    """Rounds the columns of a weight one by one; what that changes in the output is undone, in the
    least-squares sense over the calibration data, by the columns that follow.

    Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
    Transformers" (2022), algorithm 1, with the order by activation and the static groups of its
    code: the ranges of all groups are chosen first, by the error that the inputs weigh, so that
    groups stay neighbours in any order.

    Args:
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal; more
            where it is singular nevertheless.
        act_order: columns with the largest inputs first, else from the left.
        block: columns after which the rest of the weight is updated, which changes no result but
            for rounding.
        search: as in ``RoundToNearest``.
    """

    damping: float = 0.01
    act_order: bool = True
    block: int = 128
    search: bool = True

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(f"gptq: damping must be above 0, got {self.damping}")
        if self.block < 1:
            raise ValueError(f"gptq: block must be at least 1, got {self.block}")

    def quantize(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs | None
    ) -> list[Result]:
        if inputs is None:
            raise ValueError("gptq needs to know the inputs of a layer: give data")
        diagonal = inputs.hessian.diagonal()
        order = torch.arange(diagonal.numel(), device=diagonal.device)
        if self.act_order:
            order = torch.argsort(diagonal, descending=True, stable=True)
        factor = inverse_factor(inputs.hessian[order][:, order], self.damping).float()
        return [Result(self._one(weight, grid, diagonal, order, factor)) for weight in weights]

    def _one(
        self, weight: Tensor, grid: Grid, diagonal: Tensor, order: Tensor, factor: Tensor
    ) -> Coded:
        coded = code_matrix(grid, weight, _importance(diagonal), search=self.search)
        groups = order // grid.group_size
        scale = coded.scale[:, groups]
        zero_point = None if coded.zero_point is None else coded.zero_point[:, groups]
        rest = weight[:, order]
        codes = torch.empty_like(coded.codes)
        columns = rest.size(1)
        for begin in range(0, columns, self.block):
            end = min(begin + self.block, columns)
            errors = torch.empty(rest.size(0), end - begin, device=rest.device)
            for j in range(begin, end):
                zero = None if zero_point is None else zero_point[:, j : j + 1]
                code = grid.codes(rest[:, j : j + 1], scale[:, j : j + 1], zero)
                value = grid.levels(code, zero) * scale[:, j : j + 1]
                codes[:, j] = code[:, 0].to(torch.uint8)
                error = (rest[:, j : j + 1] - value) / factor[j, j]
                rest[:, j + 1 : end] -= error * factor[j, j + 1 : end]
                errors[:, j - begin] = error[:, 0]
            rest[:, end:] -= errors @ factor[begin:end, end:]
        coded.codes[:, order] = codes
        return coded


def _importance(diagonal: Tensor) -> Tensor:
    """Columns that are never anything but 0 count a little, so that their range is one."""
    return diagonal + diagonal.mean() * 1e-4 + torch.finfo(torch.float32).tiny


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper triangular U with ``U^T U = (hessian + d I)^-1``, float64 ``[K, K]``.

    With rows and columns reversed, the Cholesky factor of the Hessian is U's inverse, so that
    neither the Hessian's inverse nor a factor of it is computed, which would square what rounding
    loses. d is ``damping`` times the mean of the diagonal, and grows until the factor exists.

    Raises:
        ValueError: there is none, as the Hessian is not finite.
    """
    h = hessian.double()
    mean = h.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    for i in range(_TRIES):
        damped = h + torch.eye(h.size(0), dtype=h.dtype, device=h.device) * (
            mean * damping * _GROWTH**i
        )
        lower, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0 and bool(torch.isfinite(lower).all()):
            upper = lower.flip(0, 1)
            one = torch.eye(h.size(0), dtype=h.dtype, device=h.device)
            return torch.linalg.solve_triangular(upper, one, upper=True)
    raise ValueError("the inputs of a layer have no finite second moments")
