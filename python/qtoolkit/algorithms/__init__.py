"""Post-training algorithms: what makes a quantized model keep the accuracy of the float one."""

from qtoolkit.algorithms.bias_correction import BiasCorrection
from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import (
    AFTER,
    BEFORE,
    Algorithm,
    make_algorithm,
    register_algorithm,
    registered_algorithms,
)

__all__ = [
    "AFTER",
    "BEFORE",
    "Algorithm",
    "BiasCorrection",
    "Context",
    "Layer",
    "make_algorithm",
    "register_algorithm",
    "registered_algorithms",
]
