"""The operators in plain torch, and the tools that their tests share."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qtoolkit import _C

PATHS = ["reference", "portable", "avx2", "avxvnni", "avx512vnni", "amx"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def zero_point(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int32)


def limits(dtype: torch.dtype) -> tuple[int, int]:
    info = torch.iinfo(dtype)
    return info.min, info.max


def random_codes(shape: Any, dtype: torch.dtype = torch.uint8, seed: int = 0) -> Tensor:
    low, high = limits(dtype)
    return torch.randint(low, high + 1, shape, generator=seeded(seed)).to(dtype)


@contextmanager
def forced_path(kernel: str, path: str) -> Iterator[None]:
    """Runs every kernel on this path, then asserts that `kernel` did."""
    if path not in _C.cpu_paths():
        pytest.skip(f"this CPU cannot run the {path} path")
    if path not in _C.kernel_paths(kernel):
        pytest.skip(f"{kernel} has no {path} path")
    _C.force_path(path)
    try:
        yield
        assert _C.last_path(kernel) == path
    finally:
        _C.force_path(None)


def bounds(zp: Tensor, quant_min: int, quant_max: int, relu: bool) -> tuple[int, int]:
    return (max(quant_min, int(zp)) if relu else quant_min), quant_max


def round_to_codes(
    value: Tensor, zp: Tensor, quant_min: int, quant_max: int, relu: bool = False
) -> Tensor:
    """clamp(rne(value) + zp) of a float32 tensor."""
    assert value.dtype == torch.float32
    low, high = bounds(zp, quant_min, quant_max, relu)
    codes = (value.double().round() + zp).clamp(low, high)
    return codes.to(torch.int8 if quant_min < 0 else torch.uint8)


def factor(numerator: Tensor, denominator: Tensor) -> Tensor:
    """float(double(numerator) / denominator)."""
    return (numerator.double() / denominator.double()).float()


def shifted(x: Tensor, zp: Tensor) -> Tensor:
    return (x.int() - zp).float()


def conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
    y_scale: Tensor | None,
    y_zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    relu: bool = False,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_zero_point: Tensor | None = None,
) -> Tensor:
    """The integer convolution, exact in float64, then the rounding rule in float32."""
    acc = F.conv2d(
        x.double() - x_zero_point,
        weight.double(),
        None if bias is None else bias.double(),
        stride,
        padding,
        dilation,
        groups,
    )
    real = x_scale.double() * weight_scale.double()
    if y_scale is not None:
        real = real / y_scale.double()
    value = acc.float() * real.float().reshape(1, -1, 1, 1)
    if y_scale is None or y_zero_point is None:
        return value.clamp(min=0) if relu else value
    if residual is not None:
        assert residual_scale is not None
        assert residual_zero_point is not None
        value = value + shifted(residual, residual_zero_point) * factor(residual_scale, y_scale)
    return round_to_codes(value, y_zero_point, quant_min, quant_max, relu)
