"""Binary weights with the scale of XNOR-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize, over_channels
from qtoolkit.fake_quantize.registry import register_fake_quantize

# Beyond it the gradient of a weight is 0.
_CLIP = 1.0
_EPS = torch.finfo(torch.float32).eps


@register_fake_quantize("xnor")
class XNORFakeQuantize(MeasuredFakeQuantize):
    """Weights -scale and scale, the scale being mean|w| per channel or per tensor.

    The gradient passes where |w| <= 1.

    Source: Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
    Networks", 2016, section 3.1.
    """

    kinds = ("binary",)
    roles = ("weight",)
    measures = ("scale",)
    resizable = ("scale",)

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        scale = over_channels(x.float(), self.spec).abs().mean(1)
        return (torch.where(scale == 0, _EPS, scale).reshape(self.measured_shape()),)

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        return ops.fake_quantize_binary(x, parameters[0], self.ch_axis(), _CLIP)

    def integer_codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `FakeQuantize.integer_codes`."""
        scale, _ = self.calculate_qparams()
        codes = torch.where(x >= 0, 1, -1).to(torch.int8)
        return codes, scale.reshape(-1).expand(x.shape[0]).contiguous()
