"""Which tensors the integer kernels can compute with."""

from __future__ import annotations

from qtoolkit.formats import get_format
from qtoolkit.qconfig import TensorSpec

_MOST_BITS = 8


def is_half(spec: TensorSpec) -> bool:
    """Whether values are floats of 16 bits, which need no range."""
    number_format = get_format(spec.format)
    return number_format.kind == "float" and number_format.bits == 16


def activation_without_kernel(spec: TensorSpec) -> str | None:
    """Why activations of a specification are not codes of an integer kernel, or None."""
    number_format = get_format(spec.format)
    if number_format.kind in ("integer", "ternary") and number_format.bits <= _MOST_BITS:
        return None
    return (
        f"activations of format {spec.format} have no integer kernel (integer formats of up to "
        f"{_MOST_BITS} bits have)"
    )


def weight_without_kernel(spec: TensorSpec) -> str | None:
    """Why weights of a specification are not codes of an integer kernel, or None.

    The kernels take int8 codes with zero point 0 and one scale for each output channel.
    """
    number_format = get_format(spec.format)
    if not number_format.has_codes or number_format.bits > _MOST_BITS:
        return (
            f"weights of format {spec.format} have no integer kernel (integer formats of up to "
            f"{_MOST_BITS} bits, ternary and binary have)"
        )
    if spec.granularity == "per_group":
        return "weights per group have no integer kernel (per channel and per tensor have)"
    if spec.granularity == "per_channel" and spec.axis != 0:
        return f"weights with scales along axis {spec.axis} have no integer kernel (axis 0 has)"
    if spec.method == "observed" and not (spec.symmetric and number_format.signed):
        return f"weights of format {spec.format} with a zero point have no integer kernel " + (
            "(symmetric signed ones have)"
        )
    if spec.quant_min < -127:
        # A batch norm of negative factor turns the sign of codes.
        return (
            f"weights with the code {spec.quant_min} have no integer kernel (symmetric ones have)"
        )
    return None
