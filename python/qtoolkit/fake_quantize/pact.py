"""PACT: learned clipping of activations."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.learned import (
    SMALLEST_SCALE,
    LearnedFakeQuantize,
    statistical_range,
)
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.formats import get_format
from qtoolkit.qconfig import TensorSpec


@register_fake_quantize("pact")
class PACTFakeQuantize(LearnedFakeQuantize):
    """Activations in [0, alpha], alpha being learned; made for what follows a ReLU.

    alpha begins as the greatest value of the first batch. The paper adds an L2 penalty on it: give
    the optimizer a weight decay for the parameters named `alpha`.

    If the first batch holds negative values, [0, alpha] would cut them off. Then alpha is the
    length of a range with the fixed zero point that mean +- 3 standard deviations give, and learns
    by the rule of LSQ.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    2018, section 3.
    """

    roles = ("activation",)
    granularities = ("per_tensor",)
    learns = ("alpha",)
    resizable = ("alpha", "zero_point")

    alpha: Tensor

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__(spec, name, is_weight=is_weight)
        self.alpha = self._learned()
        self.register_buffer("zero_point", torch.zeros(1))
        self._shifted: bool | None = None

    @classmethod
    def problem(cls, spec: TensorSpec) -> str | None:
        """Codes count from 0."""
        if get_format(spec.format).signed or spec.symmetric:
            return f"is for unsigned affine formats, such as uint4, not {spec.format}"
        return super().problem(spec)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """alpha / quant_max, float32 [1]."""
        return self.alpha.abs().clamp(min=SMALLEST_SCALE) / float(self.spec.quant_max)

    def _begin(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        if bool(low < 0):
            low, high = statistical_range(x)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        length = high - low
        self._set("alpha", torch.where(length > 0, length, 1.0))
        self._set("zero_point", torch.round(-low / self.scale.detach()))
        self._shifted = None

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        alpha, quant_max = parameters[0], self.spec.quant_max
        if not self._is_shifted():
            return ops.fake_quantize_pact(x, alpha, quant_max)
        features = x.numel() // x.shape[0] if x.dim() and x.shape[0] else 1
        scale = alpha / float(quant_max)
        gradient_scale = (max(features, 1) * quant_max) ** -0.5
        return ops.fake_quantize_lsq(x, scale, self.zero_point, None, 0, quant_max, gradient_scale)

    def _is_shifted(self) -> bool:
        """Whether the zero point is not 0; read from the device once."""
        if self._shifted is None:
            self._shifted = bool(self.zero_point != 0)
        return self._shifted

    def set_extra_state(self, state: Tensor) -> None:
        """Restores the flags."""
        super().set_extra_state(state)
        self._shifted = None

    def _qparams(self) -> tuple[Tensor, Tensor]:
        return self._shaped(self.scale), self._shaped(self.zero_point).to(torch.int32)
