"""Operators of float networks that train with quantization simulated."""

from typing import Optional

import torch
from torch import Tensor


def max_pool2d_train(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool = False,
) -> Tensor:
    """torch.nn.functional.max_pool2d of float32 [N, C, H, W] with the gradient of x.

    The place of each maximum is kept in one byte, where torch keeps eight, so a window has at most
    256 elements. The output is channels_last. No second derivatives.
    """
    return torch.ops.qtoolkit.max_pool2d_train(
        x, kernel_size, stride, padding, dilation, ceil_mode
    )[0]


def conv2d_train(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_scale: Optional[Tensor],  # noqa: UP045
    x_zero_point: Optional[Tensor],  # noqa: UP045
    x_quant_min: int,
    x_quant_max: int,
    weight_scale: Optional[Tensor],  # noqa: UP045
    weight_quant_max: int,
) -> Tensor:
    """torch.nn.functional.conv2d that keeps 8-bit codes for its backward where it can.

    Where every value of x is one that the scale (one element), zero point and range can represent,
    the codes of x are kept instead of x, a quarter of the memory, and give the same gradients bit
    for bit; likewise for the weight, whose scale has one element or one an output channel, and
    whose codes lie in [-weight_quant_max, weight_quant_max]. All else is kept as it is, as
    are both where their scale is None. Only on CPU and for float32.

    Raises RuntimeError where second derivatives are asked for.
    """
    return torch.ops.qtoolkit.conv2d_train(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        x_scale,
        x_zero_point,
        x_quant_min,
        x_quant_max,
        weight_scale,
        weight_quant_max,
    )
