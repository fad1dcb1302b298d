"""Operators on codes that move them or change the size. `qtoolkit.ops` says what all share."""

from typing import Optional

import torch
from torch import Tensor


def pad(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, pad: list[int], mode: str = "constant"
) -> Tensor:
    """Codes padded (or, where a number is negative, cut) as torch.nn.functional.pad does.

    pad: two numbers for each padded dimension, the last one first. mode: "constant" (of real 0, the
    zero point), "reflect", "replicate" or "circular"; the latter three pad the last two dimensions.
    The output has x's parameters. Of [N, C, H, W] padded in H and W it is channels_last, else
    contiguous.
    """
    return torch.ops.qtoolkit.pad(x, x_scale, x_zero_point, pad, mode)


def upsample_nearest2d(
    x: Tensor,
    size: Optional[list[int]],  # noqa: UP045
    scale_factors: Optional[list[float]],  # noqa: UP045
    exact: bool = False,
) -> Tensor:
    """Codes [N, C, H, W] at another size, in the same parameters; channels_last.

    The rules of torch.nn.functional.interpolate in mode "nearest", or "nearest-exact" if exact.
    Either size or scale_factors holds two numbers, for height and width.
    """
    return torch.ops.qtoolkit.upsample_nearest2d(x, size, scale_factors, exact)


def upsample_bilinear2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    size: Optional[list[int]],  # noqa: UP045
    scale_factors: Optional[list[float]],  # noqa: UP045
    align_corners: bool,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Bilinear interpolation of codes [N, C, H, W]; channels_last.

    The rules of torch.nn.functional.interpolate in mode "bilinear" without antialiasing. Either
    size or scale_factors holds two numbers, for height and width.
    """
    return torch.ops.qtoolkit.upsample_bilinear2d(
        x,
        x_scale,
        x_zero_point,
        size,
        scale_factors,
        align_corners,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
    )


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """torch.nn.functional.channel_shuffle of codes [N, C, H, W]; channels_last."""
    return torch.ops.qtoolkit.channel_shuffle(x, groups)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """torch.nn.functional.pixel_shuffle of codes [N, C, H, W]; channels_last."""
    return torch.ops.qtoolkit.pixel_shuffle(x, factor)


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """torch.nn.functional.pixel_unshuffle of codes [N, C, H, W]; channels_last."""
    return torch.ops.qtoolkit.pixel_unshuffle(x, factor)


def mean(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    dim: list[int],
    keepdim: bool,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Mean of codes over the dimensions dim; the sum is exact. Of a channels_last x without C among
    dim, the output is channels_last where it has 4 dimensions."""
    return torch.ops.qtoolkit.mean(
        x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point, quant_min, quant_max
    )


def sum(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    dim: list[int],
    keepdim: bool,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Sum of codes over the dimensions dim, as mean."""
    return torch.ops.qtoolkit.sum(
        x, x_scale, x_zero_point, dim, keepdim, y_scale, y_zero_point, quant_min, quant_max
    )
