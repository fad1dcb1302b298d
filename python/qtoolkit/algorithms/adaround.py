"""AdaRound: weights are rounded up or down as suits the layer's output."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.algorithms.rounding import Samples, SoftRounding, Training
from qtoolkit.algorithms.walk import Visit, walk
from qtoolkit.nn.weights import IntegerWeight, dequantized


@register_algorithm("adaround")
@dataclass(frozen=True)
class AdaRound(Algorithm):
    """Learns for every weight whether it is rounded up or down, layer by layer in the order of the
    network: the output for the inputs that the quantized layers before give, after a fused ReLU,
    shall be the float network's. Scales have the least squared error of the weight. A layer
    whose nearest codes turn out better keeps those.

    Needs no labels; a few hundred samples. It pays at 4 bits and fewer.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020).

    Args:
        iterations: steps for each layer at most; a layer ends early once all is decided.
        samples: use so many samples at most.
        batch: samples a step.
        rate: Adam's learning rate.
        strength: weight of the penalty on weights that are rounded neither up nor down.
        activations: let inputs be rounded as they will be; else weights alone are.
        seed: of the choice of samples.
    """

    iterations: int = 300
    samples: int = 256
    batch: int = 32
    rate: float = 0.1
    strength: float = 1.0
    activations: bool = True
    seed: int = 0

    stage = AFTER

    def run(self, context: Context) -> None:
        few = context.limited(self.samples)
        layers = few.owners()
        with few.simulated(activations=self.activations):
            for visit, done in few.steps(walk(few, layers), "AdaRound", len(layers)):
                if not done:
                    few.pin(visit.layer, self._rounded(visit, few.layers.index(visit.layer)))

    def _rounded(self, visit: Visit, index: int) -> IntegerWeight:
        layer = visit.layer
        targets = [layer.activation(y) for y in visit.float_outputs()]
        samples = Samples(visit.inputs, targets)
        rounding = SoftRounding.of(layer, visit.float_module)

        def loss(_: object, x: Tensor, target: Tensor) -> Tensor:
            return _difference(layer, rounding(), x, target)

        nearest = rounding.rounded()
        scale = layer_error(layer, nearest, samples, self.batch)
        training = Training(
            self.iterations, self.batch, self.rate, self.strength, self.seed + index
        )
        training.run([rounding], samples, loss, scale)
        learned = rounding.learned()
        better = layer_error(layer, learned, samples, self.batch) < scale
        return learned if better else nearest


def _difference(layer: Layer, weight: Tensor, x: Tensor, target: Tensor) -> Tensor:
    output = functional_call(layer.module, {"weight": weight}, (x,))
    return (layer.activation(output) - target).square().mean()


def layer_error(layer: Layer, weight: IntegerWeight, samples: Samples, batch: int) -> float:
    """Mean squared error of a layer's output with these codes, over all samples."""
    total, count = 0.0, 0
    with torch.no_grad():
        real = dequantized(weight, layer.module)
        for x, target in samples.batches(batch):
            total += float(_difference(layer, real, x, target)) * len(x)
            count += len(x)
    return total / max(count, 1)
