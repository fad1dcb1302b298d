"""Fake quantization to floats in blocks with a scale each: mxfp8, mxfp4, nvfp4."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.floats import largest_magnitude
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.formats import get_format
from qtoolkit.qconfig import TensorSpec


@register_fake_quantize("block_float")
class BlockFloatFakeQuantize(MeasuredFakeQuantize):
    """Rounds blocks of neighbouring values to small floats under a scale of their own.

    The block scales are functions of the values, taken anew at every call. nvfp4 has a float32
    scale of the whole tensor above them, (largest magnitude) / (448 * 6), from `spec.observer`.
    Gradients pass unchanged. Blocks run along the dimension that a layer sums over: the channels of
    [N, C, H, W] images and convolution weights, else the last one.

    Source: OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3; NVIDIA,
    "Pretraining Large Language Models with NVFP4", 2025, section 2.
    """

    kinds = ("block_float",)
    granularities = ("per_tensor",)
    measures = ("scale",)
    resizable = ("scale",)

    @classmethod
    def uses_observer(cls, spec: TensorSpec) -> bool:
        """For nvfp4."""
        return get_format(spec.format).scale_format == "e4m3"

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.observer is None:
            return (torch.ones_like(self.scale),)
        self.show_observer(x)
        largest = largest_magnitude(*self.observer.value_range())
        of_scales = get_format("fp8_e4m3").max_value
        return (largest / (of_scales * get_format(self.spec.format).max_value),)

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        number_format = get_format(self.spec.format)
        is_image = x.dim() == 4
        y = ops.fake_quantize_block_float(
            x.movedim(1, -1).contiguous() if is_image else x,
            None if self.observer is None else parameters[0],
            number_format.block_size,
            number_format.mantissa_bits,
            number_format.min_exponent,
            number_format.max_value,
            number_format.scale_format,
        )
        return y.movedim(-1, 1) if is_image else y
