"""add, mul, requantize, lookup, batch_norm and cat against plain torch."""

import pytest
import torch
from op_reference import (
    PATHS,
    factor,
    forced_path,
    limits,
    random_codes,
    round_to_codes,
    scale,
    shifted,
    zero_point,
)

from qtoolkit import ops

U8, I8 = torch.uint8, torch.int8
DTYPES = [(U8, U8), (U8, I8), (I8, U8), (I8, I8)]


def zero_of(dtype):
    return zero_point(-7 if dtype == I8 else 121)


def expected_add(a, b, y_dtype, relu):
    s_a, s_b, s_y = scale(0.03), scale(0.05), scale(0.041)
    value = shifted(a, zero_of(a.dtype)) * factor(s_a, s_y)
    value = value + shifted(b, zero_of(b.dtype)) * factor(s_b, s_y)
    return round_to_codes(value, zero_of(y_dtype), *limits(y_dtype), relu)


def run_add(a, b, y_dtype=U8, relu=False):
    return ops.add(
        a,
        scale(0.03),
        zero_of(a.dtype),
        b,
        scale(0.05),
        zero_of(b.dtype),
        scale(0.041),
        zero_of(y_dtype),
        *limits(y_dtype),
        relu,
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7, 5), (0, 3), (70_001,)], ids=str)
@pytest.mark.parametrize(("a_dtype", "y_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_add_is_exact(shape, a_dtype, y_dtype, relu):
    a, b = random_codes(shape, a_dtype, 1), random_codes(shape, U8, 2)
    assert torch.equal(run_add(a, b, y_dtype, relu), expected_add(a, b, y_dtype, relu))


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_add_agree(path):
    a, b = random_codes((1031,), I8, 1), random_codes((1031,), U8, 2)
    with forced_path("add", path):
        y = run_add(a, b)
    assert torch.equal(y, expected_add(a, b, U8, False))


@pytest.mark.parametrize("b_shape", [(1,), (7,), (3, 1, 1), (2, 3, 5, 1), (4, 2, 3, 5, 7)], ids=str)
def test_add_broadcasts(b_shape):
    a, b = random_codes((2, 3, 5, 7), U8, 1), random_codes(b_shape, U8, 2)
    y = run_add(a, b)
    assert torch.equal(y, expected_add(a, b, U8, False))
    assert torch.equal(run_add(a.to(memory_format=torch.channels_last), b), y)
    assert torch.equal(ops.add(*_swapped(a, b), scale(0.041), zero_of(U8), 0, 255), y)


def _swapped(a, b):
    return b, scale(0.05), zero_of(U8), a, scale(0.03), zero_of(U8)


@pytest.mark.parametrize("swap", [False, True])
def test_add_broadcasts_channels_last_to_more_dimensions(swap):
    a = random_codes((2, 1, 1, 1, 1), U8, 1)
    b = random_codes((3, 4, 5, 6), U8, 2).to(memory_format=torch.channels_last)
    if swap:
        a, b = b, a
    y = run_add(a, b)
    assert torch.equal(y, expected_add(a, b, U8, False))
    assert y.is_contiguous()


def test_add_keeps_channels_last_and_takes_mixed_layouts():
    a, b = random_codes((2, 3, 5, 7), U8, 1), random_codes((2, 3, 5, 7), U8, 2)
    last = a.to(memory_format=torch.channels_last)
    y = run_add(last, b)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, run_add(a, b))


def expected_mul(a, b, y_dtype, relu):
    product = scale(0.03).double() * scale(0.05).double()
    value = (shifted(a, zero_of(a.dtype)) * shifted(b, zero_of(b.dtype))) * factor(
        product, scale(0.0041)
    )
    return round_to_codes(value, zero_of(y_dtype), *limits(y_dtype), relu)


def run_mul(a, b, y_dtype=U8, relu=False):
    return ops.mul(
        a,
        scale(0.03),
        zero_of(a.dtype),
        b,
        scale(0.05),
        zero_of(b.dtype),
        scale(0.0041),
        zero_of(y_dtype),
        *limits(y_dtype),
        relu,
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7, 5), (0, 3), (70_001,)], ids=str)
@pytest.mark.parametrize(("a_dtype", "y_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_mul_is_exact(shape, a_dtype, y_dtype, relu):
    a, b = random_codes(shape, a_dtype, 1), random_codes(shape, U8, 2)
    assert torch.equal(run_mul(a, b, y_dtype, relu), expected_mul(a, b, y_dtype, relu))


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_mul_agree(path):
    a, b = random_codes((1031,), I8, 1), random_codes((1031,), U8, 2)
    with forced_path("mul", path):
        y = run_mul(a, b)
    assert torch.equal(y, expected_mul(a, b, U8, False))


LAST = torch.channels_last
# Shapes of a and b, and the memory format of a.
BROADCASTS = [
    ((2, 72, 9, 7), (2, 72, 1, 1), LAST),
    ((3, 16, 11, 5), (3, 16, 1, 1), LAST),
    ((2, 72, 9, 7), (2, 72, 1, 1), torch.contiguous_format),
    ((2, 72, 9, 7), (72, 1, 1), LAST),
    ((2, 24, 9, 7), (2, 1, 9, 7), LAST),
    ((2, 24, 9, 7), (1, 24, 9, 1), LAST),
    ((2, 24, 9, 7), (), LAST),
    ((2, 24, 9, 7), (2, 1, 1, 1), torch.contiguous_format),
    ((4, 1, 6), (1, 5, 6), torch.contiguous_format),
    ((40, 1), (1, 70), torch.contiguous_format),
    ((3, 1, 5, 1, 4, 1), (3, 2, 1, 6, 1, 7), torch.contiguous_format),
    ((40_000, 3), (3,), torch.contiguous_format),
    ((7,), (7, 7, 7, 7), torch.contiguous_format),
]


@pytest.mark.parametrize(("a_shape", "b_shape", "a_format"), BROADCASTS, ids=str)
@pytest.mark.parametrize(("run", "expected"), [(run_mul, expected_mul), (run_add, expected_add)])
def test_arithmetic_broadcasts(a_shape, b_shape, a_format, run, expected):
    a = random_codes(a_shape, U8, 1).contiguous(memory_format=a_format)
    b = random_codes(b_shape, I8, 2)
    y = run(a, b)
    assert torch.equal(y, expected(a, b, U8, False))
    assert torch.equal(run(b, a), expected(b, a, U8, False))
    if y.shape == a.shape:
        assert y.is_contiguous(memory_format=a_format)
    # Every second code, codes that repeat one, and transposed ones.
    wide = torch.stack([b, b.flip(-1) if b.dim() else b], -1)[..., 1]
    assert torch.equal(run(a, wide), expected(a, wide, U8, False))
    repeated = (b[..., :1] if b.dim() else b).expand(b.shape)
    assert torch.equal(run(a, repeated), expected(a, repeated, U8, False))
    assert torch.equal(run(repeated, repeated), expected(repeated, repeated, U8, False))
    if b.dim() > 1:
        turned = b.transpose(0, -1).contiguous().transpose(0, -1)
        assert torch.equal(run(a, turned), expected(a, turned, U8, False))


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_give_the_same_bits(threads):
    a, b = random_codes((5, 40, 31, 29), U8, 1).to(memory_format=LAST), random_codes((5, 40, 1, 1))
    expected = run_mul(a, b)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(run_mul(a, b), expected)
        assert torch.equal(run_mul(a, b[:1, :1]), expected_mul(a, b[:1, :1], U8, False))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7, 5), (0, 3), (70_001,)], ids=str)
