"""SmoothQuant: outliers of activations move into the weights that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtoolkit.algorithms.activations import ChannelValues, linear_links
from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.registry import BEFORE, Algorithm, register_algorithm
from qtoolkit.algorithms.scaling import Link, Reader

_LEAST = 1e-5


@register_algorithm("smooth_quant")
@dataclass(frozen=True)
class SmoothQuant(Algorithm):
    """Divides the channels of what linear layers read by s = max|x|^alpha / max|w|^(1 - alpha), and
    multiplies the weights by s. The division goes into the layer norm or layer before; for what an
    attention gives, into the projection of its values. What the float network computes does not
    change. Linear layers behind anything else stay as they are.

    Source: Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large
    Language Models" (2023), section 4.

    Args:
        alpha: 0 to 1, how much of the difference between channels goes into the weights.
    """

    alpha: float = 0.5

    stage = BEFORE

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"smooth_quant: alpha must be from 0 to 1, got {self.alpha!r}")

    def run(self, context: Context) -> None:
        links = linear_links(context)
        values = ChannelValues(context, [reader for link in links for reader in link.readers])
        for link in links:
            largest = _by_channel(link, values.largest)
            if largest is not None:
                link.divide(self._scale(largest, link.read_ranges()))

    def _scale(self, x: Tensor, weight: Tensor) -> Tensor:
        scale = x.clamp(min=_LEAST) ** self.alpha / weight.clamp(min=_LEAST) ** (1 - self.alpha)
        # A channel that is always zero says nothing, and a common factor changes nothing.
        scale = scale / scale[x > 0].log().mean().exp() if bool((x > 0).any()) else scale
        return torch.where(x > 0, scale.clamp(_LEAST, 1 / _LEAST), torch.ones_like(scale))


def _by_channel(link: Link, values: dict[Reader, Tensor]) -> Tensor | None:
    """The largest of each channel over all that read it; None where the data does not reach it."""
    found = [
        values[reader].reshape(link.channels, reader.repeat).amax(1)
        for reader in link.readers
        if reader in values
    ]
    return torch.stack(found).amax(0) if found else None
