"""Cross-layer equalization: neighbouring layers share the range of each channel evenly."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.registry import BEFORE, Algorithm, register_algorithm
from qtoolkit.algorithms.scaling import Link, find_links
from qtoolkit.progress import progress_bar

# A channel is scaled by this much at most, in both directions.
_LARGEST = 1e4
# Data that was not seen may be this much larger before a ReLU6.
_MARGIN = 1.1
# Logarithm of the largest change in a round that ends the search.
_SETTLED = 1e-3


@register_algorithm("cross_layer_equalization")
@dataclass(frozen=True)
class CrossLayerEqualization(Algorithm):
    """Scales the channels between two layers so that both have weights of the same range there:
    s = sqrt(r1 / r2) for the ranges r1 of the weights that make a channel and r2 of those that read
    it. Chains of layers, depthwise ones too, are repeated until nothing changes. What the float
    network computes does not change.

    It is for weights with one scale a tensor: with one a channel, only activations can gain.
    Values that are added to others, or read by anything but layers with weights, stay as they are.

    A ReLU6 stays in its place, as integer kernels clip at one bound: a channel whose data reaches
    the bound keeps its scale, and others stay below it with a margin of 10 %.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction"
    (2019), section 4.1.

    Args:
        rounds: repeat so many times at most.
    """

    rounds: int = 40

    stage = BEFORE

    def run(self, context: Context) -> None:
        links = [link for link in find_links(context.prepared) if not link.is_norm]
        clipped = [link for link in links if link.upper < inf]
        largest = _largest_outputs(context, clipped) if clipped else {}
        bar = progress_bar(
            range(self.rounds), "cross-layer equalization", progress=context.progress
        )
        for _ in bar:
            change = 0.0
            for link in links:
                scale = _balance(link.made_ranges(), link.read_ranges())
                if link.upper < inf:
                    scale = _below_bound(scale, largest.get(link), link.upper)
                link.divide(scale)
                if link in largest:
                    largest[link] = largest[link] / scale
                change = max(change, float(scale.log().abs().max()))
            if change < _SETTLED:
                break


def _balance(made: Tensor, read: Tensor) -> Tensor:
    """The scale that makes two ranges equal; 1 where a range is zero."""
    scale = (made / read).sqrt()
    usable = (made > 0) & (read > 0) & torch.isfinite(scale)
    return torch.where(usable, scale.clamp(1 / _LARGEST, _LARGEST), torch.ones_like(scale))


def _below_bound(scale: Tensor, largest: Tensor | None, upper: float) -> Tensor:
    """The scale as far as values stay below the bound; 1 where they reach it or are unknown."""
    if largest is None:
        return torch.ones_like(scale)
    least = largest.clamp(min=0.0) * (_MARGIN / upper)
    return torch.where(least < 1, torch.maximum(scale, least), torch.ones_like(scale))


def _largest_outputs(context: Context, links: list[Link]) -> dict[Link, Tensor]:
    """The largest value of each channel that the layers which make them give."""
    found: dict[Link, Tensor] = {}
    handles = []
    for link in links:

        def see(module: nn.Module, _: Any, output: Tensor, link: Link = link) -> None:
            axis = -1 if isinstance(module, nn.Linear) else 1
            most = output.detach().movedim(axis, 0).flatten(1).amax(1)
            found[link] = torch.maximum(found[link], most) if link in found else most

        handles.append(link.maker.register_forward_hook(see))
    try:
        for batch in context.batches:
            context.run(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found
