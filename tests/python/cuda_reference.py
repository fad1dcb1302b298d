"""What the tests of the CUDA operators share: inputs, and the comparison with the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_reference import scale, seeded, zero_point
from torch import Tensor

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = torch.channels_last
# Channels side by side and apart, in whole 16-byte words and not, one tile of a warp and many.
CHANNEL_CASES = [
    ((4, 33, 5, 6), 0, torch.contiguous_format),
    ((4, 33, 5, 6), 1, torch.contiguous_format),
    ((4, 33, 5, 6), 1, LAST),
    ((4, 33, 5, 6), 2, LAST),
    ((4, 33, 5, 6), -1, torch.contiguous_format),
    ((6, 64, 8, 8), 1, torch.contiguous_format),
    ((6, 64, 8, 8), 1, LAST),
    ((3, 96, 7, 5), 1, LAST),
    ((2, 3, 41, 41), 1, LAST),
    ((2, 3, 41, 41), 1, torch.contiguous_format),
    ((48, 640), 0, torch.contiguous_format),
    ((300, 1000), 1, torch.contiguous_format),
    ((2, 5, 3, 4, 8), 1, torch.channels_last_3d),
    ((70, 1, 9), 1, torch.contiguous_format),
    ((0, 8, 3), 1, torch.contiguous_format),
]
SPECIAL = torch.tensor(
    [
        *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45),
        *(3.4028235e38, -3.4028235e38, 1e10, -1e10, 0.125, -0.125, 0.375, 0.625),
    ]
)


def values(shape: tuple[int, ...], special: bool = True, seed: int = 0) -> Tensor:
    """Random values; some of them, if `special`, are not finite, huge, tiny or exact ties."""
    x = torch.randn(shape, generator=seeded(seed)) * 20
    if special:
        chosen = SPECIAL[torch.randint(len(SPECIAL), shape, generator=seeded(1))]
        x = torch.where(torch.rand(shape, generator=seeded(2)) < 0.2, chosen, x)
    return x


def to_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def both(function: Callable[..., Any], *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors that function(*args) returns on the GPU, brought back, and on the CPU."""
    actual, expected = function(*map(to_gpu, args)), function(*args)
    actual = (actual,) if isinstance(actual, Tensor) else tuple(actual)
    assert all(tensor.is_cuda for tensor in actual)
    return tuple(tensor.cpu() for tensor in actual), (
        (expected,) if isinstance(expected, Tensor) else tuple(expected)
    )


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """The bits, but for those of a 16-bit NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.numel() <= 1 or actual.stride() == expected.stride()
    if expected.dtype in (torch.float16, torch.bfloat16):
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        actual, expected = actual[~nan].view(torch.int16), expected[~nan].view(torch.int16)
    elif expected.dtype == torch.float32:
        actual, expected = actual.view(torch.int32), expected.view(torch.int32)
    return torch.equal(actual, expected)


def check_bits(function: Callable[..., Any], *args: Any) -> None:
    for actual, expected in zip(*both(function, *args), strict=True):
        assert same_bits(actual, expected)


def with_gradient(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """function(x, …) and the gradient of x for a fixed gradient of the output."""

    def call(x: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf, *rest)
        y.backward(grad)
        return y.detach(), leaf.grad

    return call


def check_fake_quantize(function: Callable[..., Tensor], x: Tensor, *qparams: Tensor) -> None:
    grad = torch.randn(x.shape, generator=seeded(3)).to(x.dtype)
    check_bits(with_gradient(function), x, grad, *qparams)


def channel_qparams(shape: tuple[int, ...], positive: bool = False) -> tuple[Tensor, Tensor]:
    s = torch.rand(shape, generator=seeded(4)) * 0.3 + 0.01
    low = 0 if positive else -20
    return s, torch.randint(low, 20, shape, generator=seeded(5)).int()


def state() -> list[Tensor]:
    """min_val, max_val, scale and zero_point of an observer that has seen nothing."""
    return [torch.tensor(math.inf), torch.tensor(-math.inf), scale(1.0), zero_point(0)]
