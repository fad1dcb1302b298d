"""fake_quantize_lsq and fake_quantize_pact against the papers' formulas and PyTorch's operators."""

import pytest
import torch
from op_reference import PATHS, forced_path, seeded
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtoolkit import ops

RANGES = [(-8, 7), (-127, 127), (0, 15), (0, 255)]


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def parameter(*value: float) -> Tensor:
    return torch.tensor(value).requires_grad_()


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_()


def straight_through(value: Tensor, rounded: Tensor) -> Tensor:
    return value + (rounded - value).detach()


def plain_lsq(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    grad_scale: float,
) -> Tensor:
    """The forward of the papers, in float64 where autograd derives everything else.

    scale and zero_point broadcast with x. Which element is inside is decided in float32, because
    there a tie may lie elsewhere.
    """

    def scaled_gradient(p: Tensor) -> Tensor:
        return p * grad_scale + (p - p * grad_scale).detach()

    s = scaled_gradient(scale.double())
    z = scaled_gradient(zero_point.double()) if zero_point is not None else torch.zeros(())
    z = straight_through(z, z.round())
    rounded = (x.float() * (1.0 / scale.float())).round().double().detach()
    inside = (rounded + z >= quant_min) & (rounded + z <= quant_max)
    v = x.double() / s
    clamped = (rounded + z).detach().clamp(quant_min, quant_max)
    return (torch.where(inside, straight_through(v, rounded) + z, clamped) - z) * s


def away_from_ties(x: Tensor, scale: float | Tensor) -> Tensor:
    """torch adds the zero point before it rounds, which moves ties."""
    v = x / scale
    return torch.where((v - v.floor() - 0.5).abs() < 1e-3, 0.0, x)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("learned_zero_point", [False, True])
@pytest.mark.parametrize(("quant_min", "quant_max"), RANGES)
def test_lsq_gradients_are_those_of_the_papers(quant_min, quant_max, learned_zero_point):
    s = 2.0 / (quant_max - quant_min)  # so that a good part of x is outside
    z = 0.3 * (quant_min + quant_max) + 0.3
    x, scale = leaf(values(50, 41)), parameter(s)
    zero_point = parameter(z) if learned_zero_point else None
    grad = values(50, 41, seed=1)
    y = ops.fake_quantize_lsq(x, scale, zero_point, None, quant_min, quant_max, 0.25)
    y.backward(grad)
    x64, scale64 = leaf(x), leaf(scale)
    zero_point64 = leaf(zero_point) if zero_point is not None else None
    expected = plain_lsq(x64, scale64, zero_point64, quant_min, quant_max, 0.25)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float())
    assert torch.equal(x.grad, x64.grad)
    assert 0.05 < (x.grad == 0).float().mean() < 0.95
    assert relative_error(scale.grad, scale64.grad) < 1e-5
    if zero_point is not None:
        assert relative_error(zero_point.grad, zero_point64.grad) < 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3, -3])
