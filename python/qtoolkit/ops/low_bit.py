"""Fake-quantize to few values. `qtoolkit.ops` says what all operators share.

x is float32, or float16 and bfloat16, which are computed in float32, of any shape; the result has
its dtype. NaN stays NaN. A scale is float32 of one element, or [x.size(ch_axis)] with a ch_axis.
Gradients are straight-through (Bengio et al., "Estimating or Propagating Gradients Through
Stochastic Neurons for Conditional Computation", 2013): of x only, passed unchanged or set to 0.
"""

from typing import Optional

import torch
from torch import Tensor


def fake_quantize_ternary(
    x: Tensor,
    scale: Tensor,
    threshold: Tensor,
    ch_axis: Optional[int] = None,  # noqa: UP045  (torch.jit.script reads it)
) -> Tensor:
    """scale * sign(x) where |x| > threshold, else 0; the gradient passes everywhere.

    scale and threshold: finite and not negative.

    Source: Li et al., "Ternary Weight Networks", 2016, equation 3.
    """
    return torch.ops.qtoolkit.fake_quantize_ternary(x, scale, threshold, ch_axis)


def fake_quantize_binary(
    x: Tensor,
    scale: Tensor,
    ch_axis: Optional[int] = None,  # noqa: UP045
    clip: float = 1.0,
) -> Tensor:
    """scale where x >= 0, else -scale; the gradient passes where |x| <= clip.

    scale: finite and not negative. clip: infinity passes it everywhere.

    Source: Rastegari et al., "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural
    Networks", 2016, section 3.
    """
    return torch.ops.qtoolkit.fake_quantize_binary(x, scale, ch_axis, clip)


def fake_quantize_float(
    x: Tensor,
    scale: Tensor,
    ch_axis: Optional[int],  # noqa: UP045
    mantissa_bits: int,
    min_exponent: int,
    max_value: float,
) -> Tensor:
    """scale times the nearest number of a small float format to x * (1 / scale).

    Half goes to the even mantissa; beyond max_value the result is max_value or its negative, and
    the gradient is 0. Subnormal numbers are used.
    mantissa_bits, min_exponent, max_value: as in `qtoolkit.formats.NumberFormat`.

    Raises ValueError also where max_value is no number of the format.

    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022.
    """
    return torch.ops.qtoolkit.fake_quantize_float(
        x, scale, ch_axis, mantissa_bits, min_exponent, max_value
    )


def fake_quantize_block_float(
    x: Tensor,
    tensor_scale: Optional[Tensor],  # noqa: UP045
    block_size: int,
    mantissa_bits: int,
    min_exponent: int,
    max_value: float,
    scale_format: str,
) -> Tensor:
    """fake_quantize_float with a scale for each block of block_size elements along the last axis.

    A block's scale comes from its largest |x|, amax; the last block of a row may be short:
      scale_format "e8m0": 2^(floor(log2(amax)) - floor(log2(max_value))), with an exponent in
        [-127, 127];
      scale_format "e4m3": tensor_scale times the fp8_e4m3 number nearest to
        amax / max_value / tensor_scale.
    tensor_scale: float32 of one element, for "e4m3" only; None takes x's own,
    max(|x|) / (448 * max_value).
    The gradient passes everywhere, since a scale follows its block. The result is contiguous.

    Raises ValueError also for block_size outside [1, 1024].

    Sources: OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3 ("e8m0"); NVIDIA,
    "Pretraining Large Language Models with NVFP4", 2025 ("e4m3").
    """
    return torch.ops.qtoolkit.fake_quantize_block_float(
        x, tensor_scale, block_size, mantissa_bits, min_exponent, max_value, scale_format
    )
