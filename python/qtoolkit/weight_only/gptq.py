"""GPTQ: each column's rounding error is taken up by the columns that are still to be rounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit.weight_only.fit import fit_scales
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
    Transformers" (2022), algorithm 1, with the order by activation of its code within groups and
    among them, so that groups stay neighbours: a group's range is chosen, by the error that the
    inputs weigh, when its first column is reached and the columns before have left it their errors.
    For the codes in the end, ``fit_scales`` finds the scales of least output error.

    Args:
        damping: share of the mean of the Hessian's diagonal that is added to the diagonal; more
            where it is singular nevertheless.
        act_order: groups, and columns within them, with the largest inputs first, else from the
            left.
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
        order = self._order(inputs.hessian.diagonal(), grid.group_size)
        factor = inverse_factor(inputs.hessian[order][:, order], self.damping).float()
        found = []
        for weight in weights:
            coded = self._one(weight, grid, inputs.hessian.diagonal(), order, factor)
            fit_scales(coded, weight, inputs.hessian)
            found.append(Result(coded))
        return found

    def _order(self, diagonal: Tensor, group_size: int) -> Tensor:
        """Columns in the order in which they are rounded."""
        order = torch.arange(diagonal.numel(), device=diagonal.device)
        if not self.act_order:
            return order
        means = torch.stack([diagonal[part].mean() for part in order.split(group_size)])
        # By the column first, then by its group, each with the largest inputs first.
        order = torch.argsort(diagonal, descending=True, stable=True)
        rank = torch.argsort(torch.argsort(means, descending=True, stable=True))
        return order[torch.argsort(rank[order // group_size], stable=True)]

    def _one(
        self, weight: Tensor, grid: Grid, diagonal: Tensor, order: Tensor, factor: Tensor
    ) -> Coded:
        importance = _importance(diagonal)
        coded = code_matrix(grid, weight, importance, search=False)  # the groups fill it
        largest = float(weight.abs().max())
        rest = weight[:, order]
        groups = order // grid.group_size
        begin = 0
        for group in groups.unique_consecutive().tolist():
            columns = order[groups == group]
            end = begin + columns.numel()
            # What the columns before have left to these is in their range.
            one = replace(grid, group_size=columns.numel())
            chosen = code_matrix(
                one, rest[:, begin:end], importance[columns], search=self.search, of_tensor=largest
            )
            coded.scale[:, group] = chosen.scale[:, 0]
            if coded.zero_point is not None and chosen.zero_point is not None:
                coded.zero_point[:, group] = chosen.zero_point[:, 0]
            codes = self._round(rest, one, chosen, factor, begin, end)
            coded.codes[:, columns] = codes
            begin = end
        return coded

    def _round(
        self, rest: Tensor, grid: Grid, ranges: Coded, factor: Tensor, begin: int, end: int
    ) -> Tensor:
        """Codes uint8 ``[N, end - begin]`` of the columns of a group; the columns of ``rest`` that
        follow take up the error."""
        scale, zero = ranges.scale, ranges.zero_point
        codes = torch.empty_like(ranges.codes)
        for first in range(begin, end, self.block):
            last = min(first + self.block, end)
            errors = torch.empty(rest.size(0), last - first, device=rest.device)
            for j in range(first, last):
                code = grid.codes(rest[:, j : j + 1], scale, zero)
                value = grid.levels(code, zero) * scale
                codes[:, j - begin] = code[:, 0].to(torch.uint8)
                error = (rest[:, j : j + 1] - value) / factor[j, j]
                rest[:, j + 1 : last] -= error * factor[j, j + 1 : last]
                errors[:, j - first] = error[:, 0]
            rest[:, last:] -= errors @ factor[first:last, last:]
        return codes


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
