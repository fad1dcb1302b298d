"""Post-training algorithms: what makes a quantized model keep the accuracy of the float one."""

from qtoolkit.algorithms.adaround import AdaRound
from qtoolkit.algorithms.analytic_bias_correction import AnalyticBiasCorrection
from qtoolkit.algorithms.batch_norm_reestimation import BatchNormReestimation
from qtoolkit.algorithms.bias_correction import BiasCorrection
from qtoolkit.algorithms.block_reconstruction import BlockReconstruction
from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.cross_layer_equalization import CrossLayerEqualization
from qtoolkit.algorithms.range_selection import RangeSelection
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
    "AnalyticBiasCorrection",
    "BatchNormReestimation",
    "BiasCorrection",
    "BlockReconstruction",
    "Context",
    "CrossLayerEqualization",
    "Layer",
    "RangeSelection",
    "RunFolder",
    "SmoothQuant",
    "make_algorithm",
    "register_algorithm",
    "registered_algorithms",
]
