"""fake_quantize against torch.fake_quantize_*_affine and autograd."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_reference import PATHS, forced_path, scale, seeded, zero_point

from qtoolkit import ops

SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 5, 7), (0, 4), (70_001,)]
RANGES = [(0, 255, 128), (-128, 127, 0), (-127, 127, 0), (0, 15, 7), (-8, 7, -1), (0, 255, 255)]


def values(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed)) * 3


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def forward_and_gradient(function, x):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(leaf)
    y.backward(torch.arange(y.numel(), dtype=y.dtype).view(y.shape) - 3)
    return y.detach(), leaf.grad


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("quant_min", "quant_max", "zp"), RANGES)
def test_per_tensor_equals_torch_bit_for_bit(shape, quant_min, quant_max, zp):
    x, s, z = values(shape), scale(0.021), zero_point(zp)
    y, grad = forward_and_gradient(
        lambda t: ops.fake_quantize_per_tensor(t, s, z, quant_min, quant_max), x
    )
    expected, expected_grad = forward_and_gradient(
        lambda t: torch.fake_quantize_per_tensor_affine(t, s, z, quant_min, quant_max), x
    )
    assert same_bits(y, expected)
    assert torch.equal(grad, expected_grad)  # torch has -0.0 where a gradient is masked


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3])
def test_per_channel_equals_torch_bit_for_bit(ch_axis, memory_format):
    x = values((4, 3, 5, 6)).contiguous(memory_format=memory_format)
    channels = x.size(ch_axis)
    s = torch.rand(channels, generator=seeded(1)) * 0.05 + 0.001
    z = torch.randint(-20, 20, (channels,), generator=seeded(2)).int()
    y, grad = forward_and_gradient(
        lambda t: ops.fake_quantize_per_channel(t, s, z, ch_axis, -128, 127), x
    )
    expected, expected_grad = forward_and_gradient(
        lambda t: torch.fake_quantize_per_channel_affine(t, s, z, ch_axis, -128, 127), x
    )
    assert same_bits(y, expected)
    assert torch.equal(grad, expected_grad)  # torch has -0.0 where a gradient is masked
    assert y.stride() == x.stride()
    negative = ops.fake_quantize_per_channel(x, s, z, ch_axis - 4, -128, 127)
    assert same_bits(negative, y)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    xs=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40),
    s=st.floats(min_value=2**-20, max_value=2.0**20, width=32),
    zp=st.integers(0, 255),
)
def test_any_value_equals_torch(xs, s, zp):
    x = torch.tensor(xs, dtype=torch.float32)
    x = x[(x * (1.0 / scale(s))).abs() < 2**31]  # torch overflows int64 beyond it
    y, grad = forward_and_gradient(
        lambda t: ops.fake_quantize_per_tensor(t, scale(s), zero_point(zp), 0, 255), x
    )
    expected, expected_grad = forward_and_gradient(
        lambda t: torch.fake_quantize_per_tensor_affine(t, scale(s), zero_point(zp), 0, 255), x
    )
    assert torch.equal(y, expected)
    assert torch.equal(grad, expected_grad)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    s=st.floats(min_value=2**-10, max_value=2.0**10, width=32),
    zp=st.integers(-128, 127),
    seed=st.integers(0, 1000),
)
def test_it_is_idempotent_and_quantize_then_dequantize(s, zp, seed):
    x = values((50,), seed) * 100 * s
    args = (scale(s), zero_point(zp), -128, 127)
    y = ops.fake_quantize_per_tensor(x, *args)
    q = ops.quantize_per_tensor(x, *args)
    assert torch.equal(y, ops.dequantize_per_tensor(q, scale(s), zero_point(zp)))
    assert torch.equal(ops.fake_quantize_per_tensor(y, *args), y)


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    x = values((1031,))
    s, z = scale(0.013), zero_point(7)
    with forced_path("fake_quantize", path):
        y = ops.fake_quantize_per_tensor(x, s, z, 0, 255)
    assert same_bits(y, torch.fake_quantize_per_tensor_affine(x, s, z, 0, 255))
    with forced_path("mask_gradient", path):
        leaf = x.clone().requires_grad_()
        ops.fake_quantize_per_tensor(leaf, s, z, 0, 255).sum().backward()
    inside = ((x * (1.0 / s)).round() + z >= 0) & ((x * (1.0 / s)).round() + z <= 255)
    assert torch.equal(leaf.grad, inside.float())


def test_gradient_is_straight_through():
    x = values((200,)).requires_grad_()
    y = ops.fake_quantize_per_tensor(x, scale(0.01), zero_point(0), -128, 127)
    (y * torch.arange(200)).sum().backward()
    through = values((200,)).requires_grad_()
    inside = (through.detach() * 100).round().clamp(-128, 127) == (through.detach() * 100).round()
    surrogate = torch.where(inside, through + (y.detach() - through).detach(), y.detach())
    (surrogate * torch.arange(200)).sum().backward()
    assert torch.equal(x.grad, through.grad)


def test_non_finite_values():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0], requires_grad=True)
    y = ops.fake_quantize_per_tensor(x, scale(0.5), zero_point(8), 0, 255)
    assert y[0].isnan()
    assert y[1:].tolist() == [123.5, -4.0, 1.0]
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    x = values((40, 3)).to(dtype).requires_grad_()
    y = ops.fake_quantize_per_tensor(x, scale(0.05), zero_point(100), 0, 255)
    full = ops.fake_quantize_per_tensor(x.detach().float(), scale(0.05), zero_point(100), 0, 255)
    assert y.dtype == dtype
    assert torch.equal(y, full.to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.unique().tolist() in ([0, 1], [1])


def test_numbers_serve_as_parameters():
    x = values((4, 5))
    assert torch.equal(
        ops.fake_quantize_per_tensor(x, 0.1, 3, 0, 255),
        ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(3), 0, 255),
    )
    assert torch.equal(
        ops.fake_quantize_per_channel(x, 0.1, 3, 1, 0, 255),
        ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(3), 0, 255),
    )


def test_parameters_get_no_gradient():
    x = values((9,)).requires_grad_()
    s = scale(0.1).requires_grad_()
    ops.fake_quantize_per_tensor(x, s, zero_point(0), -128, 127).sum().backward()
    assert x.grad is not None
    assert s.grad is None


@pytest.mark.parametrize("per_channel", [False, True])
def test_double_backward_passes_the_same_mask(per_channel):
    x = (values((6, 4)) * 10).requires_grad_()
    if per_channel:
        z = torch.zeros(4, dtype=torch.int32)
        y = ops.fake_quantize_per_channel(x, torch.full((4,), 0.1), z, 1, -128, 127)
    else:
        y = ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    upstream = values((6, 4), 5).requires_grad_()
    (grad,) = torch.autograd.grad(y, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), upstream)
    mask = ((x * 10).round().abs() <= 127).float()
    assert 0 < mask.sum() < mask.numel()
    torch.testing.assert_close(second, 2 * upstream.detach() * mask)


def test_gradient_mode_changes_no_bits():
    x = values((500,)).requires_grad_()
    with torch.no_grad():
        plain = ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    with torch.inference_mode():
        inference = ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    tracked = ops.fake_quantize_per_tensor(x, scale(0.1), zero_point(0), -128, 127)
    assert not plain.requires_grad
    assert tracked.requires_grad
    assert torch.equal(plain, inference)
    assert torch.equal(plain, tracked)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_forward_and_backward(dynamic):
    def step(x):
        y = ops.fake_quantize_per_tensor(x * 2, 0.1, 3, 0, 255)
        s, z = torch.full((x.size(1),), 0.2), torch.ones(x.size(1), dtype=torch.int32)
        return ops.fake_quantize_per_channel(y, s, z, 1, -128, 127).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 5):
        x = values((rows, 4), rows).requires_grad_()
        eager = x.detach().clone().requires_grad_()
        y, expected = compiled(x), step(eager)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, eager.grad)


@pytest.mark.parametrize("per_channel", [False, True])
def test_only_x_makes_the_result_require_a_gradient(per_channel):
    s = torch.tensor([0.1, 0.2] if per_channel else 0.1, requires_grad=True)
    z = torch.zeros_like(s, dtype=torch.int32)
    axis = (1,) if per_channel else ()
    name = f"fake_quantize_per_{'channel' if per_channel else 'tensor'}"
    x = values((3, 2))
    assert not getattr(ops, name)(x, s, z, *axis, 0, 255).requires_grad
    leaf = x.clone().requires_grad_()
    y = getattr(ops, name)(leaf, s, z, *axis, 0, 255)
    y.sum().backward()
    assert torch.equal(leaf.grad, (x > 0).float())
    assert s.grad is None
