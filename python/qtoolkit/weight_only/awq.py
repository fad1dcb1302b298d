"""AWQ: columns that large inputs meet are made larger before rounding, and their inputs smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit.weight_only.fit import fit_scales
from qtoolkit.weight_only.grid import Grid, code_matrix, grouped
from qtoolkit.weight_only.method import (
    Inputs,
    Result,
    WeightMethod,
    output_error,
    register_weight_method,
)


@register_weight_method("awq")
@dataclass(frozen=True)
class Awq(WeightMethod):
    """Activation-aware scales: with factors s, W x is computed as (W s) (x / s), where the search
    finds the s that gives the least error of the outputs.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration" (2023), section 3.2: s = mean|x|^alpha for alpha in [0, 1], here also divided by
    mean|w|^(1 - alpha) of the columns relative to their groups, as in its code. Its search of
    clipped ranges is that of ``RoundToNearest`` under the inputs' mean squares; for the codes that
    it chooses, ``fit_scales`` finds the scales of least output error.
    ``quantize_weights`` folds 1 / s into the layer before where that is a norm that nothing else
    reads. Rounding to nearest is among what is tried.

    Args:
        steps: how many alpha are tried; 0 for clipped ranges alone.
        search: as in ``RoundToNearest``.
    """

    steps: int = 20
    search: bool = True

    needs_data: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"awq: steps cannot be {self.steps}")

    def for_convolution(self) -> Awq:
        """Clipped ranges alone."""
        return replace(self, steps=0)

    def for_output(self) -> Awq:
        """Clipped ranges alone: factors would serve those outputs that are large, such as logits
        of words that never come, at the cost of the others. The authors' code leaves heads out."""
        return replace(self, steps=0)

    def quantize(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs | None
    ) -> list[Result]:
        if inputs is None:
            raise ValueError("awq needs to know the inputs of a layer: give data")
        best = [Result(code_matrix(grid, weight, search=self.search)) for weight in weights]
        least = _error(weights, best, inputs)
        for factors in self._candidates(weights, grid, inputs):
            results = self._scaled(weights, grid, inputs, factors)
            error = _error(weights, results, inputs)
            if error < least:
                best, least = results, error
        for weight, result in zip(weights, best):
            _fit(weight, result, inputs)
        return best

    def _candidates(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs
    ) -> list[Tensor | None]:
        """Factors of the inputs' columns; None for clipped ranges without any."""
        x = inputs.magnitude.clamp(min=1e-4 * float(inputs.magnitude.max()) + 1e-30)
        relative = torch.cat([_relative(weight, grid.group_size) for weight in weights]).mean(0)
        w = relative.clamp(min=1e-4)
        found: list[Tensor | None] = [None]
        for i in range(self.steps):
            alpha = i / self.steps
            for factors in (x**alpha, x**alpha / w ** (1 - alpha))[i == 0 :]:
                factors = factors / (factors.max() * factors.min()).sqrt()
                found.append(factors.clamp(1e-4, 1e4))
        return found

    def _scaled(
        self, weights: Sequence[Tensor], grid: Grid, inputs: Inputs, factors: Tensor | None
    ) -> list[Result]:
        diagonal = inputs.hessian.diagonal()
        importance = diagonal + diagonal.mean() * 1e-4 + torch.finfo(torch.float32).tiny
        if factors is None:
            return [
                Result(code_matrix(grid, weight, importance, search=self.search))
                for weight in weights
            ]
        importance = importance / factors**2
        return [
            Result(code_matrix(grid, weight * factors, importance, search=self.search), 1 / factors)
            for weight in weights
        ]


def _relative(weight: Tensor, group_size: int) -> Tensor:
    """|w| as a share of the largest in its group."""
    groups = grouped(weight.abs(), group_size)
    share = groups / groups.amax(1, keepdim=True).clamp(min=1e-30)
    return share.reshape(weight.size(0), -1)[:, : weight.size(1)]


def _fit(weight: Tensor, result: Result, inputs: Inputs) -> None:
    factor = result.input_factor
    if factor is None:
        fit_scales(result.coded, weight, inputs.hessian)
    else:
        fit_scales(result.coded, weight / factor, inputs.hessian * factor * factor[:, None])


def _error(weights: Sequence[Tensor], results: Sequence[Result], inputs: Inputs) -> float:
    return sum(
        output_error(weight, result.dequantized(), inputs)
        for weight, result in zip(weights, results)
    )
