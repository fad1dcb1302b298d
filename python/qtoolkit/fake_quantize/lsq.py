"""LSQ: learned step size quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.learned import (
    SMALLEST_SCALE,
    LearnedFakeQuantize,
    has_zero_point,
    statistical_range,
)
from qtoolkit.fake_quantize.measured import over_channels
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.formats import get_format
from qtoolkit.qconfig import TensorSpec


@register_fake_quantize("lsq")
class LSQFakeQuantize(LearnedFakeQuantize):
    """Uniform quantization with a learned scale (step size).

    The scale begins as 2 mean|x| / sqrt(quant_max), and its gradient is multiplied by
    1 / sqrt(n quant_max), n being the values of a weight that share a scale, or the features of an
    activation (its elements without the batch dimension).

    Weights have zero point 0. `spec.symmetric=False` gives them the whole format, such as
    [-8, 7], as in the paper; `True` leaves the lowest code out.

    Activations have a fixed zero point that the first batch decides, so that negative values are
    not cut off silently: without negative values it is the lowest code (0 in unsigned formats);
    with some it is 0 in signed formats, and in unsigned ones that of the range of mean +- 3
    standard deviations, from which the scale then begins too. Symmetric: always 0.

    Source: Esser et al., "Learned Step Size Quantization", 2020, section 2.
    """

    kinds = ("integer", "ternary")

    zero_point: Tensor | None  # type: ignore[assignment]

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__(spec, name, is_weight=is_weight)
        self.scale = self._learned()
        self._make_zero_point()

    def _make_zero_point(self) -> None:
        shifts = has_zero_point(self.spec, self.is_weight)
        self.register_buffer("zero_point", torch.zeros(1) if shifts else None)

    @classmethod
    def problem(cls, spec: TensorSpec) -> str | None:
        """Symmetric unsigned formats, whose zero point is their middle, have no use here."""
        number = get_format(spec.format)
        if number.kind == "integer" and spec.symmetric and not number.signed:
            return f"needs a signed format where symmetric, such as {spec.format[1:]}"
        return super().problem(spec)

    @classmethod
    def problem_as(cls, spec: TensorSpec, role: str) -> str | None:
        """Weights are signed."""
        if role == "weight" and not get_format(spec.format).signed:
            return f"method {spec.method!r} needs a signed format, such as {spec.format[1:]}"
        return super().problem_as(spec, role)

    def _known(self) -> tuple[Tensor, ...]:
        known = super()._known()
        return known if self.zero_point is None else (*known[:1], self.zero_point)

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        spec = self.spec
        return ops.fake_quantize_lsq(
            x,
            parameters[0],
            parameters[1] if len(parameters) > 1 else None,
            spec.axis if spec.granularity == "per_channel" else None,
            spec.quant_min,
            spec.quant_max,
            self._gradient_scale(x),
        )

    def _gradient_scale(self, x: Tensor) -> float:
        groups = self.scale.numel() if self.is_weight else x.shape[0] if x.dim() else 1
        return (max(x.numel() // max(groups, 1), 1) * self.spec.quant_max) ** -0.5

    def _begin(self, x: Tensor) -> None:
        spec = self.spec
        zero_point = 0
        if self.zero_point is not None:
            if bool(x.min() >= 0):
                zero_point = spec.quant_min
            elif not get_format(spec.format).signed:
                self._begin_with_range(*statistical_range(x))
                return
            self._set("zero_point", torch.tensor(float(zero_point)))
        levels = max(spec.quant_max - zero_point, 1)
        self._set_scale(2 * over_channels(x, spec).abs().mean(1) / levels**0.5)

    def _begin_with_range(self, low: Tensor, high: Tensor) -> None:
        spec = self.spec
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        scale = (high - low) / (spec.quant_max - spec.quant_min)
        self._set_scale(scale)
        if self.zero_point is not None:
            self._set("zero_point", spec.quant_min - torch.round(low / self.scale.detach()))

    def _qparams(self) -> tuple[Tensor, Tensor]:
        scale = self._shaped(self.scale).abs().clamp(min=SMALLEST_SCALE)
        if self.zero_point is None:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        low, high = self.spec.quant_min, self.spec.quant_max
        zero_point = self._shaped(self.zero_point).round().clamp(low, high)
        return scale, zero_point.to(torch.int32)
