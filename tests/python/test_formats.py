"""The table of number formats as Python sees it."""

import pytest

from qtoolkit import _C
from qtoolkit.formats import FORMATS, get_format


def test_every_row_of_the_core_is_a_format():
    rows = [(f.name, f.bits, f.quant_min, f.quant_max) for f in FORMATS.values()]
    assert rows == [tuple(row) for row in _C.formats()]


@pytest.mark.parametrize("name", list(FORMATS))
def test_range_fills_the_bits(name):
    fmt = FORMATS[name]
    assert fmt.quant_max - fmt.quant_min + 1 == 2**fmt.bits


@pytest.mark.parametrize(
    ("name", "symmetric", "expected", "zero_point"),
    [
        ("uint8", False, (0, 255), 128),
        ("uint8", True, (0, 255), 128),
        ("int8", False, (-128, 127), 0),
        ("int8", True, (-127, 127), 0),
        ("int4", True, (-7, 7), 0),
        ("uint4", True, (0, 15), 8),
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
