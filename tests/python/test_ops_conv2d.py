"""conv2d against an exact integer convolution and the rounding rule, both in plain torch."""

import op_reference
import pytest
import torch
from op_reference import PATHS, forced_path, random_codes, scale, seeded, zero_point

from qtoolkit import ops

# name: (N, C, H, W), (OC, KH, KW), stride, padding, dilation, groups
GEOMETRIES = {
    "3x3": ((2, 16, 9, 9), (32, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "3x3 of stride 2": ((1, 8, 15, 13), (40, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "1x1": ((3, 32, 7, 7), (64, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 of odd channels": ((2, 5, 6, 7), (7, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "1x1 of stride 2": ((2, 12, 8, 8), (24, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "stem": ((1, 3, 33, 35), (64, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "unequal": ((2, 6, 11, 14), (33, 5, 2), (3, 1), (2, 0), (1, 2), 1),
    "dilated": ((1, 8, 14, 14), (16, 3, 3), (1, 1), (2, 2), (2, 2), 1),
    "groups": ((2, 24, 8, 8), (36, 3, 3), (1, 1), (1, 1), (1, 1), 3),
    "groups of 1x1": ((2, 16, 5, 5), (40, 1, 1), (1, 1), (0, 0), (1, 1), 4),
    "depthwise": ((2, 19, 10, 10), (19, 3, 3), (1, 1), (1, 1), (1, 1), 19),
    "depthwise of stride 2": ((3, 32, 9, 11), (32, 3, 3), (2, 2), (1, 1), (1, 1), 32),
    "depthwise, dilated": ((1, 8, 12, 12), (8, 3, 5), (1, 1), (2, 4), (2, 2), 8),
    "two outputs a channel": ((1, 6, 8, 8), (12, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    "all padding": ((1, 4, 1, 1), (8, 3, 3), (1, 1), (4, 4), (1, 1), 1),
    "valid": ((2, 4, 6, 6), (8, 3, 3), (1, 1), (0, 0), (1, 1), 1),
}


def make_case(geometry, x_dtype=torch.uint8, y_dtype=torch.uint8, **extra):
    """Arguments for ops.conv2d with outputs that fill the range of codes."""
    (n, c, h, w), (oc, kh, kw), stride, padding, dilation, groups = GEOMETRIES[geometry]
    weight_shape = (oc, c // groups, kh, kw)
    weight = torch.randint(-127, 128, weight_shape, generator=seeded(1)).to(torch.int8)
    taps = c // groups * kh * kw
    quant_min, quant_max = op_reference.limits(y_dtype)
    return {
        "x": random_codes((n, c, h, w), x_dtype),
        "x_scale": scale(0.02),
        "x_zero_point": zero_point(-5 if x_dtype == torch.int8 else 119),
        "weight": weight,
        "weight_scale": torch.rand(oc, generator=seeded(2)) * 0.01 + 0.001,
        "bias": torch.randint(-9000, 9000, (oc,), generator=seeded(3)).int(),
        "stride": list(stride),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
        "y_scale": scale(0.006 * taps**0.5),
        "y_zero_point": zero_point(3 if y_dtype == torch.int8 else 131),
        "quant_min": quant_min,
        "quant_max": quant_max,
        **extra,
    }


def check(case):
    y, expected = ops.conv2d(**case), op_reference.conv2d(**case)
    assert y.dtype == expected.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)
    return y


@pytest.mark.parametrize("y_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_codes_are_exact(geometry, x_dtype, y_dtype):
    y = check(make_case(geometry, x_dtype, y_dtype))
    assert y.numel() < 20 or y.unique().numel() > 10


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_paths_agree(geometry, path):
    case = make_case(geometry)
    with forced_path("conv2d_depthwise" if geometry.startswith("depthwise") else "conv2d", path):
        check(case)


@pytest.mark.parametrize("geometry", ["3x3", "1x1", "stem", "groups", "depthwise"])
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_float_output_is_exact(geometry, x_dtype, relu):
    y = check(make_case(geometry, x_dtype, y_scale=None, y_zero_point=None, relu=relu))
    assert y.dtype == torch.float32
    assert bool((y < 0).any()) != relu


@pytest.mark.parametrize("geometry", ["3x3", "1x1", "groups", "depthwise", "unequal"])
@pytest.mark.parametrize("residual_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_residual_and_relu_are_exact(geometry, residual_dtype, relu):
    case = make_case(geometry, relu=relu)
    shape = op_reference.conv2d(**case).shape
    case["residual"] = random_codes(shape, residual_dtype, seed=9)
    case["residual_scale"] = scale(0.017)
    case["residual_zero_point"] = zero_point(11)
    y = check(case)
    assert bool((y < 131).any()) != relu
    case["residual"] = case["residual"].to(memory_format=torch.channels_last)
    assert torch.equal(ops.conv2d(**case), y)


@pytest.mark.parametrize("quant_range", [(0, 15), (-8, 7), (-127, 127), (0, 127)], ids=str)
def test_narrow_ranges_clamp(quant_range):
    quant_min, quant_max = quant_range
    y = check(
        make_case("3x3", quant_min=quant_min, quant_max=quant_max, y_zero_point=zero_point(1))
    )
    assert (int(y.min()), int(y.max())) == quant_range


@pytest.mark.parametrize("extra", [{"bias": None}, {"weight_scale": torch.tensor([0.004])}])
def test_bias_and_channel_scales_are_optional(extra):
    check(make_case("3x3", **extra))


def test_extreme_codes_do_not_saturate():
    case = make_case("3x3", y_scale=None, y_zero_point=None, bias=None)
    for code in (-128, 127):
        case["x"] = torch.full_like(case["x"], 255)
        case["x_zero_point"] = zero_point(0)
        case["weight"] = torch.full_like(case["weight"], code)
        check(case)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced"])
def test_any_memory_layout_gives_the_same(layout):
    case = make_case("3x3")
    expected = ops.conv2d(**case)
    x = case["x"]
    case["x"] = {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(2, 3).contiguous().transpose(2, 3),
        "sliced": torch.cat([x, x], 1)[:, :16],
    }[layout]
    case["weight"] = case["weight"].to(memory_format=torch.channels_last)
    assert torch.equal(ops.conv2d(**case), expected)
    with forced_path("conv2d", "reference"):
        assert torch.equal(ops.conv2d(**case), expected)


@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 2, 1), (4, 4, 0)])
def test_few_planes_are_read_in_both_layouts(channels, kernel, stride, padding, x_dtype):
    case = make_case("3x3", x_dtype, stride=[stride] * 2, padding=[padding] * 2)
    case["weight"] = case["weight"].repeat(1, 1, 2, 2)[:, :channels, :kernel, :kernel]
    case["x"] = random_codes((3, channels, 9, 12), x_dtype)
    y = check(case)
    case["x"] = case["x"].to(memory_format=torch.channels_last)
    assert torch.equal(ops.conv2d(**case), y)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_a_large_image_leaves_no_memory_behind():
    case = make_case("1x1", stride=[64, 64], padding=[1, 1])
    x = torch.zeros(1, 32, 2048, 2048, dtype=torch.uint8).to(memory_format=torch.channels_last)
    ops.conv2d(**case)
    before = resident_bytes()
    ops.conv2d(**{**case, "x": x})
    assert resident_bytes() < before + x.numel() // 4


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("geometry", ["3x3", "1x1", "depthwise"])
def test_number_of_threads_changes_nothing(geometry, batch, threads):
    case = make_case(geometry)
    channels = case["x"].size(1)
    case["x"] = random_codes((batch, channels, 40, 40))
    expected = op_reference.conv2d(**case)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(ops.conv2d(**case), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("geometry", ["3x3", "1x1", "depthwise"])
def test_an_empty_batch_gives_an_empty_batch(geometry):
    case = make_case(geometry)
    full = ops.conv2d(**case)
    case["x"] = case["x"][:0]
    y = ops.conv2d(**case)
    assert y.shape == (0, *full.shape[1:])
    assert y.dtype == torch.uint8


def test_gradient_mode_does_not_matter():
    case = make_case("3x3", y_scale=None, y_zero_point=None)
    expected = ops.conv2d(**case)
    case["x_scale"].requires_grad_()
    y = ops.conv2d(**case)
    assert not y.requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.conv2d(**case), expected)
