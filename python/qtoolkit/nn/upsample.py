"""Bilinear upsampling on codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved
from qtoolkit.nn.moving import exact_factors, resized


@saved(
    scale_factors=list[float],
    align_corners=bool,
    recompute=bool,
    input=QParams,
    output=QParams,
)
class UpsampleBilinear2d(QuantizedModule):
    """Bilinear upsampling by factors, or to a size given at the call.

    Args:
        scale_factors: for height and width; None where the size is given.
        align_corners: as in ``torch.nn.functional.interpolate``.
        recompute: positions follow from the sizes, not from the factors.
    """

    kernel = "upsample_bilinear2d"

    def __init__(
        self,
        scale_factors: list[float] | None,
        align_corners: bool,
        recompute: bool,
        *,
        input: QParams,
        output: QParams,
    ) -> None:
        super().__init__()
        # TorchScript takes no empty list.
        self.scale_factors = [1.0, 1.0] if scale_factors is None else list(scale_factors)
        self.align_corners = align_corners
        self.recompute = recompute
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        if size is None and self.recompute:
            size = resized(x, self.scale_factors)
        return ops.upsample_bilinear2d(
            x,
            self.input_scale,
            self.input_zero_point,
            size,
            self.scale_factors if size is None else None,
            self.align_corners,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        factors = exact_factors(self.scale_factors)
        if factors is None:
            return None
        step = PlanStep(
            "upsample_bilinear2d", align_corners=self.align_corners, recompute=self.recompute
        )
        step.constant("factors", factors)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor, size: list[int] | None = None) -> Tensor:
        return functional.interpolate(
            x,
            size,
            self.scale_factors if size is None else None,
            "bilinear",
            self.align_corners,
            (self.recompute or None) if size is None else None,
        )

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"
