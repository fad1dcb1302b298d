"""linear against an exact integer product and the rounding rule in plain torch."""

import op_reference
import pytest
import torch
from op_reference import PATHS, forced_path, random_codes, scale, seeded, zero_point

from qtoolkit import ops


def make_case(rows=(5,), k=64, oc=40, x_dtype=torch.uint8, **extra):
    weight = torch.randint(-127, 128, (oc, k), generator=seeded(1)).to(torch.int8)
    return {
        "x": random_codes((*rows, k), x_dtype),
        "x_scale": scale(0.02),
        "x_zero_point": zero_point(-9 if x_dtype == torch.int8 else 119),
        "weight": weight,
        "weight_scale": torch.rand(oc, generator=seeded(2)) * 0.01 + 0.001,
        "bias": torch.randint(-9000, 9000, (oc,), generator=seeded(3)).int(),
        "y_scale": scale(0.006 * k**0.5),
        "y_zero_point": zero_point(120),
        "quant_min": 0,
        "quant_max": 255,
        **extra,
    }


def expected(case):
    """The same as a 1x1 convolution."""
    case = dict(case)
    x = case.pop("x")
    y = op_reference.conv2d(
        x.reshape(-1, x.size(-1), 1, 1),
        case.pop("x_scale"),
        case.pop("x_zero_point"),
        case.pop("weight")[:, :, None, None],
        case.pop("weight_scale"),
        case.pop("bias"),
        (1, 1),
        (0, 0),
        (1, 1),
        1,
        **case,
    )
    return y.reshape(*x.shape[:-1], y.size(1))


@pytest.mark.parametrize("rows", [(), (1,), (7,), (2, 3), (0,), (300,)], ids=str)
@pytest.mark.parametrize("k", [1, 3, 64, 130])
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
def test_codes_and_floats_are_exact(rows, k, x_dtype):
    case = make_case(rows, k, x_dtype=x_dtype)
    y = ops.linear(**case)
    assert y.shape == (*rows, 40)
    assert torch.equal(y, expected(case))
    case.update(y_scale=None, y_zero_point=None, relu=True)
    assert torch.equal(ops.linear(**case), expected(case))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("oc", [1, 31, 32, 100])
def test_paths_agree(oc, path):
    case = make_case((9,), 67, oc, quant_min=-128, quant_max=127)
    with forced_path("conv2d", path):
        y = ops.linear(**case)
    assert y.dtype == torch.int8
    assert torch.equal(y, expected(case))


def test_relu_starts_at_the_zero_point():
    y = ops.linear(**make_case(relu=True))
    assert y.min() == 120
    assert torch.equal(y, expected(make_case(relu=True)))


def test_a_transposed_input_and_weight_are_read_right():
    case = make_case((6,), 32)
    y = ops.linear(**case)
    case["x"] = case["x"].t().contiguous().t()
    case["weight"] = case["weight"].t().contiguous().t()
    assert torch.equal(ops.linear(**case), y)


def test_one_row_of_large_extent_uses_all_codes():
    case = make_case((3,), 25088, 16, bias=None)
    assert torch.equal(ops.linear(**case), expected(case))


def test_the_largest_bias_that_fits_is_exact():
    case = make_case((2,), 4, 1, weight=torch.tensor([[127, -1, 0, -128]]).to(torch.int8))
    most = 2**31 - 1 - 255 * 256
    case.update(y_scale=None, y_zero_point=None, weight_scale=torch.tensor([0.01]))
    case["x"] = torch.tensor([[255, 0, 0, 0], [0, 255, 255, 255]], dtype=torch.uint8)
    for zp in (0, 255):
        for bias in (most, -most - 1):
            case.update(x_zero_point=zero_point(zp), bias=torch.tensor([bias]).int())
            assert torch.equal(ops.linear(**case), expected(case))
    for bias in (most + 1, -most - 2):
        with pytest.raises(ValueError, match="output channel 0"):
            ops.linear(**{**case, "bias": torch.tensor([bias]).int()})
