"""Range of each channel."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("per_channel_minmax")
class PerChannelMinMaxObserver(Observer):
    """Covers the least and greatest value of each channel of all tensors seen.

    Args:
        spec: how the tensor is quantized; `spec.axis` is the channel dimension.
        ch_axis: takes the place of the spec's axis.
        name: the module that the tensor belongs to.
    """

    granularities = ("per_channel",)
    resizable = ("min_val", "max_val")

    def __init__(
        self, spec: TensorSpec | None = None, *, ch_axis: int | None = None, name: str = ""
    ) -> None:
        spec = self.default_spec() if spec is None else spec
        if ch_axis is not None:
            spec = replace(spec, axis=ch_axis)
        super().__init__(spec, name=name)

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """int8, symmetric, channels in dimension 0: the weight of a convolution or linear layer."""
        return TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")

    def observe(self, x: Tensor) -> None:
        """Widens each channel's range to x, which must have the spec's axis.

        Raises:
            ValueError: x has no such dimension, or another number of channels than before.
        """
        axis = self.spec.axis
        if axis >= x.dim():
            raise ValueError(
                f"observer{self._for_name()}: axis {axis} is out of range for a tensor of shape "
                f"{tuple(x.shape)}"
            )
        min_val, max_val = self._checked(*self.ranges(x, axis))
        self._widen_each(min_val, max_val, "channels:")

    def ranges(self, x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Least and greatest value that each channel of x should represent, [channels]."""
        return ops.min_max_per_channel(x, axis)
