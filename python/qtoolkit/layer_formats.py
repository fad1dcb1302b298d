"""Formats by name, as what one layer is quantized with."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from qtoolkit.formats import FORMATS
from qtoolkit.qconfig import QConfig, TensorSpec, get_default_qconfig_mapping

Formats = Sequence[str] | Mapping[str, QConfig | None]

_HALVES = ("fp16", "bf16")
FLOAT = "float32"


def qconfigs_of(formats: Formats, target: str = "x86") -> dict[str, QConfig | None]:
    """What each format is for a layer.

    Args:
        formats: names, or names with a ``QConfig`` each (None: the layer stays in float). Names
            that are known: "int8", "int4", ... (the weight; activations have 8 bits), "w4a4", ...
            (weight and activations), "fp16", "bf16" and "float32".
        target: the runtime, see ``get_default_qconfig_mapping``.

    Raises:
        ValueError: no format, or an unknown name; lists those that are known.
        TypeError: one text instead of several, or a value that is no ``QConfig``.
    """
    if isinstance(formats, str) or not isinstance(formats, Sequence | Mapping):
        raise TypeError(f'formats must be a tuple of names, such as ("int8",), got {formats!r}')
    if not formats:
        raise ValueError('formats is empty: name at least one, such as ("int8",)')
    if isinstance(formats, Mapping):
        for name, qconfig in formats.items():
            if qconfig is not None and not isinstance(qconfig, QConfig):
                raise TypeError(f"formats: {name!r} must be a QConfig or None, got {qconfig!r}")
        return dict(formats)
    return {name: _by_name(name, target) for name in formats}


def _by_name(name: str, target: str) -> QConfig | None:
    eight = get_default_qconfig_mapping(target).global_qconfig
    assert eight is not None
    assert eight.activation is not None
    assert eight.weight is not None
    if name == FLOAT:
        return None
    if name in _HALVES:
        half = TensorSpec(name, method="float")
        return QConfig(half, half)
    match = re.fullmatch(r"int(\d)|w(\d)a(\d)", name) if isinstance(name, str) else None
    weight_bits = match and (match[1] or match[2])
    activation_bits = match and (match[3] or "8")
    sign = eight.activation.format.rstrip("0123456789")
    wanted = f"int{weight_bits}", f"{sign}{activation_bits}"
    if match is None or not all(each in FORMATS for each in wanted):
        raise ValueError(
            f"unknown format {name!r}: use names such as 'int8', 'int4', 'w4a4', 'fp16', 'bf16' "
            f"and '{FLOAT}', or a dict of names with a QConfig each"
        )
    return QConfig(
        replace(eight.activation, format=wanted[1]), replace(eight.weight, format=wanted[0])
    )


def bits_of(spec: TensorSpec | None) -> int:
    """How many bits a value has; 32 in float."""
    return 32 if spec is None else FORMATS[spec.format].bits
