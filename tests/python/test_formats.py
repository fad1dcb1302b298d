"""The table of number formats as Python sees it."""

from dataclasses import asdict

import pytest
import torch

from qtoolkit import _C
from qtoolkit.formats import FORMATS, get_format


def test_every_row_of_the_core_is_a_format():
    assert [asdict(f) for f in FORMATS.values()] == _C.formats()
    assert list(FORMATS) == [f.name for f in FORMATS.values()]


INTEGERS = [name for name, fmt in FORMATS.items() if fmt.kind == "integer"]
FLOATS = [name for name, fmt in FORMATS.items() if not fmt.has_codes]


def test_integers_have_every_width():
    assert set(INTEGERS) == {f"{u}int{bits}" for u in ("", "u") for bits in (2, 3, 4, 5, 6, 8)}


@pytest.mark.parametrize("name", INTEGERS)
def test_range_fills_the_bits(name):
    fmt = FORMATS[name]
    assert fmt.quant_max - fmt.quant_min + 1 == 2**fmt.bits


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp16", torch.float16),
        ("bf16", torch.bfloat16),
        ("fp8_e4m3", torch.float8_e4m3fn),
        ("fp8_e5m2", torch.float8_e5m2),
        ("mxfp8", torch.float8_e4m3fn),
    ],
)
def test_float_formats_are_those_of_torch(name, dtype):
    fmt, info = FORMATS[name], torch.finfo(dtype)
    assert (fmt.bits, fmt.max_value, 2.0**fmt.min_exponent) == (info.bits, info.max, info.tiny)
    assert 2.0**-fmt.mantissa_bits == info.eps


@pytest.mark.parametrize(
    ("name", "block_size", "scale_format"),
    [("mxfp8", 32, "e8m0"), ("mxfp4", 32, "e8m0"), ("nvfp4", 16, "e4m3")],
)
def test_block_formats(name, block_size, scale_format):
    fmt = FORMATS[name]
    assert (fmt.kind, fmt.block_size, fmt.scale_format) == (
        "block_float",
        block_size,
        scale_format,
    )


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_format_has_no_codes(name):
    assert FORMATS[name].signed
    with pytest.raises(ValueError, match=f"{name!r} is of floats"):
        FORMATS[name].quant_range(True)


@pytest.mark.parametrize(
    ("name", "symmetric", "expected", "zero_point"),
    [
        ("uint8", False, (0, 255), 128),
        ("uint8", True, (0, 255), 128),
        ("int8", False, (-128, 127), 0),
        ("int8", True, (-127, 127), 0),
        ("int4", True, (-7, 7), 0),
        ("uint4", True, (0, 15), 8),
        ("uint5", False, (0, 31), 16),
        ("int3", True, (-3, 3), 0),
        ("ternary", True, (-1, 1), 0),
        ("ternary", False, (-1, 1), 0),
        ("binary", True, (-1, 1), 0),
    ],
)
def test_quant_range(name, symmetric, expected, zero_point):
    assert get_format(name).quant_range(symmetric) == expected
    assert get_format(name).symmetric_zero_point() == zero_point


@pytest.mark.parametrize("name", ["int7", "", None, ["uint8"]])
def test_unknown_format_is_an_error_that_lists_the_formats(name):
    with pytest.raises(ValueError, match="uint8, int8"):
        get_format(name)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        FORMATS["int16"] = FORMATS["int8"]
