"""quantize and dequantize against plain torch."""

import pytest
import torch
from op_reference import PATHS, forced_path, random_codes, scale, seeded, zero_point

from qtoolkit import ops

RANGES = [(0, 255, 128), (-128, 127, 0), (-127, 127, 0), (0, 15, 7), (-8, 7, -1), (0, 255, 0)]
SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 5, 7), (2, 3, 2, 3, 2), (0, 4), (70_001,)]


def values(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed)) * 3


def expected_codes(x, s, z, quant_min, quant_max):
    codes = ((x * (1.0 / s)).double().round() + z).clamp(quant_min, quant_max)
    return codes.to(torch.int8 if quant_min < 0 else torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("quant_min", "quant_max", "zp"), RANGES)
def test_per_tensor_equals_plain_torch(shape, quant_min, quant_max, zp):
    x, s, z = values(shape), scale(0.037), zero_point(zp)
    q = ops.quantize_per_tensor(x, s, z, quant_min, quant_max)
    torch.testing.assert_close(q, expected_codes(x, s, z, quant_min, quant_max), rtol=0, atol=0)
    real = ops.dequantize_per_tensor(q, s, z)
    assert torch.equal(real, (q.int() - z).float() * s)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3, 5), (4, 1, 9), (0, 4, 2)], ids=str)
@pytest.mark.parametrize("ch_axis", [0, 1, -1])
@pytest.mark.parametrize("signed", [False, True])
def test_per_channel_equals_plain_torch(shape, ch_axis, signed):
    x = values(shape)
    channels = shape[ch_axis]
    quant_min, quant_max = (-128, 127) if signed else (0, 255)
    s = torch.rand(channels, generator=seeded(1)) * 0.1 + 0.01
    z = torch.randint(quant_min, quant_max, (channels,), generator=seeded(2)).int()
    along = [1] * len(shape)
    along[ch_axis] = channels
    q = ops.quantize_per_channel(x, s, z, ch_axis, quant_min, quant_max)
    assert torch.equal(q, expected_codes(x, s.view(along), z.view(along), quant_min, quant_max))
    real = ops.dequantize_per_channel(q, s, z, ch_axis)
    assert torch.equal(real, (q.int() - z.view(along)).float() * s.view(along))


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    x, codes = values(1031), random_codes((1031,), torch.int8)
    s, z = scale(0.011), zero_point(-3)
    with forced_path("quantize", path):
        q = ops.quantize_per_tensor(x, s, z, -128, 127)
    assert torch.equal(q, expected_codes(x, s, z, -128, 127))
    with forced_path("dequantize", path):
        real = ops.dequantize_per_tensor(codes, s, z)
    assert torch.equal(real, (codes.int() - z).float() * s)


def test_non_finite_values_have_codes():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38])
    q = ops.quantize_per_tensor(x, scale(0.5), zero_point(9), 0, 255)
    assert q.tolist() == [9, 255, 0, 255, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = values((3, 50)).to(dtype)
    q = ops.quantize_per_tensor(x, scale(0.1), zero_point(4), 0, 255)
    assert torch.equal(q, ops.quantize_per_tensor(x.float(), scale(0.1), zero_point(4), 0, 255))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_is_kept(memory_format):
    x = values((2, 3, 4, 5)).contiguous(memory_format=memory_format)
    s = torch.tensor([0.1, 0.2, 0.3])
    z = torch.tensor([1, 2, 3], dtype=torch.int32)
    q = ops.quantize_per_channel(x, s, z, 1, 0, 255)
    assert q.stride() == x.stride()
    assert torch.equal(q, ops.quantize_per_channel(x.contiguous(), s, z, 1, 0, 255))
    real = ops.dequantize_per_channel(q, s, z, 1)
    assert real.stride() == x.stride()
    assert torch.equal(real, ops.dequantize_per_channel(q.contiguous(), s, z, 1))


def test_views_are_read_right():
    x = values((6, 8, 10))[::2, 1:, ::3]
    q = ops.quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    assert torch.equal(q, expected_codes(x, scale(0.1), zero_point(0), -128, 127))
    codes = random_codes((6, 8, 10)).transpose(0, 2)
    real = ops.dequantize_per_tensor(codes, scale(0.5), zero_point(3))
    assert torch.equal(real, (codes.int() - 3).float() * 0.5)
    strided_scale = torch.tensor([0.1, 9.0, 0.2, 9.0, 0.3, 9.0])[::2]
    z = torch.zeros(3, dtype=torch.int32)
    assert torch.equal(
        ops.quantize_per_channel(values((3, 4)), strided_scale, z, 0, -128, 127),
        ops.quantize_per_channel(values((3, 4)), torch.tensor([0.1, 0.2, 0.3]), z, 0, -128, 127),
    )


def test_a_float_that_requires_grad_gives_codes_without_one():
    x = values((3, 4)).requires_grad_()
    q = ops.quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    assert not q.requires_grad
    learned = scale(0.1).requires_grad_()
    assert not ops.dequantize_per_tensor(q, learned, zero_point(0)).requires_grad
