"""Block reconstruction: the weights of a block are rounded as suits the block's output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from qtoolkit.algorithms.blocks import Block, LearnedScale, find_blocks, speaker_of
from qtoolkit.algorithms.context import Context
from qtoolkit.algorithms.registry import AFTER, Algorithm, register_algorithm
from qtoolkit.algorithms.rounding import Samples, SoftRounding, Training
from qtoolkit.algorithms.simulation import Quantizers, fixed_quantizer
from qtoolkit.algorithms.walk import Runner, graph_runners
from qtoolkit.nn.weights import IntegerWeight, dequantized


@register_algorithm("block_reconstruction")
@dataclass(frozen=True)
class BlockReconstruction(Algorithm):
    """Learns for every weight whether it is rounded up or down, and the scales of activations,
    block by block: a block's output for the inputs that the quantized blocks before give shall be
    the float network's. A block is what lies between two points that one value alone passes: a
    residual block, or one layer of a chain. While it is learned, some values at random are left as
    the float network has them (QDrop), which makes the result fit more data. A block that turns out
    worse than its nearest codes keeps those; layers in no block keep theirs.

    Needs no labels; a few hundred samples. It is for 4 bits and fewer, of activations too.

    Source: Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction" (2021); Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit
    Post-Training Quantization" (2022).

    Args:
        iterations: steps for each block at most; a block ends early once all is decided.
        samples: use so many samples at most.
        batch: samples a step.
        rate: Adam's learning rate of the roundings.
        scale_rate: that of the logarithms of the activations' scales; 0 leaves the scales.
        strength: weight of the penalty on weights that are rounded neither up nor down.
        drop: the chance of a value to be left in float; 0 switches QDrop off.
        seed: of the choice of samples and values.
    """

    iterations: int = 300
    samples: int = 256
    batch: int = 32
    rate: float = 0.1
    scale_rate: float = 1e-3
    strength: float = 1.0
    drop: float = 0.5
    seed: int = 0

    stage = AFTER

    def run(self, context: Context) -> None:
        few = context.limited(self.samples)
        with few.simulated() as quantizers:
            steps = few.steps(_visits(few), "block reconstruction", len(few.layers))
            for number, (visit, done) in enumerate(steps):
                if not done:
                    self._learn(few, visit, quantizers, self.seed + number)
                for observer in quantizers:
                    if speaker_of(observer) in visit.block.observers:
                        quantizers[observer] = fixed_quantizer(observer)

    def _learn(self, context: Context, visit: _Visit, quantizers: Quantizers, seed: int) -> None:
        block = visit.block
        module = block.module()
        roundings = {
            f"{layer.match.anchor.target}.weight": SoftRounding.of(
                layer, context.float_module(layer)
            )
            for layer in block.layers
        }
        samples = Samples(visit.inputs, visit.float_inputs, visit.targets())
        nearest = {name: rounding.rounded() for name, rounding in roundings.items()}
        before = _error(module, roundings, nearest, samples, self.batch)

        scales = self._learned_scales(block, quantizers)

        def loss(generator: torch.Generator, x: Tensor, float_x: Tensor, target: Tensor) -> Tensor:
            if self.drop:
                chosen = torch.rand(x.shape, generator=generator) < self.drop
                x = torch.where(chosen.to(x.device), float_x, x)
            weights = {name: rounding() for name, rounding in roundings.items()}
            return (functional_call(module, weights, (x,)) - target).square().mean()

        for number, scale in enumerate(scales.values()):
            scale.generator.manual_seed(1000 * seed + number)
        rates = [{"params": [s.logarithm for s in scales.values()], "lr": self.scale_rate}]
        training = Training(self.iterations, self.batch, self.rate, self.strength, seed)
        training.run(list(roundings.values()), samples, loss, before, rates if scales else [])

        for scale in scales.values():
            scale.eval()
        learned = {name: rounding.learned() for name, rounding in roundings.items()}
        better = _error(module, roundings, learned, samples, self.batch) < before
        for name, layer in zip(roundings, block.layers):
            context.pin(layer, learned[name] if better else nearest[name])
        if better:
            for observer, scale in scales.items():
                observer.pin(*scale.qparams())

    def _learned_scales(self, block: Block, quantizers: Quantizers) -> dict[Any, LearnedScale]:
        """Puts learned scales in the place of the block's fixed ones."""
        scales: dict[Any, LearnedScale] = {}
        for observer in block.observers:
            if observer not in quantizers:  # before an addition: it rounds nothing
                continue
            scale = LearnedScale(observer, self.drop).to(observer.min_val.device)
            scale.logarithm.requires_grad_(self.scale_rate > 0)
            scales[observer] = scale
        for module in quantizers:
            if speaker_of(module) in scales:
                quantizers[module] = scales[speaker_of(module)]
        return scales


@dataclass(frozen=True)
class _Visit:
    """A block with what it reads in the network as it is quantized so far and in the float one."""

    block: Block
    inputs: list[Tensor]
    float_inputs: list[Tensor]
    float_runner: Runner

    def state(self) -> dict[str, Any]:
        return self.block.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.block.load_state(state)

    def targets(self) -> list[Tensor]:
        """What the block gives in the float network."""
        self.float_runner.run_to(self.block.end)
        return self.float_runner.values(self.block.output)


def _visits(context: Context) -> Iterator[_Visit]:
    """The blocks that the data reaches, in order."""
    owners = context.owners()
    for graph, runner, float_runner in graph_runners(context):
        for block in find_blocks(graph, owners):
            runner.run_to(_after(graph, block.input))
            float_runner.run_to(_after(graph, block.input))
            inputs, float_inputs = runner.values(block.input), float_runner.values(block.input)
            yield _Visit(block, inputs, float_inputs, float_runner)


def _after(graph: fx.GraphModule, name: str) -> str:
    names = [node.name for node in graph.graph.nodes]
    return names[names.index(name) + 1]


def _error(
    module: nn.Module,
    roundings: dict[str, SoftRounding],
    weights: dict[str, IntegerWeight],
    samples: Samples,
    batch: int,
) -> float:
    """Mean squared error of a block with these codes, over all samples."""
    real = {name: dequantized(weights[name], r.layer.module) for name, r in roundings.items()}
    total, count = 0.0, 0
    with torch.no_grad():
        for x, _, target in samples.batches(batch):
            output = functional_call(module, real, (x,))
            total += float((output - target).square().mean()) * len(x)
            count += len(x)
    return total / max(count, 1)
