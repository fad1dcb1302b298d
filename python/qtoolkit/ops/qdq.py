"""Quantize and dequantize as single operators in float, for graphs that are written to files.

A converted model computes on codes. Other runtimes are given the same network in float, with each
value that was codes quantized and dequantized (QDQ). These operators mark where; they are computed
with PyTorch's float operators, run on every device and have no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("qtoolkit_export", "DEF")
_LIBRARY.define(
    "quantize(Tensor x, Tensor scale, Tensor zero_point, int quant_min, int quant_max, str name)"
    " -> Tensor"
)
_LIBRARY.define("dequantize(Tensor codes, Tensor scale, Tensor? zero_point, int? axis) -> Tensor")


def _dtype_of(quant_min: int) -> torch.dtype:
    return torch.int8 if quant_min < 0 else torch.uint8


def _quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, name: str
) -> Tensor:
    steps = torch.nan_to_num(x * (1.0 / scale))  # NaN gives the zero point, as in every kernel
    codes = torch.round(steps) + zero_point
    return codes.clamp(quant_min, quant_max).to(_dtype_of(quant_min))


def _quantize_meta(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, name: str
) -> Tensor:
    return torch.empty_like(x, dtype=_dtype_of(quant_min))


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    if axis is not None:
        shape = [-1 if dim == axis else 1 for dim in range(codes.dim())]
        scale = scale.reshape(shape)
        zero_point = None if zero_point is None else zero_point.reshape(shape)
    steps = codes if zero_point is None else codes.to(torch.int32) - zero_point
    return steps.to(torch.float32) * scale


def _dequantize_meta(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None
) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


_LIBRARY.impl("quantize", _quantize, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", _dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("quantize", _quantize_meta, "Meta")
_LIBRARY.impl("dequantize", _dequantize_meta, "Meta")


def qdq_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, name: str
) -> Tensor:
    """Float to codes of the shape of ``x``: int8 where quant_min < 0, else uint8.

    Args:
        x: float32.
        scale: float32, one element.
        zero_point: int32, one element.
        quant_min: lowest code.
        quant_max: highest code.
        name: of the value, unique in its graph.
    """
    return torch.ops.qtoolkit_export.quantize(x, scale, zero_point, quant_min, quant_max, name)


def qdq_dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int | None = None
) -> Tensor:
    """Codes to float32 of the same shape.

    Args:
        codes: uint8, int8 or (a bias) int32.
        scale: float32: ``[channels]`` where ``axis`` is given, else of one element, or of a shape
            that broadcasts to that of ``codes``.
        zero_point: int32 like ``scale``; None is 0.
        axis: the dimension of channels.
    """
    return torch.ops.qtoolkit_export.dequantize(codes, scale, zero_point, axis)
