"""The scale of each channel with the least squared error."""

from __future__ import annotations

from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.per_channel import PerChannelMinMaxObserver
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("per_channel_mse")
class PerChannelMSEObserver(PerChannelMinMaxObserver):
    """Chooses the part of each channel's range that quantizes the channel with least error.

    For weights: each tensor is searched whole as it comes (`qtoolkit.ops.range_mse_per_channel`);
    of several tensors, the widest range found counts.
    """

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """int8, symmetric, channels in dimension 0."""
        return TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_mse")

    def ranges(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Least and greatest value that each channel of x should represent."""
        spec = self.spec
        low, high = ops.range_mse_per_channel(
            x.cpu(), axis, spec.quant_min, spec.quant_max, spec.symmetric
        )
        return low.to(x.device), high.to(x.device)
