"""Batch-norm re-estimation: quantized layers get the statistics of the float ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.algorithms.walk import Visit, walk
from qtoolkit.graph.normalize import folded_statistics
from qtoolkit.nn.weights import IntegerWeight

# A deviation is corrected by this factor at most.
_LARGEST = 2.0


@register_algorithm("batch_norm_reestimation")
@dataclass(frozen=True)
class BatchNormReestimation(Algorithm):
    """Measures the batch norms that were folded into layers anew, in the quantized network and in
    its order: mean and variance of each output channel become those that the float network has on
    the same data. The mean goes into the bias, the deviation into the scales of the weight's codes,
    where each channel has one. It does what ``bias_correction`` does, and more, for layers that
    had a batch norm; it pays at few bits, where rounding changes deviations too.

    The float network's statistics on the same data stand for those of training, so a few samples
    suffice.

    Source: Sun et al., "Hybrid 8-bit Floating Point (HFP8) Training and Inference for Deep Neural
    Networks" (2019), section 4.2; Nagel et al., "A White Paper on Neural Network Quantization"
    (2021), section 5.2.

    Args:
        activations: quantize activations as well while statistics are taken; else weights alone.
        samples: use so many samples at most.
    """

    activations: bool = True
    samples: int = 64

    stage = AFTER

    def run(self, context: Context) -> None:
        few = context.limited(self.samples)
        layers = [layer for layer in few.layers if folded_statistics(layer.module) is not None]
        with few.simulated(activations=self.activations):
            steps = few.steps(walk(few, layers), "batch-norm re-estimation", len(layers))
            for visit, done in steps:
                if not done:
                    _reestimate(few, visit)


def _reestimate(context: Context, visit: Visit) -> None:
    layer = visit.layer
    mean, deviation = _statistics(layer, visit.outputs())
    wanted_mean, wanted_deviation = _statistics(layer, visit.float_outputs())
    factor = torch.ones_like(mean)
    if layer.weight_spec.granularity == "per_channel" and _alone(context, layer):
        usable = (deviation > 0) & (wanted_deviation > 0)
        ratio = (wanted_deviation / deviation).clamp(1 / _LARGEST, _LARGEST)
        factor = torch.where(usable, ratio, factor)
        weight = layer.integer_weight()
        context.pin(layer, IntegerWeight(weight.codes, weight.scale * factor))
    bias = layer.module.bias
    bias = torch.zeros_like(mean) if bias is None else bias.detach()
    layer.set_bias((bias - mean) * factor + wanted_mean)


def _alone(context: Context, layer: Layer) -> bool:
    return sum(other.module.weight is layer.module.weight for other in context.layers) == 1


def _statistics(layer: Layer, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each output channel over all calls."""
    axis = -1 if isinstance(layer.module, nn.Linear) else 1
    channels = [output.movedim(axis, 0).flatten(1).double() for output in outputs]
    count = sum(values.shape[1] for values in channels)
    mean = torch.stack([values.sum(1) for values in channels]).sum(0) / count
    squares = [(values - mean[:, None]).square().sum(1) for values in channels]
    return mean.float(), (torch.stack(squares).sum(0) / count).sqrt().float()
