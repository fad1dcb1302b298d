"""Bias correction: what quantizing the weights shifts the mean of a layer's output by is taken
out of its bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.algorithms.walk import walk


@register_algorithm("bias_correction")
@dataclass(frozen=True)
class BiasCorrection(Algorithm):
    """Empirical bias correction of layers with a weight, in the order of the network.

    The mean of each output channel over the calibration data, before a fused ReLU, is compared
    between the float network and the quantized one whose earlier layers are corrected already; the
    difference goes into the bias. A layer without a bias gets one.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), section 4.2 and appendix D.

    Args:
        activations: quantize activations as well while the means are taken; else weights alone.
        samples: use so many samples at most.
    """

    activations: bool = True
    samples: int = 64

    stage = AFTER

    def run(self, context: Context) -> None:
        few = context.limited(self.samples)
        with few.simulated(activations=self.activations):
            visits = walk(few, few.layers)
            for visit, done in few.steps(visits, "bias correction", len(few.layers)):
                if not done:
                    layer = visit.layer
                    shift = _mean(layer, visit.outputs()) - _mean(layer, visit.float_outputs())
                    bias = layer.module.bias
                    layer.set_bias(-shift if bias is None else bias.detach() - shift)


def _mean(layer: Layer, outputs: list[Tensor]) -> Tensor:
    """The mean of each output channel over all calls."""
    axis = -1 if isinstance(layer.module, nn.Linear) else 1
    channels = [output.movedim(axis, 0).flatten(1) for output in outputs]
    total = torch.stack([values.double().sum(1) for values in channels]).sum(0)
    return (total / sum(values.shape[1] for values in channels)).float()
