"""The CUDA operators on 8-bit codes give the CPU operators' bits, and so does a whole network."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_reference import LAST, check_bits, needs_gpu, values
from op_reference import scale, seeded, zero_point
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit import ops

pytestmark = needs_gpu

CODES = [torch.uint8, torch.int8]


def codes(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    limits = torch.iinfo(dtype)
    return torch.randint(limits.min, limits.max + 1, shape, dtype=dtype, generator=seeded(seed))


def zero_of(dtype: torch.dtype) -> Tensor:
    return zero_point(-7 if dtype == torch.int8 else 117)


def range_of(dtype: torch.dtype) -> tuple[int, int]:
    return (-128, 127) if dtype == torch.int8 else (0, 255)


def weight_of(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, scales and bias of a layer."""
    channels = shape[0]
    weight = codes(shape, torch.int8, 1).clamp(min=-127)
    scales = torch.rand(channels, generator=seeded(2)) * 0.01 + 1e-3
    bias = torch.randint(-3000, 3000, (channels,), dtype=torch.int32, generator=seeded(3))
    return weight, scales, bias


# images, channels, size, out channels, kernel, stride, padding, dilation, groups
CONVOLUTIONS = [
    (2, 16, 9, 24, 3, 1, 1, 1, 1),
    (1, 3, 32, 64, 7, 2, 3, 1, 1),
    (3, 64, 14, 70, 1, 2, 0, 1, 1),
    (2, 20, 11, 18, 3, 2, 1, 2, 2),
    (2, 33, 8, 33, 3, 1, 1, 1, 33),
    (1, 128, 7, 256, 3, 1, 1, 1, 1),
    (2, 48, 6, 48, 3, 1, 1, 1, 3),
    (0, 16, 9, 8, 3, 1, 1, 1, 1),
]


def convolution(case: tuple[int, ...], dtype: torch.dtype, **changes: Any) -> list[Any]:
    """The arguments of ``conv2d``."""
    images, channels, size, out, kernel, stride, padding, dilation, groups = case
    x = codes((images, channels, size, size), dtype).contiguous(memory_format=LAST)
    weight, scales, bias = weight_of(out, channels // groups, kernel, kernel)
    given: dict[str, Any] = {
        "x": x,
        "x_scale": scale(0.02),
        "x_zero_point": zero_of(dtype),
        "weight": weight,
        "weight_scale": scales,
        "bias": bias,
        "stride": [stride] * 2,
        "padding": [padding] * 2,
        "dilation": [dilation] * 2,
        "groups": groups,
        "y_scale": scale(0.11),
        "y_zero_point": zero_of(dtype),
        "quant_min": range_of(dtype)[0],
        "quant_max": range_of(dtype)[1],
        "relu": False,
        "residual": None,
        "residual_scale": None,
        "residual_zero_point": None,
    }
    return list({**given, **changes}.values())


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_conv2d(case, dtype):
    check_bits(torch.ops.qtoolkit.conv2d, *convolution(case, dtype))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", CODES)
def test_conv2d_with_other_epilogues(dtype, relu):
    case = CONVOLUTIONS[0]
    conv2d = torch.ops.qtoolkit.conv2d
    floats = {"y_scale": None, "y_zero_point": None, "relu": relu}
    check_bits(conv2d, *convolution(case, dtype, **floats))
    check_bits(conv2d, *convolution(case, dtype, bias=None, relu=relu))
    check_bits(conv2d, *convolution(case, dtype, weight_scale=scale(0.004).reshape(1)))
    check_bits(
        conv2d, *convolution(case, dtype, quant_min=3, quant_max=90, y_zero_point=zero_point(9))
    )
    for other in CODES:
        residual = codes((2, 24, 9, 9), other, 4)
        added = {
            "residual": residual,
            "residual_scale": scale(0.07),
            "residual_zero_point": zero_of(other),
            "relu": relu,
        }
        check_bits(conv2d, *convolution(case, dtype, **added))
        added["residual"] = residual[:, :, :1, :1]
        check_bits(conv2d, *convolution(case, dtype, **added))


def test_conv2d_of_the_largest_codes():
    case = (1, 512, 5, 16, 3, 1, 1, 1, 1)
    arguments = convolution(case, torch.uint8, x_zero_point=zero_point(255))
    arguments[0] = torch.zeros_like(arguments[0])
    arguments[3] = torch.full_like(arguments[3], -127)
    check_bits(torch.ops.qtoolkit.conv2d, *arguments)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(1, 512), (65, 100), (3, 5, 48), (0, 16), (7,)], ids=str)
