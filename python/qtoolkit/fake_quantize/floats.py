"""Fake quantization to small floats: fp8, fp16, bf16."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.formats import get_format
from qtoolkit.qconfig import TensorSpec

_EPS = torch.finfo(torch.float32).eps
# Formats of this width hold the usual values without a scale.
_SCALED_BITS = 8


def largest_magnitude(min_val: Tensor, max_val: Tensor) -> Tensor:
    """max |x| of a range; float32's epsilon for an empty one."""
    largest = torch.maximum(-min_val, max_val)
    return torch.where(largest > 0, largest, _EPS)


@register_fake_quantize("float")
class FloatFakeQuantize(MeasuredFakeQuantize):
    """Rounds x / scale to the nearest number of a small float format, saturating.

    fp8: the scale maps the largest magnitude in the range of `spec.observer` to the format's
    largest number, per tensor or per channel. fp16 and bf16: the scale is 1.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3.
    """

    kinds = ("float",)
    measures = ("scale",)
    resizable = ("scale",)

    @classmethod
    def uses_observer(cls, spec: TensorSpec) -> bool:
        """For fp8."""
        return get_format(spec.format).bits <= _SCALED_BITS

    @classmethod
    def problem(cls, spec: TensorSpec) -> str | None:
        """A scale of 1 is the same for every channel."""
        problem = super().problem(spec)
        if problem is None and not cls.uses_observer(spec) and spec.granularity != "per_tensor":
            return f"has no scale for {spec.format}: use granularity per_tensor"
        return problem

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.observer is None:
            return (torch.ones_like(self.scale),)
        self.show_observer(x)
        largest = largest_magnitude(*self.observer.value_range())
        return (largest / get_format(self.spec.format).max_value,)

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        number_format = get_format(self.spec.format)
        return ops.fake_quantize_float(
            x,
            parameters[0],
            self.ch_axis(),
            number_format.mantissa_bits,
            number_format.min_exponent,
            number_format.max_value,
        )
