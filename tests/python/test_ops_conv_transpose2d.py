"""conv_transpose2d against an exact integer one and the rounding rule, both in plain torch."""

import op_reference
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from op_reference import PATHS, forced_path, random_codes, scale, seeded, zero_point
from test_ops_weight_cache import packings, settled

from qtoolkit import _C, ops

# name: (N, C, H, W), (OC, KH, KW), stride, padding, output_padding, dilation, groups
GEOMETRIES = {
    "2x2 of stride 2": ((2, 16, 5, 6), (32, 2, 2), (2, 2), (0, 0), (0, 0), (1, 1), 1),
    "3x3 of stride 2": ((1, 8, 7, 5), (40, 3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 1),
    "4x4 of stride 2": ((3, 12, 4, 4), (20, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 1),
    "3x3": ((2, 16, 6, 6), (24, 3, 3), (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "odd channels": ((2, 5, 4, 3), (7, 3, 2), (2, 3), (1, 0), (0, 2), (1, 1), 1),
    "a stride past the kernel": ((1, 8, 3, 4), (9, 2, 1), (4, 3), (0, 0), (3, 1), (1, 1), 1),
    "much padding": ((1, 8, 6, 6), (9, 3, 3), (2, 2), (4, 5), (0, 1), (1, 1), 1),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1), (1, 1), (0, 0), (0, 0), (1, 1), 1),
    "less output than stride": ((1, 4, 1, 1), (8, 2, 2), (8, 8), (0, 0), (0, 0), (1, 1), 1),
    "dilated": ((1, 8, 5, 6), (16, 3, 3), (2, 3), (1, 2), (2, 3), (3, 4), 1),
    "dilated evenly": ((1, 8, 5, 6), (16, 3, 3), (2, 4), (1, 2), (1, 1), (2, 2), 1),
    "groups": ((2, 24, 4, 4), (36, 3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 3),
    "depthwise": ((2, 19, 5, 5), (19, 3, 3), (2, 2), (1, 1), (1, 1), (1, 1), 19),
    "depthwise of stride 1": ((3, 32, 5, 6), (32, 5, 3), (1, 1), (2, 1), (0, 0), (1, 1), 32),
    "bilinear kernel": ((2, 16, 5, 6), (16, 4, 4), (2, 2), (1, 1), (0, 0), (1, 1), 16),
}


def make_case(geometry, x_dtype=torch.uint8, y_dtype=torch.uint8, **extra):
    """Arguments for ops.conv_transpose2d with outputs that fill the range of codes."""
    (n, c, h, w), (oc, kh, kw), stride, padding, more, dilation, groups = (
        GEOMETRIES[geometry] if isinstance(geometry, str) else geometry
    )
    shape = (c, oc // groups, kh, kw)
    taps = c // groups * max(1, kh // stride[0]) * max(1, kw // stride[1])
    quant_min, quant_max = op_reference.limits(y_dtype)
    return {
        "x": random_codes((n, c, h, w), x_dtype),
        "x_scale": scale(0.02),
        "x_zero_point": zero_point(-5 if x_dtype == torch.int8 else 119),
        "weight": torch.randint(-127, 128, shape, generator=seeded(1)).to(torch.int8),
        "weight_scale": torch.rand(oc, generator=seeded(2)) * 0.01 + 0.001,
        "bias": torch.randint(-9000, 9000, (oc,), generator=seeded(3)).int(),
        "stride": list(stride),
        "padding": list(padding),
        "output_padding": list(more),
        "dilation": list(dilation),
        "groups": groups,
        "y_scale": scale(0.006 * taps**0.5),
        "y_zero_point": zero_point(3 if y_dtype == torch.int8 else 131),
        "quant_min": quant_min,
        "quant_max": quant_max,
        "relu": False,
        **extra,
    }


def expected(c):
    acc = F.conv_transpose2d(
        c["x"].double() - c["x_zero_point"],
        c["weight"].double(),
        None if c["bias"] is None else c["bias"].double(),
        c["stride"],
        c["padding"],
        c["output_padding"],
        c["groups"],
        c["dilation"],
    )
    real = c["x_scale"].double() * c["weight_scale"].double()
    if c["y_scale"] is not None:
        real = real / c["y_scale"].double()
    value = acc.float() * real.float().reshape(1, -1, 1, 1)
    if c["y_scale"] is None:
        return value.clamp(min=0) if c["relu"] else value
    return op_reference.round_to_codes(
        value, c["y_zero_point"], c["quant_min"], c["quant_max"], c["relu"]
    )


def check(case):
    y, wanted = ops.conv_transpose2d(**case), expected(case)
    assert y.dtype == wanted.dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, wanted)
    return y


@pytest.mark.parametrize("y_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_codes_are_exact(geometry, x_dtype, y_dtype):
    y = check(make_case(geometry, x_dtype, y_dtype))
    assert y.numel() < 40 or y.unique().numel() > 10


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    more=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    channels=st.sampled_from([(4, 4, 1), (6, 4, 2), (3, 3, 3)]),
)
def test_any_geometry_is_exact(size, kernel, stride, padding, more, dilation, channels):
    assume(all(o < max(s, d) for o, s, d in zip(more, stride, dilation)))
    out = [
        (i - 1) * s - 2 * p + d * (k - 1) + o + 1
        for i, k, s, p, o, d in zip(size, kernel, stride, padding, more, dilation)
    ]
    assume(min(out) > 0)
    c, oc, groups = channels
    check(make_case(((2, c, *size), (oc, *kernel), stride, padding, more, dilation, groups)))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_paths_agree(geometry, path):
    case = make_case(geometry)
    (_, c, *_), (oc, *_), *_, groups = GEOMETRIES[geometry]
    depthwise = groups > 1 and groups == c == oc
    with forced_path("conv2d_depthwise" if depthwise else "conv2d", path):
        check(case)


@pytest.mark.parametrize("geometry", ["2x2 of stride 2", "3x3 of stride 2", "groups", "depthwise"])
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.int8], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_float_output_is_exact(geometry, x_dtype, relu):
    y = check(make_case(geometry, x_dtype, y_scale=None, y_zero_point=None, relu=relu))
    assert bool((y < 0).any()) != relu


@pytest.mark.parametrize("geometry", ["2x2 of stride 2", "4x4 of stride 2", "depthwise"])
def test_options_are_exact(geometry):
    assert bool((check(make_case(geometry, relu=True)) >= 131).all())
    check(make_case(geometry, bias=None))
    check(make_case(geometry, weight_scale=torch.tensor([0.004])))
    case = make_case(geometry, quant_min=0, quant_max=15, y_zero_point=zero_point(1))
    assert check(case).max() == 15
    case["x"] = case["x"].contiguous(memory_format=torch.channels_last)
    check(case)
    case["weight"] = case["weight"].flip(2).transpose(2, 3).contiguous().transpose(2, 3)
    check(case)
    case["x"] = case["x"][:0]
    assert check(case).shape[0] == 0


def test_threads_give_the_same_bits():
    case = make_case("4x4 of stride 2")
    case["x"] = random_codes((5, 12, 40, 40))
    wanted, threads = check(case), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.conv_transpose2d(**case), wanted)
    finally:
        torch.set_num_threads(threads)


def test_packed_parts_are_kept_and_changes_are_seen():
    before = settled()
    case = make_case("3x3 of stride 2")
    count = packings()
    for size in ((7, 5), (4, 9), (7, 5)):
        case["x"] = random_codes((1, 8, *size))
        check(case)
    assert packings() == count + 4  # one for each of 2 x 2 sets of outputs
    assert _C.weight_cache_state()["packed_weights"] == before["packed_weights"] + 4
    case["weight"].copy_(case["weight"].flip(0))
    check(case)
    assert packings() == count + 8
    assert _C.weight_cache_state()["packed_weights"] == before["packed_weights"] + 4
