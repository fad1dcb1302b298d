"""Ternary, binary and small floats against the papers' formulas, torch's casts and tables."""

import pytest
import torch
from op_reference import PATHS, forced_path, seeded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qtoolkit import ops
from qtoolkit.formats import FORMATS, NumberFormat

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
# E2M1, by the rows of its bits: OCP MX v1.0, table 5.
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
ONE = torch.tensor([1.0])


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def float_args(fmt: NumberFormat) -> tuple[int, int, float]:
    return fmt.mantissa_bits, fmt.min_exponent, fmt.max_value


def nearest_e2m1(v: Tensor) -> Tensor:
    """By distance to every number; of two that are equally near, the one with the even row."""
    distance = (v.double().abs().unsqueeze(-1) - E2M1.double()).abs()
    odd = torch.arange(8) % 2
    row = (distance + 1e-12 * odd).argmin(-1)
    return E2M1[row].copysign(v)


def spread(count: int = 20_000, seed: int = 0) -> Tensor:
    """Numbers of every size that float32 has."""
    bits = torch.randint(-(2**31), 2**31, (count,), generator=seeded(seed))
    x = bits.to(torch.int32).view(torch.float32)
    return x[x.isfinite()]


def half_way(x: Tensor) -> Tensor:
    """x, the points midway between neighbours in x, and the floats beside those."""
    x = x.double().unique()
    middle = ((x[1:] + x[:-1]) / 2).float()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([x.float(), middle, middle.nextafter(up), middle.nextafter(down)])


