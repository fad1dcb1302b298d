"""Pooling against torch's on the integers, exactly."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_reference import (
    PATHS,
    forced_path,
    limits,
    random_codes,
    round_to_codes,
    scale,
    zero_point,
)

from qtoolkit import ops

U8, I8 = torch.uint8, torch.int8
# kernel, stride, padding, ceil_mode
WINDOWS = {
    "3x3 of stride 2": ((3, 3), (2, 2), (1, 1), False),
    "3x3 of stride 2, ceil": ((3, 3), (2, 2), (0, 0), True),
    "2x2": ((2, 2), (2, 2), (0, 0), False),
    "unequal": ((3, 2), (1, 3), (1, 0), True),
    "default stride": ((2, 3), (), (0, 1), False),
    "one": ((1, 1), (1, 1), (0, 0), False),
    "same": ((3, 3), (1, 1), (1, 1), True),
}
SHAPES = [(2, 5, 9, 11), (1, 64, 8, 8), (3, 1, 4, 7), (0, 3, 9, 9)]


@pytest.mark.parametrize("dtype", [U8, I8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_max_pool2d_equals_torch(window, shape, dtype):
    kernel, stride, padding, ceil_mode = WINDOWS[window]
    x = random_codes(shape, dtype)
    y = ops.max_pool2d(x, kernel, stride, padding, (1, 1), ceil_mode)
    expected = F.max_pool2d(x.float(), kernel, stride or None, padding, 1, ceil_mode)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(ops.max_pool2d(last, kernel, stride, padding, (1, 1), ceil_mode), y)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    ceil_mode=st.booleans(),
)
def test_max_pool2d_has_torchs_windows(size, kernel, stride, padding, dilation, ceil_mode):
    x = random_codes((1, 3, *size), U8, seed=size[0])
    try:
        expected = F.max_pool2d(x.float(), kernel, stride, padding, dilation, ceil_mode)
    except RuntimeError:
        with pytest.raises(ValueError, match="max_pool2d"):
            ops.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        return
    if expected.isinf().any():  # a window of padding alone has no code
        with pytest.raises(ValueError, match="padding alone"):
            ops.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        return
    assert torch.equal(
        ops.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode), expected.to(U8)
    )


def expected_average(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, y_dtype):
    """Sums and divisors of every window from torch in float64, then the rounding rule."""
    s_x, z_x, s_y, z_y = average_qparams(x.dtype, y_dtype)
    stride = stride or None
    centred = x.double() - z_x
    total = F.avg_pool2d(centred, kernel, stride, padding, ceil_mode, True, 1)
    mean = F.avg_pool2d(
        torch.ones_like(centred), kernel, stride, padding, ceil_mode, count_include_pad, divisor
    )
    count = F.avg_pool2d(torch.ones_like(centred), kernel, stride, padding, ceil_mode, True, 1)
    divisors = (count / mean).round()
    m = (s_x.double() / s_y.double() / divisors).float()
    return round_to_codes(total.float() * m, z_y, *limits(y_dtype))


def average_qparams(x_dtype, y_dtype):
    z_x, z_y = (-20 if dtype == I8 else 100 for dtype in (x_dtype, y_dtype))
    return scale(0.05), zero_point(z_x), scale(0.03), zero_point(z_y)


def run_average(x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, y_dtype):
    s_x, z_x, s_y, z_y = average_qparams(x.dtype, y_dtype)
    low, high = limits(y_dtype)
    return ops.avg_pool2d(
        x,
        s_x,
        z_x,
        kernel,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor,
        s_y,
        z_y,
        low,
        high,
    )


@pytest.mark.parametrize("dtypes", [(U8, U8), (U8, I8), (I8, U8), (I8, I8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_avg_pool2d_is_exact(window, shape, dtypes):
    x = random_codes(shape, dtypes[0])
    for count_include_pad in (True, False):
        args = (x, *WINDOWS[window], count_include_pad, None, dtypes[1])
        y = run_average(*args)
        assert torch.equal(y, expected_average(*args))
        assert y.is_contiguous(memory_format=torch.channels_last)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    divisor=st.none() | st.integers(1, 20),
)
def test_avg_pool2d_has_torchs_divisors(
    size, kernel, stride, padding, ceil_mode, count_include_pad, divisor
):
    assume(all(p <= k // 2 for p, k in zip(padding, kernel)))
    assume(all(k <= s + 2 * p for k, s, p in zip(kernel, size, padding)))
    x = random_codes((1, 3, *size), U8, seed=size[0])
    args = (x, kernel, stride, padding, ceil_mode, count_include_pad, divisor, U8)
    assert torch.equal(run_average(*args), expected_average(*args))


@pytest.mark.parametrize("dtypes", [(U8, U8), (I8, I8), (U8, I8)], ids=str)
@pytest.mark.parametrize("output_size", [(1, 1), (2, 3), (7, 7), (9, 11), (12, 1)], ids=str)
def test_adaptive_avg_pool2d_is_exact(output_size, dtypes):
    x = random_codes((2, 20, 9, 11), dtypes[0])
    s_x, z_x, s_y, z_y = average_qparams(*dtypes)
    y = ops.adaptive_avg_pool2d(x, s_x, z_x, output_size, s_y, z_y, *limits(dtypes[1]))
    expected = torch.empty_like(y)
    for i in range(output_size[0]):
        for j in range(output_size[1]):
            rows = slice(i * 9 // output_size[0], -(-(i + 1) * 9 // output_size[0]))
            columns = slice(j * 11 // output_size[1], -(-(j + 1) * 11 // output_size[1]))
            window = x[:, :, rows, columns].double() - z_x
            area = window.size(2) * window.size(3)
            m = (s_x.double() / s_y.double() / area).float()
            value = window.sum((2, 3)).float() * m
            expected[:, :, i, j] = round_to_codes(value, z_y, *limits(dtypes[1]))
    assert torch.equal(y, expected)
    low, high = limits(dtypes[1])
    real = F.adaptive_avg_pool2d((x.float() - z_x) * s_x, output_size)
    real = real.clamp((low - z_y) * s_y, (high - z_y) * s_y)
    torch.testing.assert_close((y.float() - z_y) * s_y, real, rtol=0, atol=0.01501)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [U8, I8], ids=str)
def test_paths_agree(path, dtype):
    x = random_codes((2, 83, 9, 11), dtype)
    window = WINDOWS["3x3 of stride 2"]
    with forced_path("max_pool2d", path):
        y = ops.max_pool2d(x, *window[:3], (1, 1), window[3])
    assert torch.equal(y, F.max_pool2d(x.float(), 3, 2, 1).to(dtype))
    with forced_path("avg_pool2d", path):
        y = run_average(x, *window, True, None, U8)
    assert torch.equal(y, expected_average(x, *window, True, None, U8))
