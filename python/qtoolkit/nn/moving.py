"""Layers that only move codes: the output has the input's scale and zero point."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, saved


class MovingModule(QuantizedModule):
    """Its output's codes are its input's, at other places."""

    def formats(self) -> str:
        return "8-bit"


@saved(mode=Literal["constant", "reflect", "replicate", "circular"], pad=list[int], input=QParams)
class Pad(MovingModule):
    """Padding with real 0, or with the input's own values; see ``qtoolkit.ops.pad``.

    Args:
        mode: ``"constant"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        pad: two numbers for each padded dimension, the last one first; None where they are given at
            the call.
    """

    kernel = "gather_pixels"

    def __init__(self, mode: str, pad: list[int] | None = None, *, input: QParams) -> None:
        super().__init__()
        self.mode = mode
        self.pad = [0, 0] if pad is None else list(pad)  # TorchScript takes no empty list
        self._register_qparams("input", input)

    def forward(self, x: Tensor, pad: list[int] | None = None) -> Tensor:
        return ops.pad(
            x, self.input_scale, self.input_zero_point, self.pad if pad is None else pad, self.mode
        )

    def float_forward(self, x: Tensor, pad: list[int] | None = None) -> Tensor:
        return functional.pad(x, self.pad if pad is None else pad, self.mode)

    def plan_step_of_call(self, dtypes: list[torch.dtype], numbers: list[Any]) -> PlanStep | None:
        pad = [*(numbers or self.pad), 0, 0][:4]
        if len(numbers or self.pad) > 4 or not all(isinstance(side, int) for side in pad):
            return None
        modes = ["constant", "reflect", "replicate", "circular"]
        return PlanStep("pad", pad=pad, mode=modes.index(self.mode))


@saved(scale_factors=list[float], exact=bool, recompute=bool)
class UpsampleNearest2d(MovingModule):
    """Nearest upsampling by factors, or to a size given at the call.

    Args:
        scale_factors: for height and width; None where the size is given.
        exact: as mode ``"nearest-exact"`` of ``torch.nn.functional.interpolate``.
        recompute: positions follow from the sizes, not from the factors.
    """

    kernel = "gather_pixels"

    def __init__(self, scale_factors: list[float] | None, exact: bool, recompute: bool) -> None:
        super().__init__()
        # TorchScript takes no empty list.
        self.scale_factors = [1.0, 1.0] if scale_factors is None else list(scale_factors)
        self.exact = exact
        self.recompute = recompute

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        if size is None and self.recompute:
            size = resized(x, self.scale_factors)
        if size is None:
            return ops.upsample_nearest2d(x, None, self.scale_factors, self.exact)
        return ops.upsample_nearest2d(x, size, None, self.exact)

    def float_forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        mode = "nearest-exact" if self.exact else "nearest"
        if size is not None:
            return functional.interpolate(x, size, mode=mode)
        return functional.interpolate(
            x, None, self.scale_factors, mode, recompute_scale_factor=self.recompute or None
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        factors = exact_factors(self.scale_factors)
        if factors is None:
            return None
        step = PlanStep("upsample_nearest2d", exact=self.exact, recompute=self.recompute)
        step.constant("factors", factors)
        return step


def resized(x: Tensor, factors: list[float]) -> list[int]:
    """Height and width of an image times factors."""
    return [int(x.size(2) * factors[0]), int(x.size(3) * factors[1])]


def exact_factors(factors: list[float]) -> Tensor | None:
    """The factors in float32; None if that rounds them."""
    result = torch.tensor(factors, dtype=torch.float32)
    return result if result.tolist() == factors else None


@saved(groups=int)
class ChannelShuffle(MovingModule):
    """``torch.nn.ChannelShuffle`` of codes."""

    kernel = "shuffle_codes"

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return functional.channel_shuffle(x, self.groups)
        return ops.channel_shuffle(x, self.groups)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.channel_shuffle(x, self.groups)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        return PlanStep("channel_shuffle", groups=self.groups)


@saved(factor=int)
class PixelShuffle(MovingModule):
    """``torch.nn.PixelShuffle`` of codes."""

    kernel = "shuffle_codes"

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return functional.pixel_shuffle(x, self.factor)
        return ops.pixel_shuffle(x, self.factor)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.pixel_shuffle(x, self.factor)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        return PlanStep("pixel_shuffle", factor=self.factor)


@saved(factor=int)
class PixelUnshuffle(MovingModule):
    """``torch.nn.PixelUnshuffle`` of codes."""

    kernel = "shuffle_codes"

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4:
            return functional.pixel_unshuffle(x, self.factor)
        return ops.pixel_unshuffle(x, self.factor)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.pixel_unshuffle(x, self.factor)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        return PlanStep("pixel_unshuffle", factor=self.factor)
