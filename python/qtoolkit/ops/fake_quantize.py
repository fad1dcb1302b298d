"""Quantize, then dequantize, with a gradient. `qtoolkit.ops` says what all share."""

from typing import Union

import torch
from torch import Tensor


def fake_quantize_per_tensor(
    x: Tensor,
    scale: Union[float, Tensor],  # noqa: UP007  (torch.jit.script reads it)
    zero_point: Union[int, Tensor],  # noqa: UP007
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Quantizes and dequantizes x, in its dtype; bit for bit torch.fake_quantize_per_tensor_affine.

    x: float32, or float16 and bfloat16, which are computed in float32. NaN stays NaN, infinities
    are clamped. The gradient of x is straight-through: passed where x lies in the range of the
    codes, else 0 (Bengio et al., 2013; Jacob et al., 2018). scale and zero_point get none.
    """
    if not isinstance(scale, Tensor):
        scale = torch.tensor(scale, dtype=torch.float32, device=x.device)
    if not isinstance(zero_point, Tensor):
        zero_point = torch.tensor(zero_point, dtype=torch.int32, device=x.device)
    return torch.ops.qtoolkit.fake_quantize_per_tensor(x, scale, zero_point, quant_min, quant_max)


def fake_quantize_per_channel(
    x: Tensor,
    scale: Union[float, Tensor],  # noqa: UP007
    zero_point: Union[int, Tensor],  # noqa: UP007
    ch_axis: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """fake_quantize_per_tensor with scale and zero_point of shape [x.size(ch_axis)].

    A number stands for every channel.
    """
    if not isinstance(scale, Tensor):
        scale = torch.full([x.size(ch_axis)], scale, dtype=torch.float32, device=x.device)
    if not isinstance(zero_point, Tensor):
        zero_point = torch.full([x.size(ch_axis)], zero_point, dtype=torch.int32, device=x.device)
    return torch.ops.qtoolkit.fake_quantize_per_channel(
        x, scale, zero_point, ch_axis, quant_min, quant_max
    )


def fake_quantize_per_group(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group_size: int,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """fake_quantize_per_tensor with parameters for each group of elements along the last axis.

    scale and zero_point: [*x.shape[:-1], ceil(x.size(-1) / group_size)]; the last group of a row
    may be shorter. The result is contiguous.
    """
    return torch.ops.qtoolkit.fake_quantize_per_group(
        x, scale, zero_point, group_size, quant_min, quant_max
    )


def fake_quantize_relu(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """fake_quantize_per_tensor(relu(x)) in one pass.

    The gradient of x is passed where x is above 0 and in the range of the codes.
    """
    return torch.ops.qtoolkit.fake_quantize_relu(x, scale, zero_point, quant_min, quant_max)


def observe_fake_quantize(
    x: Tensor,
    min_val: Tensor,
    max_val: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    averaging_constant: float,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
) -> Tensor:
    """Moves a running range towards that of x, then fake_quantize_per_tensor(x) with it.

    min_val, max_val (float32), scale (float32) and zero_point (int32), one element each, are
    changed in place. The first range, where min_val is +Inf, is that of x; later ones move by
    averaging_constant of the difference (Jacob et al., 2018, section 3.1). scale and zero_point
    follow from it as in `MovingAverageMinMaxObserver`, bit for bit. Where x holds NaN or Inf the
    range stays as it is; where there is none yet, x comes back unchanged.

    Raises ValueError if x is empty.
    """
    return torch.ops.qtoolkit.observe_fake_quantize(
        x,
        min_val,
        max_val,
        scale,
        zero_point,
        averaging_constant,
        quant_min,
        quant_max,
        symmetric,
    )
