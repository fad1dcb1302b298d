"""Values that share one range: the inputs of a concatenation and its output.

Where nothing else reads an input of a concatenation, it is quantized with the output's scale at
once: it is rounded once instead of twice, and the concatenation only copies.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx, nn

from qtoolkit.graph.patterns import Match
from qtoolkit.graph.same_values import asks_fact, keeps_values
from qtoolkit.observers import Observer
from qtoolkit.qconfig import TensorSpec


class SharedObserver(nn.Module):
    """Stands on a value that another value's observer speaks for.

    Args:
        observer: that observer.
        records: whether it is shown this value too.
    """

    def __init__(self, observer: Observer, *, records: bool) -> None:
        super().__init__()
        self.records = records
        # In a tuple, so that the observer is not registered a second time.
        self._observer = (observer,)

    @property
    def observer(self) -> Observer:
        """The other observer."""
        return self._observer[0]

    @property
    def spec(self) -> TensorSpec:
        """The other observer's."""
        return self._observer[0].spec

    @property
    def name(self) -> str:
        """The other observer's."""
        return self._observer[0].name

    def forward(self, x: Tensor) -> Tensor:
        return self._observer[0](x) if self.records else x

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The other observer's; raises what it raises."""
        return self._observer[0].calculate_qparams()


def readers(node: fx.Node, module: fx.GraphModule) -> Iterable[fx.Node]:
    """The nodes that compute with a value, also after it was moved."""
    for user in node.users:
        if keeps_values(user, module) and user.args[0] is node:
            yield from readers(user, module)
        elif not asks_fact(user):
            yield user


def shared_ranges(
    matches: list[Match],
    specs: dict[fx.Node, TensorSpec],
    origins: dict[fx.Node, fx.Node],
    module: fx.GraphModule,
) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
    """Groups the values that can share one range.

    Args:
        matches: the layers.
        specs: how each value is quantized.
        origins: for every input of a layer, the value that it is.

    Returns:
        For each value the representative of its group (itself if it is alone), and the values whose
        elements are all in other members of their group.
    """
    parent = {node: node for node in specs}

    def find(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    joining = [m for m in matches if m.pattern.shares_range and m.output in specs]
    anchors = {match.anchor for match in joining}
    covered = set()
    for match in joining:
        inputs = [origins[node] for node in match.inputs]
        shared = [
            value
            for value in inputs
            if specs[value] == specs[match.output]
            and all(reader in anchors for reader in readers(value, module))
        ]
        for value in shared:
            parent[find(value)] = find(match.output)
        if len(shared) == len(inputs):
            covered.add(match.output)
    return {node: find(node) for node in specs}, covered
