"""Fake-quantize with learned parameters. `qtoolkit.ops` says what all operators share.

The codes are those of fake_quantize_per_tensor and fake_quantize_per_channel, so that a trained
scale converts exactly. The gradients are defined where rounding is straight-through (Bengio et al.,
"Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation", 2013);
differentiating them again raises NotImplementedError.
"""

from typing import Optional

import torch
from torch import Tensor


def fake_quantize_lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Optional[Tensor],  # noqa: UP045  (torch.jit.script reads it)
    ch_axis: Optional[int],  # noqa: UP045
    quant_min: int,
    quant_max: int,
    grad_scale: float = 1.0,
) -> Tensor:
    """Fake-quantizes x, in its dtype, with a learned scale, and a learned zero point if given.

    x: float32, or float16 and bfloat16, which are computed in float32; any shape.
    scale: float32 of one element, or [x.size(ch_axis)] with a ch_axis. max(|scale|, 2^-100) is
    used, so that an update across 0 does no harm.
    zero_point: float32 in scale's shape, or None for 0. Its nearest integer within
    [quant_min, quant_max] is used.
    grad_scale: factor of the parameters' gradients, in the paper 1 / sqrt(x.numel() * quant_max).

    The gradients, for an upstream gradient g, with v = x / scale and the sum over all elements of a
    channel; an element is inside if its rounded code is:
      x: g inside, else 0;
      scale: grad_scale * sum of g * (round(v) - v) inside, g * (quant_min - zero_point) below and
        g * (quant_max - zero_point) above;
      zero_point: grad_scale * sum of -scale * g outside.
    The sums have the same bits whatever the number of threads.

    Raises ValueError also for a scale or zero point that is not finite.

    Sources: Esser et al., "Learned Step Size Quantization", 2020, equations 1 to 3; with a zero
    point Bhalgat et al., "LSQ+", 2020, section 3.1.
    """
    return torch.ops.qtoolkit.fake_quantize_lsq(
        x, scale, zero_point, ch_axis, quant_min, quant_max, grad_scale
    )


def fake_quantize_pact(x: Tensor, alpha: Tensor, quant_max: int) -> Tensor:
    """Fake-quantizes x, clipped to [0, alpha], to the codes 0..quant_max; alpha is learned.

    The scale is alpha / quant_max.

    x: as in fake_quantize_lsq. alpha: float32 of one element; max(|alpha|, 2^-100) is used.

    The gradients, for an upstream gradient g: of x, g where 0 <= x < alpha, else 0; of alpha, the
    sum of g where x >= alpha.

    Raises ValueError also for an alpha that is not finite.

    Source: Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks",
    2018, section 3.
    """
    return torch.ops.qtoolkit.fake_quantize_pact(x, alpha, quant_max)