@pytest.mark.parametrize("floats", [False, True])
def test_linear(shape, dtype, floats):
    weight, scales, bias = weight_of(131, shape[-1])
    output = (None, None) if floats else (scale(0.2), zero_of(dtype))
    check_bits(
        torch.ops.qtoolkit.linear,
        codes(shape, dtype),
        scale(0.03),
        zero_of(dtype),
        weight,
        scales,
        bias,
        *output,
        *range_of(dtype),
        floats,
    )


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("windows", [(3, 2, 1, 1), (2, 2, 0, 1), (3, 1, 1, 2)], ids=str)
def test_max_pool2d(windows, dtype):
    x = codes((2, 19, 13, 10), dtype)
    pairs = [[number] * 2 for number in windows]
    for ceil_mode in (False, True):
        check_bits(torch.ops.qtoolkit.max_pool2d, x, *pairs, ceil_mode)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("size", [(1, 1), (3, 2), (7, 7)], ids=str)
def test_adaptive_avg_pool2d(size, dtype):
    x = codes((3, 21, 7, 9), dtype)
    given = x, scale(0.05), zero_of(dtype), list(size), scale(0.031), zero_of(dtype)
    check_bits(torch.ops.qtoolkit.adaptive_avg_pool2d, *given, *range_of(dtype))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("dims", [[2, 3], [1], [0, 2], [-1]], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_mean_and_sum(dims, dtype, memory_format):
    x = codes((3, 21, 7, 9), dtype).contiguous(memory_format=memory_format)
    for keepdim in (False, True):
        given = x, scale(0.05), zero_of(dtype), dims, keepdim, scale(0.031), zero_of(dtype)
        check_bits(torch.ops.qtoolkit.mean, *given, *range_of(dtype))
        check_bits(torch.ops.qtoolkit.sum, *given, *range_of(dtype))


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("shape", [(2, 5, 7, 3), (1, 5, 1, 1), (3,), (1,)], ids=str)
def test_add(shape, dtype):
    a, b = codes((2, 5, 7, 3), dtype), codes(shape, torch.uint8, 5)
    b_qparams = scale(0.09), zero_of(torch.uint8)
    y_qparams = scale(0.1), zero_of(dtype), *range_of(dtype)
    for relu in (False, True):
        for first in (a, a.contiguous(memory_format=LAST)):
            arguments = first, scale(0.02), zero_of(dtype), b, *b_qparams, *y_qparams, relu
            check_bits(torch.ops.qtoolkit.add, *arguments)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("dtype", CODES)
def test_quantize_and_dequantize(dtype, memory_format):
    x = values((3, 7, 9, 5)).contiguous(memory_format=memory_format)
    check_bits(ops.quantize_per_tensor, x, scale(0.25), zero_of(dtype), *range_of(dtype))
    check_bits(ops.quantize_per_tensor, x.half(), scale(0.25), zero_of(dtype), *range_of(dtype))
    q = codes((3, 7, 9, 5), dtype).contiguous(memory_format=memory_format)
    check_bits(ops.dequantize_per_tensor, q, scale(0.25), zero_of(dtype))


class Block(nn.Module):
    """What a ResNet is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, 2, 3)
        self.a = nn.Conv2d(16, 32, 3, 2, 1)
        self.b = nn.Conv2d(32, 32, 3, 1, 1)
        self.down = nn.Conv2d(16, 32, 1, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.stem(x)), 3, 2, 1)
        x = torch.relu(self.b(torch.relu(self.a(x))) + self.down(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("preset", ["x86", "tensorrt"])
def test_a_network_on_the_gpu_gives_the_bits_of_the_cpu(preset):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    prepared = qt.prepare(Block().eval(), qt.get_default_qconfig_mapping(preset), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    quantized = qt.convert(prepared)
    with torch.no_grad():
        expected = quantized(x)
        assert torch.equal(quantized.cuda()(x.cuda()).cpu(), expected)
