"""Operators that move codes or change the size, against torch's on the integers."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
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
LAST = torch.channels_last
S, Z = scale(0.05), zero_point(3)
SHAPES = [(2, 5, 9, 11), (1, 64, 8, 8), (3, 1, 4, 7), (0, 3, 9, 9), (1, 16, 1, 1)]
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


def both_layouts(x):
    return (x, x.to(memory_format=LAST)) if x.dim() == 4 else (x,)


@pytest.mark.parametrize("dtype", [U8, I8], ids=str)
@pytest.mark.parametrize("pads", [(1, 2, 3, 0), (2, 1), (), (-1, 2), (1, 0, -2, -1)], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 9, 11), (1, 64, 8, 8), (3, 1, 4, 7), (0, 3, 9, 9)])
def test_pad_with_zero_is_the_zero_point(shape, pads, dtype):
    x = random_codes(shape, dtype)
    expected = F.pad(x.int(), pads, value=3).to(dtype)
    for codes in both_layouts(x):
        y = ops.pad(codes, S, Z, pads)
        assert torch.equal(y, expected)
        assert y.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize(
    ("shape", "pads"),
    [
        ((2, 3, 4), (1, 2)),
        ((2, 3, 4), (1, 2, 0, 3)),
        ((2, 3, 4), (1, 0, 0, 0, 2, 1)),
        ((5,), (2, 2)),
        ((2, 6, 7, 8), (0, 0, 0, 1, 0, 2)),
        ((2, 6, 7, 8), (0, 1, 2, 3, 1, 1, 4, -1)),
        ((2, 2, 3, 4, 5), (1, 1, 2, 0, 0, 1)),
    ],
)
def test_pad_takes_any_dimensions(shape, pads):
    x = random_codes(shape)
    assert torch.equal(ops.pad(x, S, Z, pads), F.pad(x.int(), pads, value=3).to(U8))
    turned = x.transpose(0, -1)
    assert torch.equal(ops.pad(turned, S, Z, pads[:2]), F.pad(turned.int(), pads[:2], value=3))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    ("shape", "pads"),
    [((2, 5, 9, 11), (3, 2, 1, 4)), ((1, 64, 3, 3), (2, 2, 2, 2)), ((2, 3, 7), (4, 6))],
)
def test_pad_modes_equal_torchs(shape, pads, mode):
    x = random_codes(shape, I8)
    expected = F.pad(x.double(), pads, mode=mode).to(I8)
    for codes in both_layouts(x):
        assert torch.equal(ops.pad(codes, S, Z, pads, mode), expected)


def nearest(x, size, factors, exact):
    """Torch's, of at least 4 channels in channels_last: its other kernels differ in odd cases."""
    mode = "nearest-exact" if exact else "nearest"
    wide = x.float().repeat(1, 4, 1, 1).contiguous(memory_format=LAST)
    return F.interpolate(wide, size, factors, mode=mode).to(x.dtype)[:, : x.size(1)]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [U8, I8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_nearest2d_equals_torch(shape, dtype, exact):
    x = random_codes(shape, dtype)
    for size, factors in (((13, 7), None), (None, (2.0, 3.0)), (None, (1.7, 1.0))):
        for codes in both_layouts(x):
            y = ops.upsample_nearest2d(codes, size, factors, exact)
            assert y.dtype == dtype
            assert y.is_contiguous(memory_format=LAST)
            assert torch.equal(y, nearest(x, size, factors, exact))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    out=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    factors=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    exact=st.booleans(),
)
def test_upsample_nearest2d_reads_torchs_pixels(size, out, factors, exact):
    rows = torch.arange(size[0] * size[1]).reshape(1, 1, *size)
    codes = torch.cat([(rows // 256).to(U8), (rows % 256).to(U8)], 1)
    assert torch.equal(
        ops.upsample_nearest2d(codes, out, None, exact), nearest(codes, out, None, exact)
    )
    if all(int(s * f) > 0 for s, f in zip(size, factors)):
        assert torch.equal(
            ops.upsample_nearest2d(codes, None, factors, exact),
            nearest(codes, None, factors, exact),
        )


def bilinear_qparams(x_dtype, y_dtype):
    z_x, z_y = (-20 if dtype == I8 else 100 for dtype in (x_dtype, y_dtype))
    return scale(0.05), zero_point(z_x), scale(0.03), zero_point(z_y)


def run_bilinear(x, size, factors, align_corners, y_dtype):
    s_x, z_x, s_y, z_y = bilinear_qparams(x.dtype, y_dtype)
    return ops.upsample_bilinear2d(
        x, s_x, z_x, size, factors, align_corners, s_y, z_y, *limits(y_dtype)
    )


def assert_bilinear(x, y, size, factors, align_corners):
    """y is within half a step, and a little for float32's rounding, of torch's interpolation."""
    s_x, z_x, s_y, z_y = bilinear_qparams(x.dtype, y.dtype)
    # float32: torch computes positions in the dtype of x
    real = F.interpolate(
        (x.float() - z_x), size, factors, mode="bilinear", align_corners=align_corners
    )
    low, high = limits(y.dtype)
    wanted = (real.double() * (s_x.double() / s_y.double()) + z_y).clamp(low, high)
    assert (y.double() - wanted).abs().max() < 0.502 if y.numel() else y.shape == wanted.shape


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("dtypes", [(U8, U8), (U8, I8), (I8, U8), (I8, I8)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsample_bilinear2d_is_torchs(shape, dtypes, align_corners):
    x = random_codes(shape, dtypes[0])
    for size, factors in (((13, 7), None), (None, (2.0, 3.0)), (None, (1.7, 1.0))):
        for codes in both_layouts(x):
            y = run_bilinear(codes, size, factors, align_corners, dtypes[1])
            assert y.is_contiguous(memory_format=LAST)
            assert_bilinear(x, y, size, factors, align_corners)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    size=sizes,
    out=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    factors=st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)),
    align_corners=st.booleans(),
)
def test_upsample_bilinear2d_has_torchs_positions(size, out, factors, align_corners):
    x = random_codes((1, 2, *size), seed=size[0])
    y = run_bilinear(x, out, None, align_corners, U8)
    assert_bilinear(x, y, out, None, align_corners)
    if all(int(s * f) > 0 for s, f in zip(size, factors)):
        y = run_bilinear(x, None, factors, align_corners, U8)
        assert_bilinear(x, y, None, factors, align_corners)


@pytest.mark.parametrize("dtype", [U8, I8], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6])
def test_shuffles_equal_torchs(groups, dtype):
    x = random_codes((2, 36, 5, 7), dtype)
    for codes in both_layouts(x):
        y = ops.channel_shuffle(codes, groups)
        assert torch.equal(y, F.channel_shuffle(x.float(), groups).to(dtype))
        assert y.is_contiguous(memory_format=LAST)
        if 36 % groups**2:
            continue
        y = ops.pixel_shuffle(codes, groups)
        assert torch.equal(y, F.pixel_shuffle(x, groups))
        assert y.is_contiguous(memory_format=LAST)
        assert torch.equal(ops.pixel_unshuffle(y, groups), x)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 7, 6), (1, 2, 3, 2, 4), (0, 4, 4, 3)], ids=str)
