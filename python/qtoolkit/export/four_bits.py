"""Codes that can be stored in four bits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def in_four_bits(
    codes: NDArray[Any], axis: int | None
) -> tuple[NDArray[np.int8], NDArray[np.int32]] | None:
    """Codes divided by their channel's greatest common divisor, where the quotients fit in int4.

    A layer's weight of four bits is kept in finer steps, so that its bias is rounded less, see
    ``nn.weights.quantize_bias``: its codes are multiples of a factor, channel by channel.

    Args:
        codes: of a weight, int8.
        axis: the dimension of channels; None for one scale.

    Returns:
        The quotients, and the divisors in a shape that broadcasts to theirs; None if they do not
        fit.
    """
    if codes.size == 0:
        return None
    others = tuple(dim for dim in range(codes.ndim) if dim != axis)
    divisor = np.maximum(np.gcd.reduce(codes.astype(np.int32), axis=others, keepdims=True), 1)
    quotient = codes // divisor
    if quotient.min() < -8 or quotient.max() > 7:
        return None
    return quotient.astype(np.int8), divisor
