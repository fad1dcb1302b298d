"""Bias correction: what quantizing the weights shifts the mean of a layer's output by is taken
out of its bias."""

from __future__ import annotations

from dataclasses import dataclass

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
        wanted = _means(context, context.layers)
        reached = [layer for layer in context.layers if layer in wanted]
        with context.simulated(activations=self.activations):
            for layer in progress_bar(reached, "bias correction", progress=context.progress):
                shift = _means(context, [layer])[layer] - wanted[layer]
                bias = layer.module.bias
                # A new one: the calls of a layer that is called several times share theirs.
                corrected = -shift if bias is None else bias.detach() - shift
                layer.module.bias = nn.Parameter(corrected, requires_grad=False)


def _means(context: Context, layers: list[Layer]) -> dict[Layer, Tensor]:
    """The mean of each output channel over all data, of the layers that the data reaches."""
    sums: dict[Layer, Tensor] = {}
    counts: dict[Layer, int] = {}

    def add(layer: Layer, output: Tensor) -> None:
        channels = output.movedim(-1 if isinstance(layer.module, nn.Linear) else 1, 0).flatten(1)
        sums[layer] = sums.get(layer, 0.0) + channels.double().sum(1)
        counts[layer] = counts.get(layer, 0) + channels.shape[1]

    context.watch(layers, add)
    return {layer: (total / counts[layer]).float() for layer, total in sums.items()}
