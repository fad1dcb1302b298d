"""Mean and variance of values without data, from the batch norms that were folded into layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.normalize import folded_statistics
from qtoolkit.graph.patterns.fusing import relu_bound
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.same_values import IDENTITIES
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import functional
from qtoolkit.nn.weights import swap_channels

#: Mean and variance of each channel.
Moments = tuple[Tensor, Tensor]

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
# The mean of a channel stays; so does its variance, as neighbours are much alike.
_AVERAGES = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, functional.GlobalAvgPool2d)


def clipped_normal(mean: Tensor, variance: Tensor, upper: float | None = None) -> Moments:
    """Mean and variance of a normally distributed value after a ReLU or, with a bound, a ReLU6.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), appendix C.
    """
    mean, variance = mean.double(), variance.double()
    deviation = variance.sqrt().clamp(min=1e-12)
    low = -mean / deviation
    high = torch.full_like(low, math.inf) if upper is None else (upper - mean) / deviation
    inside = _cumulative(high) - _cumulative(low)
    above = 1 - _cumulative(high)
    bound = 0.0 if upper is None else upper
    edges = _density(low) - _density(high)
    slopes = low * _density(low) - torch.where(high.isinf(), 0.0, high * _density(high))
    first = mean * inside + deviation * edges + bound * above
    second = (
        (mean**2 + variance) * inside
        + 2 * mean * deviation * edges
        + variance * slopes
        + bound**2 * above
    )
    return first.float(), (second - first**2).clamp(min=0.0).float()


def _cumulative(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)


def input_moments(graph: fx.GraphModule) -> dict[fx.Node, Moments]:
    """Of what each layer with a weight reads, as far as it is known."""
    known: dict[fx.Node, Moments] = {}
    found = {}
    for node in graph.graph.nodes:
        called = called_module(node, graph)
        source = known.get(node.args[0]) if node.args else None
        if is_plain(called, _WEIGHTED):
            if source is not None and len(source[0]) == _inputs(called):
                found[node] = source
            else:
                source = None
            moments = _given(called, source)
        elif isinstance(called, functional.Add):
            parts = [known.get(arg) for arg in node.args]
            moments = _sum(parts)
        else:
            moments = None if source is None else _passed(node, called, source)
        if moments is not None:
            known[node] = moments
    return found


def _inputs(layer: Any) -> int:
    return layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels


def _given(layer: Any, source: Moments | None) -> Moments | None:
    """What a layer gives: what its batch norm made, or what follows from its inputs."""
    statistics = folded_statistics(layer)
    if statistics is not None:
        return statistics[0], statistics[1] ** 2
    if source is None:
        return None
    mean = expected_output(layer, layer.weight.detach(), source[0])
    variance = expected_output(layer, layer.weight.detach() ** 2, source[1])
    return mean if layer.bias is None else mean + layer.bias.detach(), variance


def _sum(parts: list[Moments | None]) -> Moments | None:
    known = [part for part in parts if part is not None]
    if len(known) != 2 or len(known) != len(parts) or known[0][0].shape != known[1][0].shape:
        return None
    return known[0][0] + known[1][0], known[0][1] + known[1][1]


def _passed(node: fx.Node, called: nn.Module | None, source: Moments) -> Moments | None:
    if is_observer(called) or is_plain(called, (*IDENTITIES, *_AVERAGES)):
        return source
    is_relu, upper = relu_bound(called)
    if is_relu:
        return clipped_normal(*source, upper)
    shape = float_shape(node)
    flattens = is_plain(called, nn.Flatten) or node.target in (torch.flatten, "flatten")
    if flattens and shape is not None and len(shape) == 2 and shape[1] % len(source[0]) == 0:
        repeat = shape[1] // len(source[0])
        return source[0].repeat_interleave(repeat), source[1].repeat_interleave(repeat)
    return None


def expected_output(layer: Any, weight: Tensor, mean: Tensor) -> Tensor:
    """The mean of what a layer with this weight and no bias gives for inputs of this mean, at the
    border too as in the middle."""
    if isinstance(layer, nn.Linear):
        return weight @ mean
    share = 1.0
    if isinstance(layer, nn.ConvTranspose2d):
        weight = swap_channels(weight, layer.groups)
        share = 1 / math.prod(layer.stride)  # an output meets one in so many weights
    taps = weight.flatten(2).sum(2)
    grouped = taps.reshape(layer.groups, -1, taps.shape[1])
    return share * (grouped @ mean.reshape(layer.groups, -1, 1)).reshape(-1)
