"""Operators with learned parameters, batch norm and max pooling: CUDA against the CPU.

Sums over a tensor are added in another order than on the CPU, in double: what depends on them
(gradients of learned parameters, batch statistics) agrees to float32 rounding, and is the same
every time. All else has the CPU's bits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_reference import (
    CHANNEL_CASES,
    DTYPES,
    LAST,
    both,
    check_bits,
    needs_gpu,
    same_bits,
    state,
    values,
    with_gradient,
)
from op_reference import scale, seeded, zero_point
from torch import Tensor

from qtoolkit import ops

pytestmark = needs_gpu


# --- learned parameters --------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, sum_of_sizes: float) -> bool:
    """Of sums of float32 terms: the CPU adds four of them in float32 before double."""
    eps = torch.finfo(torch.float32).eps
    return torch.allclose(actual, expected, rtol=2 * eps, atol=eps * sum_of_sizes, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "memory_format"),
    [((1_000_003,), None, torch.contiguous_format), *CHANNEL_CASES],
    ids=str,
)
def test_lsq(shape, axis, memory_format, shifted, dtype):
    x = values(shape, special=False).to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(shape, generator=seeded(3)).to(dtype)
    channels = (1,) if axis is None else (x.size(axis),)
    s = torch.rand(channels, generator=seeded(4)) * 0.5 - 0.1  # some below 0
    z = torch.randn(channels, generator=seeded(5)) * 9 if shifted else None
    function = torch.ops.qtoolkit.fake_quantize_lsq_backward

    check_bits(lambda x, s, z: ops.fake_quantize_lsq(x, s, z, axis, -128, 127, 0.3), x, s, z)
    args = (grad, x, s, z)
    actual, expected = both(lambda *t: function(*t, axis, -128, 127, 0.3), *args)
    assert same_bits(actual[0], expected[0])
    terms = 128 * grad.abs().sum().item()  # none is larger than 128 times a gradient
    assert close(actual[1], expected[1], terms)
    assert close(actual[2], expected[2], terms)
    again, _ = both(lambda *t: function(*t, axis, -128, 127, 0.3), *args)
    assert all(map(torch.equal, actual, again))


def test_lsq_of_special_values():
    x, grad = values((4099,)), torch.randn(4099, generator=seeded(3))
    check_bits(
        lambda x, g, s: torch.ops.qtoolkit.fake_quantize_lsq_backward(
            g, x, s, None, None, 0, 255, 1.0
        )[0],
        *(x, grad, torch.tensor([0.25])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_pact(dtype, alpha):
    x = values((100_003,)).to(dtype)
    grad, learned = torch.randn(x.shape, generator=seeded(3)).to(dtype), torch.tensor([alpha])
    check_bits(lambda x, a: ops.fake_quantize_pact(x, a, 15), x, learned)
    function = torch.ops.qtoolkit.fake_quantize_pact_backward
    actual, expected = both(lambda g, x, a: function(g, x, a, 15), grad, x, learned)
    assert same_bits(actual[0], expected[0])
    assert close(actual[1], expected[1], grad.abs().sum().item())


def test_gradients_of_learned_parameters_in_place():
    x, grad = values((3, 40, 41), special=False), torch.randn(3, 40, 41, generator=seeded(3))
    s, learned = torch.rand(40, generator=seeded(4)), torch.tensor([3.0])

    def lsq(g: Tensor, x: Tensor, s: Tensor) -> Tensor:
        g = g.clone()
        torch.ops.qtoolkit.fake_quantize_lsq_backward_(g, x, s, None, 1, -8, 7, 1.0)
        return g

    def pact(g: Tensor, x: Tensor, a: Tensor) -> Tensor:
        g = g.clone()
        torch.ops.qtoolkit.fake_quantize_pact_backward_(g, x, a, 15)
        return g

    check_bits(lsq, grad, x, s)
    check_bits(pact, grad, x, learned)


# --- batch norm ----------------------------------------------------------------------------------

BATCH_NORM_CASES = [c for c in CHANNEL_CASES if c[1] == 1 and 0 not in c[0]]


def batch_norm_args(shape: tuple[int, ...], memory_format, dtype, residual: bool) -> list[Any]:
    """x, weight, bias, running_mean, running_var, residual, min_val, max_val, scale, zero_point."""
    channels, g = shape[1], seeded(9)
    x = (
        (torch.randn(shape, generator=g) * 2 + 0.5)
        .to(dtype)
        .contiguous(memory_format=memory_format)
    )
    other = torch.randn(shape, generator=g).to(dtype) if residual else None
    return [
        *(x, torch.rand(channels, generator=g) + 0.5, torch.randn(channels, generator=g)),
        *(torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.5, other),
        *state(),
    ]


def batch_norm(training: bool, relu: bool, averaging_constant: float, quantize: bool = True):
    def call(x, weight, bias, mean, var, residual, low, high, s, z) -> list[Tensor]:
        mean, var, low, high, s, z = (t.clone() for t in (mean, var, low, high, s, z))
        known = (low, high, s, z) if quantize else (None, None, None, None)
        result = torch.ops.qtoolkit.batch_norm_act(
            *(x, weight, bias, mean, var, residual, training, 0.1, 1e-5),
            *(relu, 6.0 if relu else None, *known, averaging_constant, False, 0, 255),
        )
        return [*result, mean, var, low, high, s, z]

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_with_given_statistics(
    shape, axis, memory_format, observe, relu, residual, dtype
):
    args = batch_norm_args(shape, memory_format, dtype, residual)
    if not observe:
        args[-4:] = [torch.tensor(-3.0), torch.tensor(4.0), scale(0.03), zero_point(90)]
    check_bits(batch_norm(False, relu, 0.5 if observe else 0.0), *args)
    check_bits(batch_norm(False, relu, 0.0, quantize=False), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_in_training(shape, axis, memory_format, relu, residual, dtype):
    args = batch_norm_args(shape, memory_format, dtype, residual)
    actual, expected = both(batch_norm(True, relu, 0.5), *args)
    (y, mean, invstd, _, *known), (y_cpu, mean_cpu, invstd_cpu, _, *known_cpu) = actual, expected
    for ours, theirs in zip(
        [mean, invstd, *known], [mean_cpu, invstd_cpu, *known_cpu], strict=True
    ):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    # A last bit of the statistics moves a value across the middle between two codes, if rarely.
    step = known_cpu[4] * 1.01 + y_cpu.abs() * torch.finfo(dtype).eps
    assert ((y.float() - y_cpu.float()).abs() <= step).all()
    assert (y != y_cpu).float().mean() < 0.01
    again, _ = both(batch_norm(True, relu, 0.5), *args)
    assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_backward(shape, axis, memory_format, masked, training, dtype):
    x, weight, _, mean, var, grad = batch_norm_args(shape, memory_format, dtype, True)[:6]
    mask = torch.randint(256, ((x.numel() + 7) // 8,), dtype=torch.uint8, generator=seeded(7))
    mask = mask if masked else mask[:0]
    function = torch.ops.qtoolkit.batch_norm_act_backward
    args = (grad, x, weight, mean, var.rsqrt(), mask)
    every = [True, True, True, True]
    actual, expected = both(lambda *t: function(*t, training, every), *args)
    # grad_x of a batch is a difference of numbers near 1 that contain the sums.
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    assert same_bits(actual[3], expected[3])
    if not training:
        assert same_bits(actual[0], expected[0])
    again, _ = both(lambda *t: function(*t, training, every), *args)
    assert all(map(torch.equal, actual, again))
    only_x = [True, False, False, False]
    check = both(lambda *t: function(*t, False, only_x), *args)
    assert same_bits(check[0][0], check[1][0])


# --- max pooling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 8, 64])
@pytest.mark.parametrize(
    "options",
    [
        ([3, 3], [2, 2], [1, 1], [1, 1], False),
        ([2, 3], [2, 1], [0, 1], [1, 2], True),
        ([16, 16], [1, 1], [8, 0], [1, 1], False),
        ([3, 3], [1, 1], [1, 1], [2, 2], False),
        ([3, 2], [3, 4], [1, 0], [1, 3], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_max_pool2d_train(channels, options, memory_format):
    x = torch.randint(-4, 4, (3, channels, 19, 18), generator=seeded()).float()
    x[0, 0, 3, 3] = float("nan")
    x[1, 1] = -float("inf")
    x = x.contiguous(memory_format=memory_format)
    check_bits(lambda x: torch.ops.qtoolkit.max_pool2d_train(x, *options), x)
    y = ops.max_pool2d_train(x, *options)
    grad = torch.randn(y.shape, generator=seeded(1))
    check_bits(with_gradient(lambda x: ops.max_pool2d_train(x, *options)), x, grad)
