"""What of a program becomes operators of a TFLite graph, and which compute on codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.program import DEQUANTIZE, QUANTIZE, QdqProgram, free_name
from qtoolkit.export.tflite_flatbuffer import Quantization
from qtoolkit.export.tflite_values import FixedBatchError, FreeSize, Out, Value

#: Gives the value of a node, as an operator with a given output.
Handler = Callable[[Any, fx.Node, Out], Value]
#: Operators that give a float for floats.
FLOATS: dict[str, Handler] = {}
#: Operators that give codes for codes, with scales of their own.
INTEGERS: dict[str, Handler] = {}
#: Operators that only move values, so codes keep their scale.
MOVERS: dict[str, Handler] = {}
#: What else must hold for an operator on codes.
CONDITIONS: dict[str, Callable[[Any, fx.Node], bool]] = {}
#: Functions of one value that PyTorch does not mark as such.
_POINTWISE = frozenset({"aten.hardswish.default", "aten.log_sigmoid.default"})
#: Lower and upper bound of operators that clip.
_CLIPS: dict[str, Callable[..., tuple[float | None, float | None]]] = {
    "aten.relu.default": lambda x: (0.0, None),
    "aten.relu6.default": lambda x: (0.0, 6.0),
    "aten.hardtanh.default": lambda x, low=-1.0, high=1.0: (low, high),
    "aten.clamp.default": lambda x, low=None, high=None: (low, high),
    "aten.clamp_min.default": lambda x, low: (low, None),
    "aten.clamp_max.default": lambda x, high: (None, high),
}


def lowers(*names: str, into: Iterable[dict[str, Handler]]) -> Callable[[Handler], Handler]:
    """Decorator of a handler of operators."""

    def register(handler: Handler) -> Handler:
        for table in into:
            table.update(dict.fromkeys(names, handler))
        return handler

    return register


def clip_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds of an operator that clips; None of another one."""
    function = _CLIPS.get(str(node.target))
    return None if function is None else function(*node.args, **node.kwargs)


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of an operator's result comes from one element of each input."""
    target = node.target
    tagged = isinstance(target, torch._ops.OpOverload) and torch.Tag.pointwise in target.tags
    return tagged or str(target) in _POINTWISE


@dataclass(frozen=True)
class Plan:
    """How codes are made: by an operator on codes ("operator"), from codes ("requantize"), by a
    table of a function of one value ("table"), or from a float."""

    kind: str
    source: fx.Node
    out: Out


