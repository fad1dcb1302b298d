"""The number formats of quantized tensors, from the table of the C++ core."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qtoolkit._C import formats as _core_formats


@dataclass(frozen=True)
class NumberFormat:
    """An integer format: its name, width in bits and range of codes (both ends included)."""

    name: str
    bits: int
    quant_min: int
    quant_max: int

    @property
    def signed(self) -> bool:
        """Whether the format has negative codes."""
        return self.quant_min < 0

    def quant_range(self, symmetric: bool) -> tuple[int, int]:
        """The codes that a tensor may use.

        A symmetric signed tensor leaves the lowest code out, so that the range mirrors around 0:
        [-127, 127] for int8. Every other tensor uses the whole format.
        """
        if symmetric and self.signed:
            return -self.quant_max, self.quant_max
        return self.quant_min, self.quant_max

    def symmetric_zero_point(self) -> int:
        """The code of real 0 in a symmetric tensor: 0 if signed, else the middle (uint8: 128)."""
        return 0 if self.signed else (self.quant_min + self.quant_max + 1) // 2


FORMATS: Mapping[str, NumberFormat] = MappingProxyType(
    {row[0]: NumberFormat(*row) for row in _core_formats()}
)
"""Every format of the table by name."""


def get_format(name: str) -> NumberFormat:
    """Returns the format called `name`; raises ValueError that lists the formats there are."""
    try:
        return FORMATS[name]
    except (KeyError, TypeError):
        known = ", ".join(FORMATS)
        raise ValueError(f"unknown number format {name!r}: use one of {known}") from None