@pytest.mark.parametrize("dims", [(1,), (-1,), (0, 2), (1, 2), (-2, -1), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtypes", [(U8, U8), (I8, I8), (U8, I8)], ids=str)
def test_mean_and_sum_are_exact(shape, dims, dtypes):
    x = random_codes(shape, dtypes[0])
    s_x, z_x, s_y, z_y = bilinear_qparams(*dtypes)
    if shape[0] == 0 and 0 in dims:
        with pytest.raises(ValueError, match="must not be empty"):
            ops.mean(x, s_x, z_x, dims, False, s_y, z_y, 0, 255)
        return
    for keepdim in (False, True):
        total = (x.double() - z_x).sum(dims, keepdim)
        count = (x.numel() // total.numel()) if total.numel() else 1
        for op, divisor in ((ops.mean, count), (ops.sum, 1)):
            m = (s_x.double() / s_y.double() / divisor).float()
            expected = round_to_codes(total.float() * m, z_y, *limits(dtypes[1]))
            for codes in (*both_layouts(x), x.transpose(0, -1).contiguous().transpose(0, -1)):
                y = op(codes, s_x, z_x, dims, keepdim, s_y, z_y, *limits(dtypes[1]))
                assert torch.equal(y, expected)


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    x = random_codes((2, 83, 9, 11), I8)
    with forced_path("gather_pixels", path):
        y = ops.upsample_nearest2d(x, (20, 20), None)
    assert torch.equal(y, nearest(x, (20, 20), None, False))
    with forced_path("shuffle_codes", path):
        y = ops.channel_shuffle(x[:, :80], 2)
    assert torch.equal(y, F.channel_shuffle(x[:, :80].float(), 2).to(I8))
    expected = run_bilinear(x, (20, 20), None, False, U8)
    with forced_path("upsample_bilinear2d", path):
        assert torch.equal(run_bilinear(x, (20, 20), None, False, U8), expected)
