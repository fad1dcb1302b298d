"""Softmax and layer norm of codes. `qtoolkit.ops` says what all share."""

from typing import Optional

import torch
from torch import Tensor


def softmax(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    dim: int,
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Softmax of codes along a dimension.

    y_scale and y_zero_point: the output's parameters, or None for a float32 output. The last
    dimension, and the channels of a channels_last x, cost no transposition.
    """
    return torch.ops.qtoolkit.softmax(
        x, x_scale, x_zero_point, dim, y_scale, y_zero_point, quant_min, quant_max
    )


def layer_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    normalized_shape: list[int],
    weight: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    eps: float,
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Layer norm of codes over their last dimensions; the output is contiguous.

    weight and bias: float32 of normalized_shape, or None. y_scale and y_zero_point: the output's
    parameters, or None for a float32 output.
    """
    return torch.ops.qtoolkit.layer_norm(
        x,
        x_scale,
        x_zero_point,
        normalized_shape,
        weight,
        bias,
        eps,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
    )
