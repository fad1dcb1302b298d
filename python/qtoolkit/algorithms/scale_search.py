"""Activation-aware scale search: the scale of each channel under which rounding costs least."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit.algorithms.activations import ChannelValues, linear_links
from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.registry import BEFORE, Algorithm, register_algorithm
from qtoolkit.nn.weights import dequantized, quantize_weight
from qtoolkit.observers.base import range_to_qparams
from qtoolkit.ops import fake_quantize_per_tensor
from qtoolkit.progress import progress_bar

_LEAST = 1e-4


@register_algorithm("activation_aware_scales")
@dataclass(frozen=True)
class ActivationAwareScales(Algorithm):
    """Divides the channels of what linear layers read by s = mean|x|^alpha and multiplies the
    weights by it, with the alpha that changes the layers' outputs least once weights and inputs are
    rounded. alpha = 0 changes nothing and is among those that are tried, so no layer's error grows
    on the samples. The division goes where ``smooth_quant`` puts it.

    Source: Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
    Acceleration" (2024), section 3.2.

    Args:
        grid: how many values of alpha from 0 to 1 are tried.
        samples: how many rows (tokens) outputs are compared on.
    """

    grid: int = 20
    samples: int = 256

    stage = BEFORE

    def run(self, context: Context) -> None:
        layers = {layer.module: layer for layer in context.layers}
        links = [
            link
            for link in linear_links(context)
            if all(r.module in layers and r.repeat == 1 for r in link.readers)
        ]
        readers = [reader for link in links for reader in link.readers]
        values = ChannelValues(context, readers, self.samples)
        for link in progress_bar(links, "activation-aware scales", progress=context.progress):
            first = link.readers[0]
            if first not in values.rows:
                continue
            wanted = [layers[reader.module] for reader in link.readers]
            scales = self._candidates(values.mean[first])
            errors = torch.stack([_error(wanted, values.rows[first], scale) for scale in scales])
            best = int(errors.argmin())
            if best:
                link.divide(scales[best])

    def _candidates(self, mean: Tensor) -> list[Tensor]:
        """Scales with a geometric mean of 1; the first changes nothing."""
        mean = mean.clamp(min=float(mean.max()) * _LEAST).clamp(min=1e-30)
        logarithm = mean.log()
        logarithm = logarithm - logarithm.mean()
        return [(logarithm * step / self.grid).exp() for step in range(self.grid)]


def _error(layers: list[Layer], x: Tensor, scale: Tensor) -> Tensor:
    """Squared error of all layers' outputs when a value with these scales is quantized."""
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for layer in layers:
        spec = layer.qconfig.activation
        assert spec is not None
        scaled = x / scale
        qparams = range_to_qparams(scaled.min(), scaled.max(), spec)
        rounded = fake_quantize_per_tensor(scaled, *qparams, spec.quant_min, spec.quant_max)
        weight = layer.module.weight.detach()
        quantized = quantize_weight(weight * scale, layer.weight_spec, layer.name)
        found = functional.linear(rounded, dequantized(quantized, layer.module))
        total += (found - functional.linear(x, weight)).double().square().sum()
    return total
