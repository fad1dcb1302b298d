"""Softmax and layer norm of codes against float64."""

import pytest
import torch
import torch.nn.functional as F
from op_reference import PATHS, forced_path, limits, random_codes, scale, seeded, zero_point

from qtoolkit import ops

U8, I8 = torch.uint8, torch.int8
LAST = torch.channels_last


def qparams(x_scale, x_dtype, y_scale=None, y_dtype=U8):
    z_x, z_y = (-20 if dtype == I8 else 100 for dtype in (x_dtype, y_dtype))
    output = (None, None) if y_scale is None else (scale(y_scale), zero_point(z_y))
    return (scale(x_scale), zero_point(z_x)), output


def assert_codes(y, real, y_scale, y_zero_point):
    """y is within half a step, and a little for float32's rounding, of the real values."""
    low, high = limits(y.dtype)
    wanted = (real / y_scale.double() + y_zero_point).clamp(low, high)
    if y.numel():
        assert (y.double() - wanted).abs().max() < 0.505


LAYOUTS = [
    ((3, 5, 17), -1),
    ((3, 5, 17), 1),
    ((2, 12, 49, 49), 3),
    ((2, 21, 5, 6), 1),
    ((2, 3, 4, 5), 2),
    ((7,), 0),
    ((0, 4), 1),
    ((4, 0), 1),
    ((3, 1), 1),
]


@pytest.mark.parametrize("x_scale", [0.003, 0.06, 1.5])
@pytest.mark.parametrize("dtypes", [(U8, U8), (I8, I8), (U8, I8)], ids=str)
@pytest.mark.parametrize(("shape", "dim"), LAYOUTS, ids=str)
def test_softmax_is_near_the_exact_one(shape, dim, dtypes, x_scale):
    x = random_codes(shape, dtypes[0])
    (s_x, z_x), (s_y, z_y) = qparams(x_scale, dtypes[0], 1 / 200, dtypes[1])
    exact = ((x.double() - z_x) * s_x.double()).softmax(dim)
    for codes in (x, x.to(memory_format=LAST)) if x.dim() == 4 else (x,):
        y = ops.softmax(codes, s_x, z_x, dim, s_y, z_y, *limits(dtypes[1]))
        assert y.dtype == dtypes[1]
        assert_codes(y, exact, s_y, z_y)
        real = ops.softmax(codes, s_x, z_x, dim, None, None, 0, 255)
        torch.testing.assert_close(real.double(), exact, rtol=2e-6, atol=1e-12)
        if x.numel():
            torch.testing.assert_close(real.sum(dim), torch.ones_like(real.sum(dim)))


def test_softmax_over_channels_keeps_channels_last():
    x = random_codes((2, 21, 5, 6)).to(memory_format=LAST)
    y = ops.softmax(x, scale(0.1), zero_point(3), 1, scale(1 / 256), zero_point(0), 0, 255)
    assert y.is_contiguous(memory_format=LAST)


NORMS = [((4, 9, 24), (24,)), ((3, 5, 6), (5, 6)), ((2, 768), (768,)), ((0, 8), (8,)), ((7,), (7,))]


@pytest.mark.parametrize("affine", ["both", "weight", "none"])
@pytest.mark.parametrize("dtypes", [(U8, U8), (I8, I8), (U8, I8)], ids=str)
@pytest.mark.parametrize(("shape", "normalized"), NORMS, ids=str)
def test_layer_norm_is_near_the_exact_one(shape, normalized, dtypes, affine):
    x = random_codes(shape, dtypes[0])
    weight = torch.randn(normalized, generator=seeded(1)) if affine != "none" else None
    bias = torch.randn(normalized, generator=seeded(2)) if affine == "both" else None
    (s_x, z_x), (s_y, z_y) = qparams(0.05, dtypes[0], 0.03, dtypes[1])
    real = (x.double() - z_x) * s_x.double()
    doubles = [None if t is None else t.double() for t in (weight, bias)]
    exact = F.layer_norm(real, normalized, *doubles, 1e-5)
    args = (s_x, z_x, normalized, weight, bias, 1e-5)
    for codes in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
        y = ops.layer_norm(codes, *args, s_y, z_y, *limits(dtypes[1]))
        assert y.dtype == dtypes[1]
        assert y.is_contiguous()
        assert_codes(y, exact, s_y, z_y)
        floats = ops.layer_norm(codes, *args, None, None, 0, 255)
        torch.testing.assert_close(floats.double(), exact, rtol=1e-5, atol=1e-5)


def test_layer_norm_of_a_permuted_image():
    x = random_codes((2, 32, 5, 6)).to(memory_format=LAST)
    norm = torch.nn.LayerNorm(32)
    s, z = scale(0.05), zero_point(3)
    y = ops.layer_norm(
        x.permute(0, 2, 3, 1), s, z, [32], norm.weight.data, norm.bias.data, norm.eps, s, z, 0, 255
    ).permute(0, 3, 1, 2)
    assert y.is_contiguous(memory_format=LAST)
    exact = norm.double()(((x.double() - z) * s.double()).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert_codes(y, exact, s, z)


def test_rows_of_equal_codes():
    s, z = scale(0.5), zero_point(3)
    x = torch.full((2, 40), 77, dtype=U8)
    bias = torch.linspace(-1, 1, 40)
    y = ops.layer_norm(x, s, z, [40], None, bias, 1e-5, None, None, 0, 255)
    torch.testing.assert_close(y, bias.expand(2, 40))
    y = ops.softmax(x, s, z, 1, None, None, 0, 255)
    torch.testing.assert_close(y, torch.full((2, 40), 1 / 40))


@pytest.mark.parametrize("path", PATHS)
def test_paths_and_threads_agree(path):
    x = random_codes((64, 3, 197), I8)
    s, z = scale(0.05), zero_point(-3)
    norm = (torch.randn(197, generator=seeded(1)), torch.randn(197, generator=seeded(2)), 1e-5)

    def run():
        return [
            ops.softmax(x, s, z, -1, scale(1 / 256), zero_point(0), 0, 255),
            ops.softmax(x, s, z, -1, None, None, 0, 255),
            ops.layer_norm(x, s, z, [197], *norm, s, z, -128, 127),
            ops.layer_norm(x, s, z, [197], *norm, None, None, 0, 255),
        ]

    expected, threads = run(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with forced_path("softmax", path):
            results = run()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(results, expected))
