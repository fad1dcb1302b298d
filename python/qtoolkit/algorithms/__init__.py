"""Post-training algorithms: what makes a quantized model keep the accuracy of the float one."""

from qtoolkit.algorithms.adaround import AdaRound
from qtoolkit.algorithms.bias_correction import BiasCorrection
from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.cross_layer_equalization import CrossLayerEqualization
from qtoolkit.algorithms.registry import (
    AFTER,
    BEFORE,
    Algorithm,
    make_algorithm,
    register_algorithm,
    registered_algorithms,
)
from qtoolkit.algorithms.run_folder import RunFolder
from qtoolkit.algorithms.scale_search import ActivationAwareScales
from qtoolkit.algorithms.smooth_quant import SmoothQuant

__all__ = [
    "AFTER",
    "BEFORE",
    "ActivationAwareScales",
    "AdaRound",
    "Algorithm",
    "BiasCorrection",
    "Context",
    "CrossLayerEqualization",
    "Layer",
    "RunFolder",
    "SmoothQuant",
    "make_algorithm",
    "register_algorithm",
    "registered_algorithms",
]
