"""conv2d on batches of small images, of which one call of the kernel takes several."""

import op_reference
import pytest
import torch
from op_reference import PATHS, forced_path, random_codes, scale, seeded, zero_point

from qtoolkit import ops

# name: (C, H, W), (OC, KH, KW), stride, padding, groups
GEOMETRIES = {
    "3x3 of one pixel": ((40, 1, 1), (33, 3, 3), 1, 1, 1),
    "3x3 of 2 x 2": ((16, 2, 2), (64, 3, 3), 1, 1, 1),
    "3x3 to 2 x 2": ((8, 4, 4), (16, 3, 3), 2, 1, 1),
    "3x3 of 4 x 5": ((5, 4, 5), (40, 3, 3), 1, 1, 1),
    "3x3 without border": ((8, 6, 5), (33, 3, 3), 1, 0, 1),
    "1x1 to 2 x 3": ((12, 3, 5), (24, 1, 1), 2, 0, 1),
    "1x1 of odd channels": ((7, 3, 3), (9, 1, 1), 1, 0, 1),
    "5x5 of 7 x 7": ((3, 7, 7), (32, 5, 5), 1, 2, 1),
    "groups": ((12, 3, 3), (20, 3, 3), 1, 1, 2),
    "depthwise": ((20, 3, 4), (20, 3, 3), 1, 1, 20),
    # Here the bytes, not the pixels, limit how many images a call takes.
    "large images": ((112, 40, 40), (16, 3, 3), 16, 1, 1),
}


def make_case(geometry, batch, x_dtype=torch.uint8, residual=False):
    (channels, height, width), (out, kh, kw), stride, padding, groups = GEOMETRIES[geometry]
    taps = channels // groups * kh * kw
    weight_shape = (out, channels // groups, kh, kw)
    case = {
        "x": random_codes((batch, channels, height, width), x_dtype),
        "x_scale": scale(0.02),
        "x_zero_point": zero_point(-5 if x_dtype == torch.int8 else 119),
        "weight": torch.randint(-127, 128, weight_shape, generator=seeded(1)).to(torch.int8),
        "weight_scale": torch.rand(out, generator=seeded(2)) * 0.01 + 0.001,
        "bias": torch.randint(-9000, 9000, (out,), generator=seeded(3)).int(),
        "stride": [stride, stride],
        "padding": [padding, padding],
        "dilation": [1, 1],
        "groups": groups,
        "y_scale": scale(0.006 * taps**0.5),
        "y_zero_point": zero_point(131),
        "quant_min": 0,
        "quant_max": 255,
    }
    if residual:
        size = op_reference.conv2d(**case).shape
        case["residual"] = random_codes(size, seed=9)
        case["residual_scale"] = scale(0.017)
        case["residual_zero_point"] = zero_point(11)
    return case


def image_by_image(case):
    results = []
    for n in range(len(case["x"])):
        images = {k: case[k][n : n + 1] for k in ("x", "residual") if k in case}
        results.append(ops.conv2d(**{**case, **images}))
    return torch.cat(results)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("batch", [2, 33])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_batch_equals_its_images(geometry, batch, x_dtype, threads):
    case = make_case(geometry, batch, x_dtype, residual=True)
    expected = image_by_image(case)
    assert expected.unique().numel() > 10
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = ops.conv2d(**case)
    finally:
        torch.set_num_threads(before)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_batch_is_exact_on_every_path(geometry, path):
    case = make_case(geometry, 19, residual=True)
    with forced_path("conv2d_depthwise" if geometry == "depthwise" else "conv2d", path):
        assert torch.equal(ops.conv2d(**case), op_reference.conv2d(**case))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("geometry", ["5x5 of 7 x 7", "3x3 of 2 x 2"])
def test_a_batch_with_float_output_is_exact(geometry, layout):
    case = {**make_case(geometry, 21), "y_scale": None, "y_zero_point": None}
    case["x"] = case["x"].contiguous(memory_format=layout)
    assert torch.equal(ops.conv2d(**case), op_reference.conv2d(**case))
