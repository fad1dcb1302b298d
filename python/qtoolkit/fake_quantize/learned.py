"""Fake quantization whose parameters are learned."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qtoolkit.fake_quantize.base import FakeQuantize
from qtoolkit.qconfig import TensorSpec

# What the operators take for a scale of 0.
SMALLEST_SCALE = 2.0**-100
_EPS = torch.finfo(torch.float32).eps


class LearnedFakeQuantize(FakeQuantize):
    """Base of the methods that learn their parameters by gradient descent.

    The parameters begin as a function of the first tensor in training mode (of a weight: of the
    first at all), and are the optimizer's from then on. On the first batch this reads values on the
    host. While frozen they get no gradient.

    Under DDP all ranks begin with the mean of their values (`qtoolkit.distributed`). Before FSDP2
    shards the model, run a batch in training mode, or `qt.calibrate`.

    A subclass implements `_begin`; `learns` names the parameters, float32 [1] or [channels].
    """

    learns: tuple[str, ...] = ("scale",)

    def allocate(self, x: Tensor) -> None:
        """Gives the parameters one element for each channel."""
        if self.spec.granularity != "per_channel":
            return
        for name in self.learns:
            parameter = getattr(self, name)
            if parameter.numel() == 0:
                parameter.data = parameter.data.new_ones(x.shape[self.spec.axis])

    def _learned(self) -> nn.Parameter:
        """A parameter whose values come later."""
        return nn.Parameter(torch.ones(1 if self.spec.granularity == "per_tensor" else 0))

    def _begin(self, x: Tensor) -> None:
        """Sets the parameters for x: float32, finite, without gradient."""
        raise NotImplementedError

    def _observe(self, x: Tensor) -> tuple[Tensor, ...]:
        if not self.ready:
            self._initialise(x)
        elif self._checks_each_batch(x):
            self._accepts(x.detach())
        return self._known()

    def _checks_each_batch(self, x: Tensor) -> bool:
        """There are no statistics to protect, so only "error" looks at later batches."""
        return (
            self.on_nonfinite == "error"
            and not self.is_weight
            and x.device.type == "cpu"
            and not torch.compiler.is_compiling()
        )

    @torch.compiler.disable
    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        if getattr(self, "_is_fsdp_managed_module", False):  # what is set here would be lost
            raise RuntimeError(
                f"{self.spec.method} of {self.name!r} has no values to begin with, and its "
                "parameters are sharded: run a batch in training mode, or qt.calibrate, before "
                "fully_shard"
            )
        x = x.detach().float()
        if self._accepts(x):
            self.allocate(x)
            self._begin(x)
            self.ready = True

    def _known(self) -> tuple[Tensor, ...]:
        values = tuple(getattr(self, name) for name in self.learns)
        return values if self.observing else tuple(value.detach() for value in values)

    def _set(self, name: str, value: Tensor) -> None:
        getattr(self, name).data.copy_(value)

    def _set_scale(self, scale: Tensor) -> None:
        """Where all values are 0 the scale is float32's epsilon, as for observers."""
        self._set("scale", torch.where(scale > SMALLEST_SCALE, scale, _EPS))

    def _shaped(self, value: Tensor) -> Tensor:
        """0-dim per tensor, [channels] per channel."""
        value = value.detach()
        return value.reshape(()) if self.spec.granularity == "per_tensor" else value


def statistical_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """mean - 3 and mean + 3 standard deviations, within the values that there are; 0-dim."""
    low, high = torch.aminmax(x)
    deviation, mean = torch.std_mean(x, correction=0)
    return torch.maximum(low, mean - 3 * deviation), torch.minimum(high, mean + 3 * deviation)


def has_zero_point(spec: TensorSpec, is_weight: bool) -> bool:
    """Whether real 0 may have another code than 0: in affine activations."""
    return not is_weight and not spec.symmetric