def test_lsq_per_channel_of_any_axis(ch_axis, memory_format):
    x = leaf(values(9, 21, 5, 6).contiguous(memory_format=memory_format))
    shape = [1, 1, 1, 1]
    shape[ch_axis] = x.size(ch_axis)
    scale = leaf(torch.rand(x.size(ch_axis), generator=seeded(1)) * 0.2 + 0.05)
    zero_point = leaf(values(x.size(ch_axis), seed=2) * 3)
    grad = values(*x.shape, seed=3)
    y = ops.fake_quantize_lsq(x, scale, zero_point, ch_axis, -8, 7, 1.0)
    y.backward(grad)
    x64, scale64, zero_point64 = leaf(x), leaf(scale), leaf(zero_point)
    expected = plain_lsq(x64, scale64.view(shape), zero_point64.view(shape), -8, 7, 1.0)
    expected.backward(grad.double())
    torch.testing.assert_close(y, expected.float())
    assert y.stride() == x.stride()
    assert torch.equal(x.grad, x64.grad)
    torch.testing.assert_close(scale.grad, scale64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(zero_point.grad, zero_point64.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_point", [0.0, 2.0, 5.0])
def test_lsq_equals_torchs_learnable_operator(zero_point):
    """The definitions agree for integers from 0; torch's backward truncates zero_point + 0.5."""
    x = leaf(away_from_ties(values(30, 70), 0.11))
    scale, z = parameter(0.11), parameter(zero_point)
    grad = values(30, 70, seed=1)
    y = ops.fake_quantize_lsq(x, scale, z, None, -8, 7, 0.5)
    y.backward(grad)
    x2, scale2, z2 = leaf(x), leaf(scale), leaf(z)
    expected = torch._fake_quantize_learnable_per_tensor_affine(x2, scale2, z2, -8, 7, 0.5)
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, x2.grad)
    torch.testing.assert_close(scale.grad, scale2.grad, rtol=1e-4, atol=0)
    torch.testing.assert_close(z.grad, z2.grad, rtol=1e-4, atol=1e-6)


def test_lsq_per_channel_equals_torchs_learnable_operator():
    scale, z = leaf(torch.linspace(0.05, 0.3, 30)), leaf(torch.arange(30) % 7 - 3.0)
    x = leaf(away_from_ties(values(6, 30, 7), scale.detach().view(30, 1)))
    grad = values(6, 30, 7, seed=1)
    y = ops.fake_quantize_lsq(x, scale, z, 1, -8, 7, 0.5)
    y.backward(grad)
    x2, scale2, z2 = leaf(x), leaf(scale), leaf(z)
    expected = torch._fake_quantize_learnable_per_channel_affine(x2, scale2, z2, 1, -8, 7, 0.5)
    expected.backward(grad)
    assert torch.equal(y, expected)
    assert torch.equal(x.grad, x2.grad)
    torch.testing.assert_close(scale.grad, scale2.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(z.grad, z2.grad, rtol=1e-4, atol=1e-5)


def test_a_trained_scale_converts_exactly():
    """LSQ gives what fake_quantize_per_tensor gives with the rounded, clamped zero point."""
    x = values(1000)
    for learned, used in ((2.4, 2), (2.5, 2), (-100.0, -8), (99.0, 7)):
        y = ops.fake_quantize_lsq(x, torch.tensor([0.13]), torch.tensor([learned]), None, -8, 7)
        assert torch.equal(y, ops.fake_quantize_per_tensor(x, 0.13, used, -8, 7))


@pytest.mark.parametrize("scale", [-0.2, 0.0, 1e-38, -0.0])
def test_a_scale_that_is_not_positive_is_used_by_size(scale):
    x, s = leaf(values(100)), parameter(scale)
    y = ops.fake_quantize_lsq(x, s, None, None, -8, 7)
    assert torch.equal(y, ops.fake_quantize_per_tensor(x, max(abs(scale), 2.0**-100), 0, -8, 7))
    y.sum().backward()
    positive = parameter(max(abs(scale), 2.0**-100))
    ops.fake_quantize_lsq(x.detach(), positive, None, None, -8, 7).sum().backward()
    negative = torch.signbit(s.detach())
    assert torch.equal(s.grad, torch.where(negative, -positive.grad, positive.grad))


def plain_pact(x: Tensor, alpha: Tensor, quant_max: int) -> Tensor:
    """Choi et al., equations 1 and 2; autograd of the clipped part."""
    clipped = 0.5 * (x.abs() - (x - alpha).abs() + alpha)
    scale = (alpha / quant_max).detach()
    return straight_through(clipped, (clipped / scale).round() * scale)


@pytest.mark.parametrize("quant_max", [3, 15, 255])
def test_pact_is_that_of_the_paper(quant_max):
    x, alpha, grad = leaf(values(60, 50) * 2), parameter(1.7), values(60, 50, seed=1)
    y = ops.fake_quantize_pact(x, alpha, quant_max)
    y.backward(grad)
    x64, alpha64 = x.detach().double().requires_grad_(), alpha.detach().double().requires_grad_()
    expected = plain_pact(x64, alpha64, quant_max)
    expected.backward(grad.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=0, atol=0)
    assert 0.5 < (x.grad == 0).float().mean() < 0.9
    assert relative_error(alpha.grad, alpha64.grad) < 1e-6


def test_pact_at_the_ends_of_the_range():
    x, alpha = parameter(-1.0, 0.0, 1.0, 2.0, 3.0, float("inf"), float("nan")), parameter(2.0)
    y = ops.fake_quantize_pact(x, alpha, 4)
    assert y[:-1].tolist() == [0, 0, 1, 2, 2, 2]
    assert y[-1].isnan()
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0, 0, 0, 0]
    assert alpha.grad.tolist() == [3]


def lsq(x: Tensor, *learned: Tensor) -> Tensor:
    return ops.fake_quantize_lsq(x, learned[0], learned[1], None, -8, 7, 0.1)


def lsq_per_channel(x: Tensor, *learned: Tensor) -> Tensor:
    scale, zero_point = (p.expand(x.size(1)).contiguous() for p in learned)
    return ops.fake_quantize_lsq(x, scale, zero_point, 1, -8, 7, 0.1)


def pact(x: Tensor, *learned: Tensor) -> Tensor:
    return ops.fake_quantize_pact(x, learned[0], 15)


FUNCTIONS = [lsq, lsq_per_channel, pact]


def gradients(function, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """The result and the gradients of x and of what is learned."""
    x, learned = leaf(x), [parameter(0.11), parameter(1.0)]
    y = function(x, *learned)
    y.backward(torch.ones_like(y) if grad is None else grad)
    return [y.detach(), x.grad, *(p.grad for p in learned if p.grad is not None)]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) >= 2
    for a, b in zip(first, second):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_paths_agree(function, path):
    x, grad = values(700, 30), values(700, 30, seed=1)
    expected = gradients(function, x, grad)
    name = "fake_quantize_pact" if function is pact else "fake_quantize_lsq"
    with forced_path(f"{name}_backward", path):
        assert_same(gradients(function, x, grad), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_number_of_threads_changes_no_bits(function):
    x, grad = values(5000, 30), values(5000, 30, seed=1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(gradients(function, x, grad))
    finally:
        torch.set_num_threads(threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_half_precision_is_computed_in_float32(function, dtype):
    x, grad = values(90, 30).to(dtype), values(90, 30, seed=1).to(dtype)
    y, grad_x, *learned = gradients(function, x, grad)
    full_y, full_grad_x, *full_learned = gradients(function, x.float(), grad.float())
    assert_same([y, grad_x, *learned], [full_y.to(dtype), full_grad_x.to(dtype), *full_learned])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_tensors(function):
    y, grad_x, *learned = gradients(function, values(0, 3))
    assert y.shape == grad_x.shape == (0, 3)
    assert all(p.tolist() == [0] for p in learned)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_gradient_that_is_not_dense(function):
    x = values(64, 48)
    expanded = torch.tensor(2.0).expand(64, 48)
    assert_same(gradients(function, x, expanded), gradients(function, x, expanded.contiguous()))
    assert_same(
        gradients(function, x.t().contiguous().t(), expanded), gradients(function, x, expanded)
    )


@pytest.mark.parametrize("function", FUNCTIONS)
def test_frozen_parameters_get_no_gradient(function):
    x, learned = leaf(values(20, 3)), [torch.tensor([0.1]), torch.tensor([1.0])]
    function(x, *learned).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in learned)
    assert not function(x.detach(), *learned).requires_grad


@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_are_an_error(function):
    x, learned = leaf(values(20, 3)), [parameter(0.1), parameter(1.0)]
    (grad,) = torch.autograd.grad(function(x, *learned).pow(2).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_compiles_forward_and_backward(function, backend):
    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for rows in (40, 50):
        x, grad = values(rows, 30, seed=rows), values(rows, 30, seed=1)
        actual, expected = gradients(compiled, x, grad), gradients(function, x, grad)
        assert_same(actual[:2], expected[:2])
        # Inductor's own sum, of expand(), has another order.
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_checkpointing_changes_no_bits(function):
    def checkpointed(*args: Tensor) -> Tensor:
        return checkpoint(function, *args, use_reentrant=False)

    x, grad = values(70, 30), values(70, 30, seed=1)
    assert_same(gradients(checkpointed, x, grad), gradients(function, x, grad))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_keeps_parameters_in_float32(function):
    torch.manual_seed(0)
    layer, learned = nn.Linear(12, 9), [parameter(0.1), parameter(1.0)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = function(layer(values(16, 12)), *learned)
        assert y.dtype == torch.bfloat16
        y.float().pow(2).sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    assert learned[0].grad.dtype == torch.float32
    assert learned[0].grad.abs() > 0


@pytest.mark.parametrize("method", ["lsq", "pact"])
def test_gradient_descent_finds_a_good_range(method):
    """From a range much too wide or narrow, the error of 4-bit codes falls to near its optimum."""
    x = values(4000).abs() if method == "pact" else values(4000)

    def error(learned: Tensor) -> Tensor:
        if method == "pact":
            return (ops.fake_quantize_pact(x, learned, 15) - x).pow(2).mean()
        return (ops.fake_quantize_lsq(x, learned, None, None, -8, 7, 1.0) - x).pow(2).mean()

    with torch.no_grad():
        best = min(float(error(torch.tensor([0.01 * i]))) for i in range(1, 400))
    for start in (0.02, 2.0) if method == "lsq" else (0.3, 3.9):
        learned = parameter(start)
        optimizer = torch.optim.Adam([learned], lr=0.02)
        for _ in range(300):
            optimizer.zero_grad()
            error(learned).backward()
            optimizer.step()
        # PACT's alpha hears only of what is clipped, so it falls short of the least error.
        assert float(error(learned.detach())) < best * (1.3 if method == "lsq" else 6)
