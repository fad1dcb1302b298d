"""matmul against exact integer products and the rounding rule in plain torch."""

import pytest
import torch
from op_reference import (
    PATHS,
    factor,
    forced_path,
    random_codes,
    round_to_codes,
    scale,
    shifted,
    zero_point,
)
from torch import Tensor

from qtoolkit import ops

U8, I8 = torch.uint8, torch.int8


def make_case(a_shape=(5, 64), b_shape=(64, 40), a_dtype=U8, b_dtype=U8, **extra):
    return {
        "a": random_codes(a_shape, a_dtype),
        "a_scale": scale(0.02),
        "a_zero_point": zero_point(119 if a_dtype == U8 else -9),
        "b": random_codes(b_shape, b_dtype, seed=1),
        "b_scale": scale(0.03),
        "b_zero_point": zero_point(140 if b_dtype == U8 else 3),
        "y_scale": scale(0.03 * a_shape[-1] ** 0.5),
        "y_zero_point": zero_point(120),
        "quant_min": 0,
        "quant_max": 255,
        **extra,
    }


def expected(
    a, a_scale, a_zero_point, b, b_scale, b_zero_point, y_scale, y_zero_point, quant_min, quant_max
) -> Tensor:
    # Doubles are exact here.
    acc = shifted(a, a_zero_point).double() @ shifted(b, b_zero_point).double()
    scales = a_scale.double() * b_scale.double()
    if y_scale is None:
        return acc.float() * scales.float()
    return round_to_codes(acc.float() * factor(scales, y_scale), y_zero_point, quant_min, quant_max)


SHAPES = [
    ((5, 64), (64, 40)),
    ((1, 1), (1, 1)),
    ((33, 3), (3, 31)),
    ((2, 3, 17, 16), (2, 3, 16, 33)),
    ((2, 1, 7, 20), (3, 20, 5)),  # both are broadcast
    ((4, 6, 5), (5, 9)),  # one matrix on the right
    ((6, 5), (4, 5, 9)),  # one on the left
    ((0, 4, 5), (5, 3)),
    ((2, 0, 5), (2, 5, 3)),
    ((2, 4, 5), (2, 5, 0)),
    ((300, 130), (130, 70)),
]


@pytest.mark.parametrize(("a_shape", "b_shape"), SHAPES, ids=str)
@pytest.mark.parametrize(("a_dtype", "b_dtype"), [(U8, U8), (U8, I8), (I8, U8), (I8, I8)], ids=str)
def test_codes_and_floats_are_exact(a_shape, b_shape, a_dtype, b_dtype):
    case = make_case(a_shape, b_shape, a_dtype, b_dtype)
    y, wanted = ops.matmul(**case), expected(**case)
    assert y.dtype == U8
    assert y.shape == wanted.shape
    assert torch.equal(y, wanted)
    case.update(quant_min=-128, quant_max=100, y_zero_point=zero_point(-20))
    assert torch.equal(ops.matmul(**case), expected(**case))
    case.update(y_scale=None, y_zero_point=None)
    assert torch.equal(ops.matmul(**case), expected(**case))


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    for b_dtype in (U8, I8):
        case = make_case((2, 3, 35, 67), (3, 67, 50), b_dtype=b_dtype)
        with forced_path("conv2d", path):
            y = ops.matmul(**case)
        assert torch.equal(y, expected(**case))


def test_attention_reads_views():
    """Queries, keys and values of one projection, as views into it."""
    qkv = random_codes((2, 19, 3, 4, 32)).permute(2, 0, 3, 1, 4)
    case = make_case()
    case.update(a=qkv[0], b=qkv[1].mT)
    scores = ops.matmul(**case)
    assert torch.equal(scores, expected(**case))
    case.update(a=scores, b=qkv[2])
    assert torch.equal(ops.matmul(**case), expected(**case))


@pytest.mark.parametrize("a_dtype", [U8, I8], ids=str)
def test_any_strides(a_dtype):
    case = make_case((6, 64), (64, 40), a_dtype)
    y = ops.matmul(**case)
    case["a"] = case["a"].t().contiguous().t()
    case["b"] = torch.stack([case["b"]] * 2, 2)[..., 0]
    assert torch.equal(ops.matmul(**case), y)


@pytest.mark.parametrize("zero", [0, 255])
def test_the_longest_sums_are_exact(zero):
    """33025 products of 255 * 255, of both signs."""
    k = 33025
    case = make_case((3, k), (k, 2), y_scale=None, y_zero_point=None)
    case["a"] = torch.tensor([[0], [255], [128]], dtype=U8).expand(3, k)
    case["b"] = torch.tensor([[0, 255]], dtype=U8).expand(k, 2)
    for other in (0, 255):
        case.update(a_zero_point=zero_point(zero), b_zero_point=zero_point(other))
        assert torch.equal(ops.matmul(**case), expected(**case))


def test_threads_agree():
    threads = torch.get_num_threads()
    few = make_case((2, 300, 200), (2, 200, 300))
    many = make_case((24, 65, 64), (24, 64, 65))
    try:
        for case in (few, many):
            torch.set_num_threads(1)
            one = ops.matmul(**case)
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert torch.equal(ops.matmul(**case), one)
    finally:
        torch.set_num_threads(threads)