@pytest.mark.parametrize("name", DTYPES)
def test_floats_are_torchs_casts(name):
    fmt, dtype = FORMATS[name], DTYPES[name]
    width = torch.uint8 if fmt.bits == 8 else torch.int16
    every = torch.arange(2**fmt.bits).to(width).view(dtype).float()
    every = every[every.isfinite()]
    x = torch.cat([half_way(every), spread(), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    y = ops.fake_quantize_float(x, ONE, None, *float_args(fmt))
    expected = x.clamp(-fmt.max_value, fmt.max_value).to(dtype).float()
    assert torch.equal(y.view(torch.int32), expected.view(torch.int32))
    assert ops.fake_quantize_float(torch.tensor([torch.nan]), ONE, None, *float_args(fmt)).isnan()


def test_e2m1_is_its_table():
    x = torch.cat([half_way(torch.cat([-E2M1, E2M1])), values(5000) * 3, spread()])
    y = ops.fake_quantize_float(x, ONE, None, *float_args(FORMATS["mxfp4"]))
    assert torch.equal(y, nearest_e2m1(x.clamp(-6, 6)))


@pytest.mark.parametrize("ch_axis", [None, 0, 1, 2, 3])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float_scales_by_tensor_and_channel(ch_axis, memory_format):
    x = leaf((values(5, 3, 4, 70) * 8).contiguous(memory_format=memory_format))
    scale, shape = torch.tensor([0.3]), [1, 1, 1, 1]
    if ch_axis is not None:
        shape[ch_axis] = x.size(ch_axis)
        scale = torch.rand(x.size(ch_axis), generator=seeded(1)) + 0.1
    y = ops.fake_quantize_float(x, scale, ch_axis, *float_args(FORMATS["mxfp4"]))
    v = x.detach() * (1.0 / scale.view(shape))
    assert torch.equal(y, nearest_e2m1(v.clamp(-6, 6)) * scale.view(shape))
    assert y.stride() == x.stride()
    grad = values(5, 3, 4, 70, seed=2)
    y.backward(grad)
    assert torch.equal(x.grad, torch.where(v.abs() <= 6, grad, 0))
    assert 0.01 < (x.grad == 0).float().mean() < 0.9


def plain_mx(x: Tensor, fmt: NumberFormat) -> Tensor:
    """OCP MX v1.0, section 6.3, for rows of whole blocks."""
    blocks = x.double().unflatten(-1, (-1, fmt.block_size))
    amax = blocks.abs().amax(-1, keepdim=True)
    largest = torch.tensor(fmt.max_value).double().log2().floor()
    scale = torch.exp2((amax.log2().floor() - largest).clamp(-127, 127))
    v = (blocks / scale).clamp(-fmt.max_value, fmt.max_value).float()
    rounded = nearest_e2m1(v) if fmt.mantissa_bits == 1 else v.to(torch.float8_e4m3fn).float()
    return (rounded * scale).flatten(-2).float()


def block_args(fmt: NumberFormat) -> tuple:
    return fmt.block_size, *float_args(fmt), fmt.scale_format


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("shape", [(32,), (7, 64), (3, 5, 96), (1, 2048)], ids=str)
def test_blocks_follow_the_specification(name, shape):
    x = values(*shape) * torch.exp2(values(*shape, seed=1) * 20)
    y = ops.fake_quantize_block_float(x, None, *block_args(FORMATS[name]))
    assert torch.equal(y, plain_mx(x, FORMATS[name]))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_a_short_last_block_is_a_block_with_zeros(name):
    x = values(6, 50)
    args = block_args(FORMATS[name])
    padded = torch.nn.functional.pad(x, (0, -50 % FORMATS[name].block_size))
    expected = ops.fake_quantize_block_float(padded, None, *args)[:, :50]
    assert torch.equal(ops.fake_quantize_block_float(x, None, *args), expected)
    by_row = [ops.fake_quantize_block_float(row, None, *args) for row in x]
    if name != "nvfp4":  # whose tensor scale is that of all rows
        assert torch.equal(torch.stack(by_row), expected)


def plain_nvfp4(x: Tensor, tensor_scale: Tensor) -> Tensor:
    blocks = x.unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    scale = (amax / 6 / tensor_scale).clamp(max=448).to(torch.float8_e4m3fn).float() * tensor_scale
    v = torch.where(scale > 0, blocks * (1.0 / scale), 0.0).clamp(-6, 6)
    return (nearest_e2m1(v) * scale).flatten(-2)


@pytest.mark.parametrize("given", [None, 0.001, 0.5, 1e4])
def test_nvfp4_has_two_levels_of_scales(given):
    x = values(9, 160) * torch.exp2(values(9, 160, seed=1) * 4)
    tensor_scale = x.abs().max() / (448 * 6) if given is None else torch.tensor(given)
    args = block_args(FORMATS["nvfp4"])
    y = ops.fake_quantize_block_float(x, None if given is None else tensor_scale.view(1), *args)
    assert torch.equal(y, plain_nvfp4(x, tensor_scale))
    if given is None:
        assert (y - x).norm() < 0.15 * x.norm()


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8", "nvfp4"])
def test_blocks_of_zeros_infinities_and_nan(name):
    args = block_args(FORMATS[name])
    size = FORMATS[name].block_size
    x = torch.zeros(4, size)
    assert torch.equal(ops.fake_quantize_block_float(x, None, *args), x)
    x[1, 0], x[2, 0], x[3] = torch.inf, torch.nan, 1.0
    y = ops.fake_quantize_block_float(x, torch.tensor([0.1]) if name == "nvfp4" else None, *args)
    assert (y[1, 0] > 10).item()
    assert y[2, 0].isnan()
    assert y[:3, 1:].abs().max() == 0
    torch.testing.assert_close(y[3], x[3], rtol=0.1, atol=0)


def test_a_nan_hides_nothing_from_the_scale_of_a_tensor():
    """Whatever part of the work it lies in."""
    x = values(1 << 17)
    x[5], x[7] = 9.0, float("nan")
    args = block_args(FORMATS["nvfp4"])
    y = ops.fake_quantize_block_float(x, None, *args)
    x[7] = 0.0
    expected = ops.fake_quantize_block_float(x, None, *args)
    assert torch.equal(y[16:], expected[16:])


def test_ternary_is_that_of_the_paper():
    """Li et al., section 3: the threshold 0.7 mean |w| and the mean of what is beyond it."""
    w = leaf(values(64, 90))
    size = w.detach().abs()
    threshold = 0.7 * size.mean(1)
    beyond = size > threshold.view(-1, 1)
    scale = (size * beyond).sum(1) / beyond.sum(1)
    y = ops.fake_quantize_ternary(w, scale, threshold, 0)
    expected = scale.view(-1, 1) * w.detach().sign() * beyond
    assert torch.equal(y, expected)
    grad = values(64, 90, seed=1)
    y.backward(grad)
    assert torch.equal(w.grad, grad)
    whole = ops.fake_quantize_ternary(w, scale[:1], threshold[:1])
    beyond = size > threshold[0]
    assert torch.equal(whole, scale[0] * w.detach().sign() * beyond)


def test_binary_is_that_of_the_paper():
    """Rastegari et al., section 3.1: sign(w) times the mean of |w|."""
    w = leaf(values(64, 91) * 1.5)
    scale = w.detach().abs().mean(1)
    y = ops.fake_quantize_binary(w, scale, 0)
    assert torch.equal(y, scale.view(-1, 1) * torch.where(w >= 0, 1.0, -1.0))
    grad = values(64, 91, seed=1)
    y.backward(grad)
    assert torch.equal(w.grad, torch.where(w.abs() <= 1, grad, 0))
    everywhere = leaf(w)
    ops.fake_quantize_binary(everywhere, scale, 0, torch.inf).backward(grad)
    assert torch.equal(everywhere.grad, grad)


def ternary(x: Tensor) -> Tensor:
    return ops.fake_quantize_ternary(x, torch.full((x.size(1),), 0.8), torch.full((30,), 0.5), 1)


def binary(x: Tensor) -> Tensor:
    return ops.fake_quantize_binary(x, torch.tensor([0.8]), None, 1.2)


def small_float(x: Tensor) -> Tensor:
    return ops.fake_quantize_float(x, torch.full((30,), 0.3), 1, 1, 0, 6.0)


def block_float(x: Tensor) -> Tensor:
    return ops.fake_quantize_block_float(x, None, 16, 1, 0, 6.0, "e4m3")


FUNCTIONS = {
    "fake_quantize_ternary": ternary,
    "fake_quantize_binary": binary,
    "fake_quantize_float": small_float,
    "fake_quantize_block_float": block_float,
}
EACH = pytest.mark.parametrize("function", FUNCTIONS.values())


def gradients(function, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = leaf(x)
    y = function(x)
    y.backward(grad)
    return [y.detach(), x.grad]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_paths_agree(name, path):
    x, grad = values(400, 30), values(400, 30, seed=1)
    expected = gradients(FUNCTIONS[name], x, grad)
    with forced_path(name, path):
        y = FUNCTIONS[name](x)
    assert torch.equal(y, expected[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@EACH
def test_half_precision_is_computed_in_float32(function, dtype):
    x, grad = (values(90, 30) * 2).to(dtype), values(90, 30, seed=1).to(dtype)
    y, grad_x = gradients(function, x, grad)
    full_y, full_grad = gradients(function, x.float(), grad.float())
    assert_same([y, grad_x], [full_y.to(dtype), full_grad.to(dtype)])


@EACH
def test_a_tensor_in_any_layout(function):
    x, grad = values(64, 30), values(64, 30, seed=1)
    expected = gradients(function, x, grad)
    assert_same(gradients(function, x.t().contiguous().t(), grad), expected)
    assert function(values(0, 30)).shape == (0, 30)


@pytest.mark.parametrize("function", [ternary, binary, small_float])
def test_it_is_idempotent(function):
    y = function(values(64, 30) * 2)
    assert torch.equal(function(y), y)


@EACH
def test_double_backward_is_linear(function):
    x, upstream = leaf(values(40, 30) * 2), values(40, 30, seed=5).requires_grad_()
    (grad,) = torch.autograd.grad(function(x), x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad.pow(2).sum(), upstream)
    assert torch.equal(second, 2 * grad.detach())


@EACH
def test_parameters_and_plain_inputs_get_no_gradient(function):
    assert not function(values(40, 30)).requires_grad
    scale = torch.tensor([0.5], requires_grad=True)
    y = ops.fake_quantize_binary(leaf(values(9)), scale)
    y.sum().backward()
    assert scale.grad is None


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@EACH
def test_it_compiles_forward_and_backward(function, backend):
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for rows in (40, 50):
        x, grad = values(rows, 30, seed=rows) * 2, values(rows, 30, seed=1)
        assert_same(gradients(compiled, x, grad), gradients(function, x, grad))


@EACH
def test_checkpointing_changes_no_bits(function):
    x, grad = values(70, 30) * 2, values(70, 30, seed=1)
    checkpointed = gradients(lambda t: checkpoint(function, t, use_reentrant=False), x, grad)
    assert_same(checkpointed, gradients(function, x, grad))
