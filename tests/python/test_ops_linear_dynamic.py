"""linear_dynamic against its rule in plain torch, and against the float layer."""

import math

import pytest
import torch
from op_reference import PATHS, forced_path, random_codes, seeded
from torch import Tensor
from torch.nn import functional

from qtoolkit import _C, TensorSpec, ops
from qtoolkit.observers.base import range_to_qparams

ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]
UINT8 = TensorSpec("uint8", observer="minmax")


def make_case(rows=(5,), k=64, oc=40, seed=0, **extra):
    x = torch.randn(*rows, k, generator=seeded(seed)) * 2 + 0.3
    return {
        "x": x,
        "weight": random_codes((oc, k), torch.int8, seed + 1),
        "weight_scale": torch.rand(oc, generator=seeded(seed + 2)) * 0.01 + 0.001,
        "bias": torch.randn(oc, generator=seeded(seed + 3)),
        **extra,
    }


def expected(x, weight, weight_scale, bias=None, activation="none") -> Tensor:
    """The rule: the observers' qparams for each row, exact sums, float32 operations."""
    rows = x.float().reshape(-1, x.size(-1))
    scale, zero_point = range_to_qparams(rows.amin(1), rows.amax(1), UINT8)
    codes = torch.round(rows * (1.0 / scale)[:, None]) + zero_point[:, None]
    centred = codes.clamp(0, 255).double() - zero_point[:, None]
    acc = (centred @ weight.double().t()).float()  # doubles are exact here
    y = acc * (scale[:, None] * weight_scale)
    if bias is not None:
        y = y + bias
    if activation == "relu":
        y = y.relu()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.size(0))


def activated(y: Tensor, activation: str) -> Tensor:
    """In double, and without the cancellation of 1 + erf(x)."""
    y = y.double()
    if activation == "gelu":
        return 0.5 * y * torch.erfc(-y * math.sqrt(0.5))
    inner = y if activation == "silu" else math.sqrt(8 / math.pi) * (y + 0.044715 * y**3)
    return y * torch.sigmoid(inner)


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3), (0,), (300,)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, 130])
def test_the_rule_bit_for_bit(rows, k):
    case = make_case(rows, k)
    y = ops.linear_dynamic(**case)
    assert y.shape == (*rows, 40)
    assert torch.equal(y, expected(**case))
    case.update(bias=None, activation="relu", weight_scale=torch.tensor([0.02]))
    assert torch.equal(ops.linear_dynamic(**case), expected(**case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits_are_rounded_at_the_end(dtype):
    for rows, k, oc in [((9,), 67, 100), ((2, 40), 256, 33)]:
        case = make_case(rows, k, oc)
        case["x"] = case["x"].to(dtype)
        y = ops.linear_dynamic(**case)
        assert y.dtype == dtype
        assert torch.equal(y, expected(**case))


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
def test_activations_are_exact_to_float32_rounding(activation):
    case = make_case((50,), 32, 64)
    case["weight_scale"] = case["weight_scale"] * 0.2
    plain = ops.linear_dynamic(**case)
    y = ops.linear_dynamic(**case, activation=activation)
    exact = activated(plain, activation)
    assert plain.min() < -5
    assert plain.max() > 5
    error = (y.double() - exact).abs() / exact.abs()
    assert error.max() < (2e-6 if activation == "gelu_tanh" else 5e-7)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_paths_agree(path, activation):
    for rows, k, oc in [((1,), 67, 31), ((33,), 300, 100)]:
        case = make_case(rows, k, oc, activation=activation)
        y = ops.linear_dynamic(**case)
        with forced_path("conv2d", path):
            assert torch.equal(ops.linear_dynamic(**case), y)


def test_threads_agree():
    threads = torch.get_num_threads()
    case = make_case((70,), 1500, 500, activation="silu")
    try:
        torch.set_num_threads(1)
        one = ops.linear_dynamic(**case)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(ops.linear_dynamic(**case), one)
    finally:
        torch.set_num_threads(threads)


def test_rows_beyond_a_block_are_exact():
    """More rows than are multiplied at once, the last block of them short."""
    case = make_case((600,), 5000, 40, weight_scale=torch.full((40,), 0.01))
    assert torch.equal(ops.linear_dynamic(**case), expected(**case))


def test_a_row_does_not_depend_on_the_others():
    case = make_case((40,), 200, 50)
    y = ops.linear_dynamic(**case)
    case["x"][1:] *= 100
    assert torch.equal(ops.linear_dynamic(**case)[0], y[0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_that_is_not_finite_gives_nan(value, activation, dtype):
    case = make_case((6,), 50, 40, activation=activation)
    case["x"] = case["x"].to(dtype)
    y = ops.linear_dynamic(**case)
    case["x"][2, 7] = value
    got = ops.linear_dynamic(**case)
    assert got[2].isnan().all()
    others = [0, 1, 3, 4, 5]
    assert torch.equal(got[others], y[others])


def test_extreme_rows():
    """Zeros, a constant, one sign, the largest and the smallest numbers."""
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(7, 16)
    x[1] = -3.0
    x[2] = torch.linspace(2, 5, 16)
    x[3] = torch.linspace(-1, -5, 16)
    x[4, 3], x[4, 5] = largest, -largest
    x[5, 3] = 1e-44
    x[6] = torch.linspace(-1e-30, 2e-30, 16)
    case = make_case(k=16, oc=33, x=x, bias=None, weight_scale=torch.full((33,), 1e-3))
    y = ops.linear_dynamic(**case)
    assert torch.equal(y, expected(**case))
    assert torch.equal(y[0], torch.zeros(33))
    assert y.isfinite().all()


def test_views_are_read_right():
    case = make_case((6,), 32)
    y = ops.linear_dynamic(**case)
    for name in ("x", "weight"):
        case[name] = case[name].t().contiguous().t()
    for name in ("weight_scale", "bias"):
        case[name] = torch.stack([case[name]] * 2, 1)[:, 0]
    assert torch.equal(ops.linear_dynamic(**case), y)


def test_it_is_near_the_float_layer():
    x = torch.randn(64, 512, generator=seeded(5))
    weight = torch.randn(256, 512, generator=seeded(6)) * 0.05
    scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / scale[:, None]).to(torch.int8)
    y = functional.linear(x, weight)
    noise = ops.linear_dynamic(x, codes, scale) - y
    assert 10 * torch.log10(y.square().sum() / noise.square().sum()) > 38


def test_a_changed_weight_is_noticed():
    case = make_case()
    ops.linear_dynamic(**case)
    case["weight"][3] = 5
    assert torch.equal(ops.linear_dynamic(**case), expected(**case))


def test_it_shares_the_packed_weight_with_linear():
    case = make_case((3,), 128, 64)
    ops.linear_dynamic(**case)
    packings = _C.weight_cache_state()["packings"]
    one, zero = torch.tensor(1.0), torch.tensor(0).int()
    ops.linear(
        random_codes((3, 128)), one, zero, case["weight"], case["weight_scale"], None, None, None,
        0, 255,
    )  # fmt: skip
    assert _C.weight_cache_state()["packings"] == packings


def test_it_has_no_gradient():
    case = make_case()
    case["x"].requires_grad_()
    assert not ops.linear_dynamic(**case).requires_grad