class Analysis:
    """A program before anything of it is written.

    Attributes:
        program: the program.
        fixed: whether the batch is that of the example inputs.
        integer: whether to keep to integers wherever that is possible.
        constants: nodes that are known.
        codes: nodes whose values are codes in the file, though they are float in the program.
        plans: of needed quantize nodes.
        needed: the nodes that are written; what is computed within others is none of them.
        unsigned: names of codes that are uint8 in PyTorch.
    """

    def __init__(self, program: QdqProgram, *, fixed: bool, integer: bool) -> None:
        self.program, self.fixed, self.integer = program, fixed, integer
        self.batch = next((int(x.shape[0]) for x in program.example_inputs if x.dim()), 1)
        self.constants: dict[fx.Node, Tensor] = {}
        self.codes: set[fx.Node] = set()
        self.plans: dict[fx.Node, Plan] = {}
        self.unsigned: set[str] = set()
        nodes = list(program.graph.nodes)
        for node in nodes:
            self._classify(node)
        self.needed = self._needed(nodes)

    def _classify(self, node: fx.Node) -> None:
        """Finds constants, and values that are codes in the file."""
        if node.op == "placeholder":
            value = self.program.constant(node)
            if value is not None:
                self.constants[node] = value
            return
        if node.op != "call_function":
            return
        sources = node.all_input_nodes
        if node.target is DEQUANTIZE:
            if node.args[0] not in self.constants or sources[0].target is QUANTIZE:
                self.codes.add(node)
            return
        if self._is_size(node):
            return
        if all(source in self.constants or self._is_size(source) for source in sources):
            if not self._has_free_size(node):
                known = [self.constants.get(s, self.number(s)) for s in sources]
                values = dict(zip(sources, known))
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
                self.constants[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        elif str(node.target) in MOVERS and sources and sources[0] in self.codes:
            self.codes.add(node)

    def _needed(self, nodes: list[fx.Node]) -> set[fx.Node]:
        """The nodes whose values are written; what is computed within others is none."""
        needed = set(self.program.outputs)
        for node in reversed(nodes):
            if node not in needed or node.op != "call_function" or node in self.constants:
                continue
            if self._is_size(node):
                needed.remove(node)  # a size, see ``number``
                continue
            if node.target is QUANTIZE:
                plan = self.plans[node] = self._plan(node)
                needed |= (
                    set(plan.source.all_input_nodes) if plan.kind == "operator" else {plan.source}
                )
            else:
                needed |= set(node.all_input_nodes)
        return needed

    def quantized(self, node: fx.Node) -> Out:
        """What a quantize node writes."""
        _, scale, zero_point, low, high, name = (cast(Any, argument) for argument in node.args)
        shift = 0 if low < 0 else 128
        if shift:
            self.unsigned.add(name)
        scales = (float(self.constants[scale]),)
        quantization = Quantization(scales, int(self.constants[zero_point]) - shift)
        return Out(quantization, name, low - shift, high - shift)

    def _plan(self, node: fx.Node) -> Plan:
        full, x = self.quantized(node), node.args[0]
        out, source = full, x
        while isinstance(source, fx.Node) and source not in self.codes:
            bounds = clip_bounds(source)
            if bounds is None:
                break
            out, source = out.clipped(*bounds), source.args[0]
        assert isinstance(source, fx.Node)
        assert isinstance(x, fx.Node)
        if source in self.codes:
            return Plan("requantize", source, out)
        target = str(source.target)
        codes = [s for s in source.all_input_nodes if s not in self.constants]
        if (
            target in INTEGERS
            and codes
            and all(s in self.codes or self.is_weight(s) for s in codes)
        ):
            condition = CONDITIONS.get(target)
            if condition is None or condition(self, source):
                return Plan("operator", source, out)
        root, known = self._only_source(x)
        # A table is slower than XNNPACK's float kernels.
        if root is None or (known and not self.integer):
            return Plan("float", x, full)
        return Plan("table", root, full)

    def _only_source(self, node: fx.Node) -> tuple[fx.Node | None, bool]:
        """The codes of which a node is a function of one value, if it is; and whether TFLite has
        all operators of that function."""
        found: set[fx.Node] = set()
        known = True
        waiting = [node]
        while waiting:
            current = waiting.pop()
            if current in self.codes:
                found.add(current)
            elif current in self.constants:
                if self.constants[current].numel() != 1:
                    return None, False
            elif not is_pointwise(current):
                return None, False
            else:
                known = known and str(current.target) in FLOATS
                waiting += current.all_input_nodes
        return (found.pop() if len(found) == 1 else None), known

    def is_weight(self, node: Any) -> bool:
        """Whether an argument is a layer's weight or bias in codes."""
        return (
            isinstance(node, fx.Node)
            and node.target is DEQUANTIZE
            and node.args[0] in self.constants
            and node not in self.codes
        )

    def _is_size(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), int | torch.SymInt)

    def _has_free_size(self, node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, Tensor) and any(
            isinstance(size, FreeSize) for size in self.sizes(value.shape)
        )

    def number(self, value: Any) -> Any:
        """A size or another number, which may be computed from the batch."""
        if isinstance(value, fx.Node):
            value = value.meta["val"]
        if not isinstance(value, torch.SymInt):
            return value
        expression = value.node.expr
        size = int(expression.subs(dict.fromkeys(expression.free_symbols, self.batch)))
        return size if self.fixed or not expression.free_symbols else FreeSize(size)

    def sizes(self, shape: Iterable[Any]) -> tuple[int, ...]:
        """A shape, see ``FreeSize``."""
        return tuple(self.number(size) for size in shape)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape of a node's value in PyTorch."""
        return self.sizes(node.meta["val"].shape)

    def need_fixed(self, node: fx.Node, shape: Sequence[int]) -> None:
        """For operators that name the sizes of their result."""
        if any(isinstance(size, FreeSize) for size in shape):
            raise FixedBatchError(f"{node.target} in {self.place(node)} is written for one batch")

    def place(self, node: fx.Node) -> str:
        """The module of a node, for messages."""
        return self.program.module_of(node) or "the model's own forward"

    def unsupported(self, node: fx.Node, why: str) -> UnsupportedError:
        """To be raised for a node."""
        return UnsupportedError(f"{node.target} in {self.place(node)}: {why}; nothing was written")


def quantize_outputs(program: QdqProgram, expected: Sequence[Tensor]) -> None:
    """Makes codes of a program's float outputs, in place.

    Args:
        program: the program.
        expected: the model's outputs, whose ranges are taken.
    """
    graph, taken = program.graph, set(program.names())
    results = next(node for node in graph.nodes if node.op == "output")
    for index, (node, value) in enumerate(zip(program.outputs, expected)):
        if node.target is DEQUANTIZE or not value.is_floating_point() or not value.numel():
            continue
        low, high = min(float(value.min()), 0.0), max(float(value.max()), 0.0)
        scale = torch.tensor((high - low) / 255 or 1.0)
        zero_point = torch.round(-128 - low / scale).clamp(-128, 127).to(torch.int32)
        parameters = []
        for key, constant in (("scale", scale), ("zero_point", zero_point)):
            with graph.inserting_before(next(iter(graph.nodes))):
                parameter = graph.placeholder(f"output_{index}_{key}")
            parameter.meta["val"] = constant
            program.constants[parameter.name] = constant
            parameters.append(parameter)
        name = free_name(program.module_of(node) or "result", taken)
        with graph.inserting_after(node):
            codes = graph.call_function(QUANTIZE, (node, *parameters, -128, 127, name))
        with graph.inserting_after(codes):
            real = graph.call_function(DEQUANTIZE, (codes, *parameters, None))
        for new in (codes, real):
            new.meta.update(node.meta)
        results.replace_input_with(node, real)
        program.outputs[index] = real
