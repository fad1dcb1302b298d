"""TWN: ternary weights."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize, over_channels
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.qconfig import TensorSpec

_EPS = torch.finfo(torch.float32).eps


@register_fake_quantize("twn")
class TWNFakeQuantize(MeasuredFakeQuantize):
    """Weights -scale, 0, scale; gradients pass unchanged.

    The threshold is 0.7 mean|w|, and the scale the mean |w| of the weights beyond it, per channel
    or per tensor. For a learned scale use format "ternary" with method "lsq".

    Attributes:
        threshold: buffer, float32, shaped like `scale`.

    Source: Li et al., "Ternary Weight Networks", 2016, sections 2.1 and 2.2.
    """

    kinds = ("ternary",)
    roles = ("weight",)
    measures = ("scale", "threshold")
    resizable = ("scale", "threshold")

    threshold: Tensor

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__(spec, name, is_weight=is_weight)
        self.register_buffer("threshold", torch.zeros_like(self.scale))

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        size = over_channels(x.float(), self.spec).abs()
        threshold = 0.7 * size.mean(1)
        beyond = size > threshold.unsqueeze(1)
        # A channel of zeros has none beyond; no scale is 0.
        scale = (size * beyond).sum(1) / beyond.sum(1).clamp(min=1)
        scale = torch.where(scale == 0, _EPS, scale)
        shape = self.measured_shape()
        return scale.reshape(shape), threshold.reshape(shape)

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        scale, threshold = parameters
        return ops.fake_quantize_ternary(x, scale, threshold, self.ch_axis())

    def integer_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `FakeQuantize.integer_codes`."""
        scale, _ = self.calculate_qparams()
        threshold = self.threshold.reshape(-1, *([1] * (x.dim() - 1)))
        codes = torch.sign(x) * (x.abs() > threshold)
        return codes.to(torch.int8), scale.reshape(-1).expand(x.shape[0]).contiguous()
