"""HQQ: ranges for which most weights are nearly right, and few that lie far out may be wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.weight_only.grid import Coded, Grid, IntegerGrid, code_matrix, grouped
from qtoolkit.weight_only.method import Inputs, Result, WeightMethod, register_weight_method


@register_weight_method("hqq")
@dataclass(frozen=True)
class Hqq(WeightMethod):
    """Minimizes the sum of |error|^p, p < 1, by half-quadratic splitting; no data.

    In turns, the errors e that the norm would leave alone are taken out of the weights by
    soft thresholds, and scale and zero point are fitted to the rest by least squares. The best
    range that was met is kept.

    Source: Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023).
    There the zero point alone is fitted, as a fraction; here it is a code, and the scale is fitted.
    Formats whose scales are of a small format, and fp8, are rounded to nearest.

    Args:
        p: of the norm.
        iterations: how often.
        beta, growth: weight of the splitting, in units of 1 / scale^p, and its growth.
    """

    p: float = 0.7
    iterations: int = 20
    beta: float = 1.0
    growth: float = 1.05

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"hqq: p must lie in (0, 1], got {self.p}")
        if self.iterations < 0:
            raise ValueError(f"hqq: iterations cannot be {self.iterations}")

    def quantize(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs | None
    ) -> list[Result]:
        return [Result(self._one(weight, grid)) for weight in weights]

    def _one(self, weight: Tensor, grid: Grid) -> Coded:
        coded = code_matrix(grid, weight)
        if not grid.refits(True):
            return coded
        w = grouped(weight.float(), grid.group_size)
        scale = coded.scale.reshape(-1, 1)
        zero = None if coded.zero_point is None else coded.zero_point.reshape(-1, 1)
        best_scale, best_zero = scale, zero
        least = torch.full_like(scale, torch.inf)
        beta = self.beta
        for i in range(self.iterations + 1):
            codes = grid.codes(w, scale, zero)
            levels = grid.levels(codes, zero)
            # In units of the scale, so that thresholds mean the same for all groups.
            residual = (w / scale).sub_(levels)
            error = residual.abs().pow_(self.p).sum(1, keepdim=True) * scale**self.p
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            if zero is not None and best_zero is not None:
                best_zero = torch.where(better, zero, best_zero)
            if i == self.iterations:
                break
            size = residual.abs()
            shrunk = size - size.clamp(min=1e-6).pow(self.p - 1) * (self.p / beta)
            target = w - residual.sign() * shrunk.clamp_(min=0) * scale
            if zero is not None and isinstance(grid, IntegerGrid):
                fitted = (codes - target / scale).mean(1, keepdim=True).round()
                zero = fitted.clamp(*grid.limits)
                levels = grid.levels(codes, zero)
            power = levels.square().sum(1, keepdim=True)
            new = (target * levels).sum(1, keepdim=True) / power
            scale = torch.where(new > 0, new, scale)
            beta *= self.growth
        coded.scale = best_scale.reshape(coded.scale.shape).contiguous()
        coded.zero_point = None if best_zero is None else best_zero.reshape(coded.scale.shape)
        codes = grid.codes(w, best_scale, best_zero).to(torch.uint8)
        coded.codes = codes.reshape(weight.size(0), -1)[:, : weight.size(1)].contiguous()
        return coded
