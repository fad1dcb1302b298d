"""Blocks: the parts of a graph between two points that one value alone passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.algorithms.context import Layer
from qtoolkit.graph.modules import called_module
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.shared import SharedObserver
from qtoolkit.observers import Observer


@dataclass(frozen=True)
class Block:
    """A part of a prepared graph with one input and one output, such as a residual block.

    Attributes:
        graph: the whole graph.
        input: name of the node whose value it reads.
        output: name of the node whose value it gives.
        end: name of the node after ``output``.
        layers: its layers with a weight that is quantized.
        observers: its observers, each once, of which all speak for values of this block alone.
    """

    graph: fx.GraphModule
    input: str
    output: str
    end: str
    layers: tuple[Layer, ...]
    observers: tuple[Observer, ...]

    def module(self) -> fx.GraphModule:
        """The block as a module of one input, which holds the graph's own modules."""
        taken = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inside = False
        for node in self.graph.graph.nodes:
            if node.name == self.input:
                copies[node] = taken.placeholder("x")
            elif inside or node.op == "get_attr":
                copies[node] = taken.node_copy(node, lambda used: copies[used])
            inside = inside or node.name == self.input
            if node.name == self.output:
                taken.output(copies[node])
                break
        module = fx.GraphModule(self.graph, taken)
        module.graph.eliminate_dead_code()
        module.recompile()
        return module

    def state(self) -> dict[str, Any]:
        """Of its layers and observers."""
        pinned = [observer.pinned for observer in self.observers]
        return {
            "layers": [layer.state() for layer in self.layers],
            "observers": [None if p is None else list(p) for p in pinned],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what ``state`` gave."""
        for layer, known in zip(self.layers, state["layers"]):
            layer.load_state(known)
        for observer, pinned in zip(self.observers, state["observers"]):
            if pinned is not None:
                device = observer.min_val.device
                observer.pin(*(tensor.to(device) for tensor in pinned))


def find_blocks(graph: fx.GraphModule, layers: Sequence[Layer]) -> list[Block]:
    """The blocks of a graph in order; a layer before the first point that one value passes, or
    behind the last one, is in none.

    Args:
        layers: those that are quantized.
    """
    nodes = list(graph.graph.nodes)
    cuts = _cuts(nodes)
    anchors = {layer.match.anchor: layer for layer in layers if layer.graph is graph}
    # A block begins at the last point before a layer, and ends where the next one begins.
    starts = [
        here
        for here, after in pairwise(cuts)
        if any(node in anchors for node in nodes[here + 1 : after + 1])
    ]
    homes = _homes(graph)
    blocks = []
    for start, end in zip(starts, [*starts[1:], cuts[-1]] if starts else []):
        inside = nodes[start + 1 : end + 1]
        blocks.append(
            Block(
                graph,
                nodes[start].name,
                nodes[end].name,
                nodes[end + 1].name,
                tuple(anchors[node] for node in inside if node in anchors),
                _observers(inside, graph, homes),
            )
        )
    return blocks


def _cuts(nodes: list[fx.Node]) -> list[int]:
    """The positions after which one node's value alone is used, apart from constants."""
    position = {node: i for i, node in enumerate(nodes)}
    last_use = {
        node: max((position[user] for user in node.users), default=-1)
        for node in nodes
        if node.op != "get_attr"
    }
    cuts, reach = [], -1
    first = max((i for i, node in enumerate(nodes) if node.op == "placeholder"), default=0)
    for i, node in enumerate(nodes[:-1]):
        # ``reach``: the last use of any earlier value.
        passes = i >= first and node.op != "get_attr" and reach <= i < last_use[node]
        if passes and _is_tensor(node):
            cuts.append(i)
        reach = max(reach, last_use.get(node, -1))
    return cuts


def _is_tensor(node: fx.Node) -> bool:
    return node.op in ("placeholder", "call_module")


def _homes(graph: fx.GraphModule) -> dict[nn.Module, set[fx.Node]]:
    """The nodes that each observer speaks for."""
    homes: dict[nn.Module, set[fx.Node]] = {}
    for node in graph.graph.nodes:
        called = called_module(node, graph)
        if is_observer(called):
            assert called is not None
            homes.setdefault(speaker_of(called), set()).add(node)
    return homes


def speaker_of(observer: nn.Module) -> nn.Module:
    """The observer whose range an observer's value has."""
    return observer.observer if isinstance(observer, SharedObserver) else observer


def _observers(
    inside: list[fx.Node], graph: fx.GraphModule, homes: dict[nn.Module, set[fx.Node]]
) -> tuple[Observer, ...]:
    found: dict[Observer, None] = {}
    here = set(inside)
    for node in inside:
        called = called_module(node, graph)
        if called is not None and is_observer(called):
            speaker = speaker_of(called)
            if isinstance(speaker, Observer) and speaker.calibrated() and homes[speaker] <= here:
                found[speaker] = None
    return tuple(found)


class LearnedScale(nn.Module):
    """Rounds an activation to codes whose scale is learned.

    Source: Esser et al., "Learned Step Size Quantization" (2020), section 2.1; the values that are
    left in float at random: Wei et al., "QDrop" (2022), section 3.3.

    Args:
        observer: what it begins with.
        drop: the chance of a value to be left in float, in training mode.
    """

    def __init__(self, observer: Observer, drop: float) -> None:
        super().__init__()
        scale, zero_point = observer.calculate_qparams()
        # As a logarithm: it stays positive, and a step is a share of it.
        self.logarithm = nn.Parameter(scale.log())
        self.zero_point = zero_point
        self.limits = observer.spec.quant_min, observer.spec.quant_max
        self.drop = drop
        self.generator = torch.Generator()

    def qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point."""
        return self.logarithm.detach().exp(), self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        scale = self.logarithm.exp()
        codes = (x / scale + self.zero_point).clamp(*self.limits)
        rounded = ((codes.round() - codes).detach() + codes - self.zero_point) * scale
        if not self.training or self.drop == 0:
            return rounded
        chosen = torch.rand(x.shape, generator=self.generator).to(x.device) < self.drop
        return torch.where(chosen, x, rounded)