@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_requantize_is_exact(shape, x_dtype, y_dtype, relu):
    x, s_x, s_y = random_codes(shape, x_dtype), scale(0.03), scale(0.021)
    y = ops.requantize(x, s_x, zero_of(x_dtype), s_y, zero_of(y_dtype), *limits(y_dtype), relu)
    value = shifted(x, zero_of(x_dtype)) * factor(s_x, s_y)
    assert torch.equal(y, round_to_codes(value, zero_of(y_dtype), *limits(y_dtype), relu))


def test_requantize_to_the_same_parameters_is_the_identity():
    x = torch.arange(256).to(U8)
    assert torch.equal(
        ops.requantize(x, scale(0.7), zero_point(9), scale(0.7), zero_point(9), 0, 255), x
    )


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_requantize_agree(path):
    x = random_codes((1031,), I8)
    with forced_path("requantize", path):
        y = ops.requantize(x, scale(0.03), zero_point(4), scale(0.011), zero_point(90), 0, 255)
    value = shifted(x, zero_point(4)) * factor(scale(0.03), scale(0.011))
    assert torch.equal(y, round_to_codes(value, zero_point(90), 0, 255))


@pytest.mark.parametrize("shape", [(4, 5), (2, 19, 3, 5), (1, 64, 2, 2), (0, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES, ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_batch_norm_is_exact(shape, x_dtype, y_dtype, relu):
    x, s_x, s_y = random_codes(shape, x_dtype), scale(0.03), scale(0.05)
    weight = torch.linspace(-2, 2, shape[1])
    bias = torch.linspace(1, -3, shape[1])
    y = ops.batch_norm(
        x, s_x, zero_of(x_dtype), weight, bias, s_y, zero_of(y_dtype), *limits(y_dtype), relu
    )
    along = (1, -1) + (1,) * (len(shape) - 2)
    m = (s_x.double() * weight.double() / s_y.double()).float().reshape(along)
    value = shifted(x, zero_of(x_dtype)) * m + factor(bias, s_y).reshape(along)
    assert torch.equal(y, round_to_codes(value, zero_of(y_dtype), *limits(y_dtype), relu))
    assert x.dim() == 2 or y.is_contiguous(memory_format=torch.channels_last)


CAT_CASES = {
    "channels": ((2, 3, 4, 5), (2, 8, 4, 5), 1),
    "batch": ((2, 3, 4, 5), (3, 3, 4, 5), 0),
    "width": ((2, 3, 4, 5), (2, 3, 4, 1), -1),
    "vectors": ((7,), (9,), 0),
    "matrices": ((3, 4), (3, 5), -1),
    "an empty one": ((2, 3, 4, 5), (2, 0, 4, 5), 1),
    "an empty batch": ((0, 3, 4, 5), (0, 2, 4, 5), 1),
}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CAT_CASES)
def test_cat_is_exact(case, memory_format):
    first, second, dim = CAT_CASES[case]
    xs = [random_codes(first, U8, 1), random_codes(second, I8, 2), random_codes(first, U8, 3)]
    scales = [scale(0.03), scale(0.05), scale(0.04)]
    zeros = [zero_of(x.dtype) for x in xs]
    s_y, z_y = scale(0.04), zero_of(U8)
    expected = torch.cat(
        [
            round_to_codes(shifted(x, z) * factor(s, s_y), z_y, 0, 255)
            for x, s, z in zip(xs, scales, zeros)
        ],
        dim,
    )
    if len(first) == 4:
        xs[0] = xs[0].to(memory_format=memory_format)
    y = ops.cat(xs, scales, zeros, dim, s_y, z_y, 0, 255)
    assert torch.equal(y, expected)
    stacked = [torch.stack([p.reshape(()) for p in ps]) for ps in (scales, zeros)]
    assert torch.equal(ops.cat(xs, stacked[:1], stacked[1:], dim, s_y, z_y, 0, 255), expected)
    if len(first) == 4 and y.numel() > 0:
        assert y.is_contiguous(memory_format=memory_format)


def test_cat_of_equal_parameters_copies():
    x = torch.arange(256).to(U8).view(2, 4, 4, 8)
    s, z = scale(0.3), zero_point(5)
    assert torch.equal(ops.cat([x, x], [s, s], [z, z], 1, s, z, 0, 255), torch.cat([x, x], 1))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 7, 5), (0, 3), (70_001,)], ids=str)
@pytest.mark.parametrize(("x_dtype", "y_dtype"), DTYPES, ids=str)
def test_lookup_indexes_the_table(shape, x_dtype, y_dtype):
    x, table = random_codes(shape, x_dtype, 1), random_codes((256,), y_dtype, 2)
    assert torch.equal(ops.lookup(x, table), table[x.long()])


def test_lookup_keeps_the_memory_format():
    x, table = random_codes((2, 3, 7, 5)), random_codes((256,), seed=2)
    y = ops.lookup(x.to(memory_format=torch.channels_last), table)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, table[x.long()])
    assert torch.equal(ops.lookup(x[:, :, ::2], table), table[x[:, :, ::2].long()])
    assert torch.equal(ops.lookup(x, table.repeat(2)[::2]), table.repeat(2)[::2][x.long()])


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_lookup_agree(path):
    x, table = random_codes((1031,), I8), random_codes((256,), U8, 2)
    with forced_path("lookup", path):
        y = ops.lookup(x, table)
    assert torch.equal(y, table[x.long()])
