"""The number formats of quantized tensors, from the table of the C++ core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qtoolkit._C import formats as _core_formats


@dataclass(frozen=True)
class NumberFormat:
    """A number format; a field that means nothing for its kind is 0 or "".

    Attributes:
        name: the name that `get_format` finds it by.
        kind: "integer", "ternary" (codes -1, 0, 1), "binary" (codes -1, 1), "float",
            "block_float" (floats in blocks, each with a scale of its own) or "codebook" (a list of
            numbers; for weights alone).
        bits: width of one number, without the scales.
        quant_min, quant_max: the lowest and the highest code; floats have none.
        mantissa_bits: stored bits of a float's mantissa.
        min_exponent: 2^min_exponent is a float's smallest normal number.
        max_value: a float's largest number.
        block_size: how many neighbouring floats share a scale.
        scale_format: the format of those scales, "e8m0" (powers of two) or "e4m3".

    Sources: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; OCP Microscaling Formats
    (MX) Specification v1.0, 2023.
    """

    name: str
    kind: str
    bits: int
    quant_min: int
    quant_max: int
    mantissa_bits: int
    min_exponent: int
    max_value: float
    block_size: int
    scale_format: str

    @property
    def has_codes(self) -> bool:
        """Whether numbers are integer codes under a scale, not floats."""
        return self.kind not in ("float", "block_float", "codebook")

    @property
    def signed(self) -> bool:
        """Whether the format has negative numbers."""
        return not self.has_codes or self.quant_min < 0

    def quant_range(self, symmetric: bool) -> tuple[int, int]:
        """The codes that a tensor may use.

        A symmetric signed tensor leaves the lowest code out, so that the range mirrors around 0:
        [-127, 127] for int8. Every other tensor uses the whole format.

        Raises ValueError for a float format, which has no codes.
        """
        if not self.has_codes:
            raise ValueError(f"number format {self.name!r} is of floats and has no integer codes")
        if symmetric and self.signed:
            return -self.quant_max, self.quant_max
        return self.quant_min, self.quant_max

    def symmetric_zero_point(self) -> int:
        """The code of real 0 in a symmetric tensor: 0 if signed, else the middle (uint8: 128)."""
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2


FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {row["name"]: NumberFormat(**row) for row in _core_formats()}
)
"""Every format of the table by name."""


def get_format(name: str) -> NumberFormat:
    """Returns the format called `name`; raises ValueError that lists the formats there are."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        known = ", ".join(FORMATS)
        raise ValueError(f"unknown number format {name!r}: use one of {known}") from None
