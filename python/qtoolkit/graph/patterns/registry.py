"""What a graph pattern is, and the list of them.

A pattern recognises one kind of layer with what is fused into it, and says how the layer becomes a
quantized one. Every pattern is one file in this folder that registers itself here; earlier files
have precedence (see ``__init__``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from qtoolkit.graph.modules import called_module
from qtoolkit.nn.base import QParams
from qtoolkit.qconfig import QConfig


@dataclass(frozen=True)
class Match:
    """A layer found in a graph.

    Attributes:
        pattern: the pattern that found it.
        nodes: the fused nodes in order, the anchor first; the last one holds the layer's output.
        inputs: the activations it reads, the residual input last.
        relu: True if a ReLU is fused.
        upper: the upper bound of a fused ReLU6 or clipped ReLU, None without.
        batch_norm: the fused batch norm module (QAT only).
        branch: the node whose value a fused addition adds to the last input, None without one.
        needs_codes: True if it is worth computing on codes only where its inputs are codes anyway.
    """

    pattern: Pattern
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    relu: bool = False
    upper: float | None = None
    batch_norm: nn.Module | None = None
    branch: fx.Node | None = None
    needs_codes: bool = False

    @property
    def anchor(self) -> fx.Node:
        """The node that gives the layer its name."""
        return self.nodes[0]

    @property
    def output(self) -> fx.Node:
        """The node that holds the layer's output."""
        return self.nodes[-1]

    @property
    def residual(self) -> bool:
        """True if the addition of the last input is fused."""
        return self.branch is not None


class Pattern:
    """One kind of layer. Subclasses are stateless; one instance of each is registered."""

    #: The module types that anchor a match; also the names that ``set_module_type`` knows.
    types: tuple[type[nn.Module], ...] = ()
    #: True if the quantized layer can give float32 (a layer whose output is used only in float).
    float_output: bool = False
    #: True if it has a weight, for which ``QConfig.weight`` must say how.
    has_weight: bool = False
    #: Dimensions of its output that the kernel needs, None if any do.
    dimensions: int | None = None
    #: True if its inputs and output can be quantized with one scale, which makes it exact.
    shares_range: bool = False

    def as_module(self, node: fx.Node, module: fx.GraphModule) -> AsModule | None:
        """The module that stands for a function or method call of this kind, or None."""
        return None

    def unsupported(self, module: nn.Module) -> str | None:
        """Why the module cannot be quantized, or None if it can."""
        return None

    def match(self, node: fx.Node, module: fx.GraphModule, taken: set[fx.Node]) -> Match | None:
        """The match that this node, a call of one of ``types``, anchors.

        ``taken`` holds the nodes that are fused into other layers already.
        """
        raise NotImplementedError

    def prepare_qat(self, match: Match, module: fx.GraphModule, qconfig: QConfig) -> None:
        """Replaces the anchor's module by one that trains with a fake-quantized weight."""

    def input_range(
        self, match: Match, module: fx.GraphModule, low: float, high: float, output: QParams
    ) -> tuple[float, float]:
        """The part of [low, high], the range of its input, outside which its result hardly
        changes."""
        return low, high

    def output_qparams(
        self, match: Match, module: fx.GraphModule, inputs: list[QParams], observed: QParams
    ) -> QParams:
        """How its output is quantized; not asked after training."""
        return observed

    def lower(
        self,
        match: Match,
        module: fx.GraphModule,
        qconfig: QConfig,
        inputs: list[QParams],
        output: QParams | None,
    ) -> nn.Module:
        """The quantized layer. It is called with the match's inputs, see ``arguments``."""
        raise NotImplementedError

    def arguments(self, match: Match, inputs: list[fx.Node]) -> tuple[Any, ...]:
        """The arguments of the quantized layer's call, from its inputs' nodes."""
        return tuple(inputs)


@dataclass(frozen=True)
class AsModule:
    """A function call as the call of a module."""

    module: nn.Module
    args: tuple[Any, ...]


_PATTERNS: list[Pattern] = []


def register_pattern(cls: type[Pattern]) -> type[Pattern]:
    """Class decorator that adds a pattern to the list."""
    _PATTERNS.append(cls())
    return cls


def patterns() -> tuple[Pattern, ...]:
    """All patterns in order of precedence."""
    return tuple(_PATTERNS)


def pattern_of(node: fx.Node, module: fx.GraphModule) -> Pattern | None:
    """The pattern that a node's module anchors."""
    called = called_module(node, module)
    if called is None:
        return None
    for pattern in _PATTERNS:
        if isinstance(called, pattern.types):
            return pattern
    return None
