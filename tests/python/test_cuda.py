"""The CUDA operators give the CPU operators' bits."""

import pytest
import torch
from op_reference import scale, seeded, zero_point
from torch import Tensor

from qtoolkit import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"
)

SHAPES = [(), (1,), (7,), (1000,), (1_000_003,), (2, 3, 5, 7), (4, 64, 9, 9), (3, 1, 40), (0, 4)]
RANGES = [(0, 255, 128), (-128, 127, 0), (-127, 127, 0), (0, 15, 3), (-8, 7, -1)]
SPECIAL = torch.tensor(
    [
        *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45),
        *(3.4028235e38, -3.4028235e38, 1e10, -1e10, 0.125, -0.125, 0.375, 0.625),
    ]
)


def values(shape: tuple[int, ...], special: bool = True) -> Tensor:
    """Random values; some of them, if `special`, are not finite, huge, tiny or exact ties."""
    x = torch.randn(shape, generator=seeded()) * 20
    if special:
        chosen = SPECIAL[torch.randint(len(SPECIAL), shape, generator=seeded(1))]
        x = torch.where(torch.rand(shape, generator=seeded(2)) < 0.2, chosen, x)
    return x


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    assert actual.is_cuda
    assert actual.stride() == expected.stride()
    bits = torch.int32 if expected.dtype == torch.float32 else torch.int16
    return torch.equal(actual.cpu().view(bits), expected.view(bits))


def on_cpu_and_gpu(function, *tensors: Tensor):
    return function(*(tensor.cuda() for tensor in tensors)), function(*tensors)


def with_gradient(function):
    """function(x, …) and the gradient of x for a fixed gradient of the output."""

    def call(x: Tensor, grad: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf, *rest)
        y.backward(grad)
        return y.detach(), leaf.grad

    return call


def check_fake_quantize(function, x: Tensor, s: Tensor, z: Tensor) -> None:
    grad = torch.randn(x.shape, generator=seeded(3)).to(x.dtype)
    (y, x_grad), (expected, expected_grad) = on_cpu_and_gpu(with_gradient(function), x, grad, s, z)
    assert same_bits(y, expected)
    assert same_bits(x_grad.contiguous(), expected_grad.contiguous())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("quant_min", "quant_max", "zp"), RANGES)
def test_fake_quantize_per_tensor(shape, quant_min, quant_max, zp):
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_tensor(x, s, z, quant_min, quant_max),
        values(shape),
        scale(0.25),
        zero_point(zp),
    )


@pytest.mark.parametrize("s", [1e-40, 1e-30, 0.037, 3e38])
def test_fake_quantize_with_extreme_scales(s):
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_tensor(x, s, z, 0, 255),
        values((5000,)),
        scale(s),
        zero_point(100),
    )


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_fake_quantize_of_unaligned_memory(offset):
    x, s, z = values((1027,)), scale(0.25), zero_point(9)
    y = ops.fake_quantize_per_tensor(x.cuda()[offset:], s.cuda(), z.cuda(), 0, 255)
    assert same_bits(y, ops.fake_quantize_per_tensor(x[offset:], s, z, 0, 255))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3, -1])
def test_fake_quantize_per_channel(ch_axis, memory_format):
    x = values((4, 33, 5, 6)).contiguous(memory_format=memory_format)
    channels = x.size(ch_axis)
    s = torch.rand(channels, generator=seeded(4)) * 0.3 + 0.01
    z = torch.randint(-20, 20, (channels,), generator=seeded(5)).int()
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_channel(x, s, z, ch_axis, -128, 127), x, s, z
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_quantize_of_half_precision(dtype):
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_tensor(x, s, z, 0, 255),
        values((999,), special=False).to(dtype),
        scale(0.25),
        zero_point(128),
    )


def check_min_max(function, x: Tensor) -> None:
    actual, expected = on_cpu_and_gpu(function, x)
    for a, e in zip(actual, expected, strict=True):
        assert same_bits(a, e)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_min_max(shape, special):
    check_min_max(ops.min_max, values(shape, special))


@pytest.mark.parametrize("at", [0, 31, 32, 255, 256, 70_000, 99_999])
def test_min_max_finds_a_single_value(at):
    x = torch.full((100_000,), 0.5)
    x[at] = -3.0
    check_min_max(ops.min_max, x)
    x[at] = float("nan")
    check_min_max(ops.min_max, x)


def test_min_max_of_zeros_of_both_signs():
    check_min_max(ops.min_max, torch.tensor([0.0, -0.0] * 500))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 3, 31, 17), (2, 65, 7, 9), (70, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3])
def test_min_max_per_channel(shape, ch_axis, memory_format, special):
    x = values(shape, special).contiguous(memory_format=memory_format)
    if special:  # leave some channels without NaN
        x = torch.where(torch.rand(shape, generator=seeded(6)) < 0.99, x.nan_to_num(), x)
    check_min_max(lambda x: ops.min_max_per_channel(x, ch_axis), x)


def test_scale_on_another_device_is_an_error():
    x = values((10,)).cuda()
    with pytest.raises(ValueError, match="scale"):
        ops.fake_quantize_per_tensor(x, scale(0.25), zero_point(0), 0, 255)
