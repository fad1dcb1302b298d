"""Weights that learn which way to round, and the training of them on samples of a few layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit.algorithms.context import Layer
from qtoolkit.graph.patterns.weighted import float_weight
from qtoolkit.nn.weights import IntegerWeight, swap_channels
from qtoolkit.qconfig import TensorSpec

# The sigmoid is stretched to this interval and clipped to [0, 1], so that it can reach both ends.
_LOW, _HIGH = -0.1, 1.1
# Exponents of the regularizer, from the beginning of annealing to the end.
_SOFT, _HARD = 20.0, 2.0
# Share of the iterations before roundings are pushed to 0 or 1.
_WARM_UP = 0.2
# A rounding this near to 0 or 1 is decided.
_DECIDED = 0.01


def searched_scale(weight: Tensor, spec: TensorSpec, candidates: int = 60) -> Tensor:
    """The scale of each output channel (one for all, per tensor) whose codes have the least squared
    error, float32 [output channels].

    Args:
        weight: float32, output channels first.
        spec: symmetric.
    """
    rows = weight.flatten(1) if spec.granularity == "per_channel" else weight.reshape(1, -1)
    largest = rows.abs().amax(1).clamp(min=2.0**-100 * spec.quant_max)
    best = torch.full_like(largest, math.inf)
    scale = largest / spec.quant_max
    for step in range(candidates):
        tried = largest / spec.quant_max * (1 - 0.7 * step / candidates)
        codes = (rows / tried[:, None]).round().clamp(spec.quant_min, spec.quant_max)
        error = (codes * tried[:, None] - rows).square().sum(1)
        scale = torch.where(error < best, tried, scale)
        best = torch.minimum(error, best)
    return scale.expand(weight.shape[0]).contiguous()


class SoftRounding(nn.Module):
    """A layer's weight as floor(w / s) + h, with h in [0, 1] to be learned.

    It begins with the float weight; h ends at 0 or 1.

    Source: Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020),
    section 3.

    Args:
        layer: the layer.
        weight: its float weight, output channels first.
        scale: float32 [output channels].
    """

    def __init__(self, layer: Layer, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.layer = layer
        spec = layer.weight_spec
        self.limits = spec.quant_min, spec.quant_max
        self.scale = scale
        self.wide_scale = scale.reshape(-1, *([1] * (weight.dim() - 1)))
        steps = weight / self.wide_scale
        self.nearest = steps.round().clamp(*self.limits)
        self.floor = steps.floor()
        rest = ((steps - self.floor) - _LOW) / (_HIGH - _LOW)
        self.logits = nn.Parameter((rest / (1 - rest)).log())

    @classmethod
    def of(cls, layer: Layer, float_layer: nn.Module) -> SoftRounding:
        """That of a layer whose float weight ``float_layer`` has; the scale has the least squared
        error."""
        weight = float_weight(float_layer).detach()
        return cls(layer, weight, searched_scale(weight, layer.weight_spec))

    def shares(self) -> Tensor:
        """h."""
        return (torch.sigmoid(self.logits) * (_HIGH - _LOW) + _LOW).clamp(0.0, 1.0)

    def forward(self) -> Tensor:
        """The weight in the layout of the layer."""
        return self._real((self.floor + self.shares()).clamp(*self.limits))

    def undecided(self) -> float:
        """The share of h that is neither 0 nor 1."""
        h = self.shares().detach()
        return float(((h > _DECIDED) & (h < 1 - _DECIDED)).float().mean())

    def penalty(self, exponent: float) -> Tensor:
        """Mean of 1 - |2h - 1|^exponent: 0 once all are decided."""
        return (1 - (2 * self.shares() - 1).abs().pow(exponent)).mean()

    def learned(self) -> IntegerWeight:
        """The codes with h rounded."""
        codes = self.floor + (self.logits.detach() >= 0)
        return IntegerWeight(codes.clamp(*self.limits).to(torch.int8), self.scale)

    def rounded(self) -> IntegerWeight:
        """The nearest codes, as they would be without learning."""
        return IntegerWeight(self.nearest.to(torch.int8), self.scale)

    def _real(self, codes: Tensor) -> Tensor:
        real = codes * self.wide_scale
        module = self.layer.module
        return (
            swap_channels(real, module.groups) if isinstance(module, nn.ConvTranspose2d) else real
        )


class Samples:
    """Tensors of several calls as samples; those of one shape are drawn together.

    Args:
        tensors: of each kind (such as input and target) one tensor a call; samples are the first
            dimension.
    """

    def __init__(self, *tensors: Sequence[Tensor]) -> None:
        groups: dict[tuple[torch.Size, ...], list[tuple[Tensor, ...]]] = {}
        for call in zip(*tensors):
            groups.setdefault(tuple(t.shape[1:] for t in call), []).append(call)
        self._groups = [tuple(map(torch.cat, zip(*calls))) for calls in groups.values()]
        self._sizes = torch.tensor([float(len(group[0])) for group in self._groups])

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """So many samples of one shape, fewer where there are not so many."""
        group = self._groups[int(torch.multinomial(self._sizes, 1, generator=generator))]
        chosen = torch.randperm(len(group[0]), generator=generator)[:count].to(group[0].device)
        return tuple(tensor[chosen] for tensor in group)

    def batches(self, count: int) -> Iterator[tuple[Tensor, ...]]:
        """All samples in their order, so many at a time."""
        for group in self._groups:
            yield from zip(*(tensor.split(count) for tensor in group))


@dataclass(frozen=True)
class Training:
    """How roundings are learned.

    Args:
        iterations: steps at most; it ends early once every rounding is decided.
        batch: samples a step.
        rate: Adam's learning rate of the roundings.
        strength: weight of the penalty on undecided roundings beside the relative error.
        seed: of the choice of samples.
    """

    iterations: int
    batch: int
    rate: float
    strength: float
    seed: int

    def exponent(self, step: int) -> float | None:
        """The regularizer's exponent; None before annealing begins."""
        begin = _WARM_UP * self.iterations
        if step < begin:
            return None
        share = (step - begin) / max(self.iterations - begin, 1)
        return _HARD + 0.5 * (_SOFT - _HARD) * (1 + math.cos(share * math.pi))

    @torch.enable_grad()
    def run(
        self,
        roundings: Sequence[SoftRounding],
        samples: Samples,
        loss: Callable[..., Tensor],
        scale: float,
        more: Sequence[dict[str, object]] = (),
    ) -> None:
        """Learns the roundings.

        Args:
            samples: what ``loss`` is called with, and how it is drawn.
            loss: mean squared error of some samples, with gradients, from the generator and them.
            scale: the error of the nearest codes; the loss is divided by it, so that the strength
                of the penalty depends on no scale.
            more: further groups of parameters for Adam.
        """
        generator = torch.Generator().manual_seed(self.seed)
        parameters = [rounding.logits for rounding in roundings]
        optimizer = torch.optim.Adam([{"params": parameters, "lr": self.rate}, *more])
        for step in range(self.iterations):
            error = loss(generator, *samples.draw(self.batch, generator)) / max(scale, 1e-30)
            exponent = self.exponent(step)
            total = error
            if exponent is not None:
                penalty = torch.stack([rounding.penalty(exponent) for rounding in roundings]).mean()
                total = error + self.strength * penalty
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            if step % 25 == 24 and max(r.undecided() for r in roundings) == 0:
                break
