"""The quantized network beside the float one, layer by layer, all data at once: each layer is
computed once, however many layers an algorithm looks at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qtoolkit.algorithms.context import Context, Layer
from qtoolkit.algorithms.simulation import silent_observers
from qtoolkit.graph.modules import bound_arguments, graph_modules


class Runner:
    """Runs a captured graph node by node on several calls at once.

    Args:
        graph: the graph; its modules are as they are when their node is computed.
        calls: the arguments of each call.
    """

    def __init__(self, graph: fx.GraphModule, calls: Sequence[tuple[Any, ...]]) -> None:
        self._nodes = list(graph.graph.nodes)
        self._next = 0
        self._last_uses: dict[fx.Node, list[fx.Node]] = {}
        seen: set[fx.Node] = set()
        for node in reversed(self._nodes):
            new = [used for used in node.all_input_nodes if used not in seen]
            self._last_uses[node] = new
            seen.update(new)
        self._interpreters = []
        placeholders = [node for node in self._nodes if node.op == "placeholder"]
        for arguments in calls:
            interpreter = fx.Interpreter(graph, garbage_collect_values=False)
            interpreter.env = dict(zip(placeholders, arguments))
            self._interpreters.append(interpreter)

    def run_to(self, name: str) -> None:
        """Computes all nodes before the one of a name; does nothing if it is computed already."""
        while self._next < len(self._nodes) and self._nodes[self._next].name != name:
            node = self._nodes[self._next]
            self._next += 1
            if node.op in ("placeholder", "output"):
                continue
            with torch.no_grad():
                for interpreter in self._interpreters:
                    interpreter.env[node] = interpreter.run_node(node)
                    for used in (*self._last_uses[node], *([] if node.users else [node])):
                        interpreter.env.pop(used, None)

    def values(self, name: str) -> list[Any]:
        """What a node gave in each call; kept until the last node that uses it is computed."""
        node = next(node for node in self._nodes if node.name == name)
        return [interpreter.env[node] for interpreter in self._interpreters]


@dataclass(frozen=True)
class Visit:
    """A layer with what it reads.

    Attributes:
        layer: the layer.
        inputs: of the network as it is quantized so far, for each call.
        float_inputs: of the float network.
        float_module: the layer in the float network.
    """

    layer: Layer
    inputs: list[Tensor]
    float_inputs: list[Tensor]
    float_module: Any

    def state(self) -> dict[str, Any]:
        """The layer's."""
        return self.layer.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """The layer's."""
        self.layer.load_state(state)

    def outputs(self) -> list[Tensor]:
        """What it gives now, before a fused ReLU or addition."""
        with torch.no_grad():
            return [self.layer.module(x) for x in self.inputs]

    def float_outputs(self) -> list[Tensor]:
        """What it gives in the float network."""
        with torch.no_grad():
            return [self.float_module(x) for x in self.float_inputs]


def graph_runners(context: Context) -> Iterator[tuple[fx.GraphModule, Runner, Runner]]:
    """Each captured graph that the data reaches, with a runner of the network as it is quantized
    so far and one of the float network. Must be used inside ``context.simulated()``."""
    for name, graph in graph_modules(context.prepared):
        if not any(layer.graph is graph for layer in context.layers):
            continue
        reference = context.reference.get_submodule(name)
        assert isinstance(reference, fx.GraphModule)
        with silent_observers(reference):
            calls = context.calls_of(name)
            float_calls = context.calls_of(name, reference=True)
            if not calls:
                continue
            yield (
                graph,
                Runner(graph, [bound_arguments(graph, *call) for call in calls]),
                Runner(reference, [bound_arguments(reference, *call) for call in float_calls]),
            )


def walk(context: Context, layers: Sequence[Layer]) -> Iterator[Visit]:
    """The layers that the data reaches, in the order of the network.

    What the caller makes of a layer is what those after it see. Must be used inside
    ``context.simulated()``.
    """
    for graph, runner, float_runner in graph_runners(context):
        anchors = {layer.match.anchor: layer for layer in layers if layer.graph is graph}
        for node in graph.graph.nodes:
            if node not in anchors:
                continue
            runner.run_to(node.name)
            float_runner.run_to(node.name)
            value = node.args[0].name
            layer = anchors[node]
            yield Visit(
                layer,
                runner.values(value),
                float_runner.values(value),
                context.float_module(layer),
            )
