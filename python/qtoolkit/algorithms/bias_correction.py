"""Bias correction: what quantizing the weights shifts the mean of a layer's output by is taken
out of its bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.progress import progress_bar


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
    """

    activations: bool = True

    stage = AFTER

    def run(self, context: Context) -> None:
        means: dict[str, Tensor] = {}
        for layer in context.layers:
            found = context.record(layer, what="output", reduce=_mean_of(layer))
            if found:
                means[layer.path] = torch.stack(found).mean(0)
        reached = [layer for layer in context.layers if layer.path in means]
        with context.simulated(activations=self.activations):
            for layer in progress_bar(reached, "bias correction", progress=context.progress):
                found = context.record(layer, what="output", reduce=_mean_of(layer))
                shift = torch.stack(found).mean(0) - means[layer.path]
                if layer.module.bias is None:
                    layer.module.bias = nn.Parameter(-shift, requires_grad=False)
                else:
                    layer.module.bias.data.sub_(shift)


def _mean_of(layer: Layer) -> Callable[[Tensor], Tensor]:
    """The mean of each output channel."""
    channels = -1 if isinstance(layer.module, nn.Linear) else 1

    def mean(output: Tensor) -> Tensor:
        return output.movedim(channels, 0).flatten(1).mean(1)

    return mean
