"""Fake quantization whose parameters are measured from the data, not learned."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from qtoolkit.fake_quantize.base import FakeQuantize
from qtoolkit.qconfig import TensorSpec


def over_channels(x: Tensor, spec: TensorSpec) -> Tensor:
    """x as [scales, values of each]."""
    if spec.granularity == "per_tensor":
        return x.reshape(1, -1)
    return x.transpose(0, spec.axis).flatten(1)


class MeasuredFakeQuantize(FakeQuantize):
    """Base of the methods whose parameters are functions of the data.

    An activation is measured in training mode, unless frozen, and quantized with what is known
    then. A weight is measured anew at every call, in eval mode too, unless frozen.

    A subclass implements `_measure`; `measures` names the buffers that hold what it returns.
    """

    measures: ClassVar[tuple[str, ...]] = ("scale", "zero_point")

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__(spec, name, is_weight=is_weight)
        shape = () if spec.granularity == "per_tensor" else (0,)
        self.register_buffer("scale", torch.ones(shape))
        if "zero_point" in self.measures:
            self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    def allocate(self, x: Tensor) -> None:
        """Measures x, so that every buffer has its shape and a first value."""
        if self.is_weight:
            self._observe(x)

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parameters for x, one for each name in `measures`; without gradient."""
        raise NotImplementedError

    def show_observer(self, x: Tensor) -> None:
        """Lets the observer see x; of a weight nothing else."""
        assert self.observer is not None
        if self.is_weight:
            self.observer.reset()
        self.observer(x)

    def ch_axis(self) -> int | None:
        """The channel dimension, None per tensor."""
        return self.spec.axis if self.spec.granularity == "per_channel" else None

    def measured_shape(self) -> tuple[int, ...]:
        """[] per tensor, [-1] per channel."""
        return () if self.spec.granularity == "per_tensor" else (-1,)

    def _qparams(self) -> tuple[Tensor, Tensor]:
        if "zero_point" in self.measures:
            return self.scale, self.zero_point
        return self.scale, torch.zeros_like(self.scale, dtype=torch.int32)

    def _known(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, name) for name in self.measures)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, ...]:
        values = self._measure(x.detach())
        for name, value in zip(self.measures, values):
            buffer = getattr(self, name)
            if buffer.shape != value.shape:
                buffer.resize_(value.shape)
            buffer.copy_(value)
        self.note_measured()
        return values

    def note_measured(self) -> None:
        """Sets `ready` after data came, be it here or in an operator that does the same."""
        if not self._ready:
            self.ready = self._has_measured()

    def _has_measured(self) -> bool:
        """False while all data was NaN or Inf; True where knowing would wait for a device."""
        if self.observer is None or self.scale.device.type != "cpu":
            return True
        return torch.compiler.is_compiling() or self.observer.calibrated()
