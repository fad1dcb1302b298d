"""Finds the parts of a converted graph that plans can compute, and puts plans in their place.

Nodes that have a step in the engine are gathered so that as few plans as possible come out: a node
joins the plan of its inputs unless a node that no plan can compute lies between them.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit import _C
from qtoolkit.graph.modules import called_module, free_name
from qtoolkit.nn.base import PlanStep, QuantizedModule
from qtoolkit.nn.plan import Plan, PlanLayer, PlanReport, StepReport

#: Version of the plans that this package writes, as in ``csrc/engine/program.h``.
_VERSION = 1
_TYPES = {torch.float32: 0, torch.uint8: 1, torch.int8: 2}
# Dimensions of what a step reads, where it does not take 2, 3 and 4.
_RANKS = {
    "linear": (2, 3),
    "layer_norm": (2, 3),
    "batch_norm": (2, 4),
    "flatten": (2, 4),
    "conv2d": (4,),
    "conv_transpose2d": (4,),
    "max_pool2d": (4,),
    "avg_pool2d": (4,),
    "adaptive_avg_pool2d": (4,),
    "pad": (4,),
    "upsample_nearest2d": (4,),
    "upsample_bilinear2d": (4,),
    "channel_shuffle": (4,),
    "pixel_shuffle": (4,),
    "pixel_unshuffle": (4,),
}
# Steps that work along the channels, the attribute ``dim`` of their module.
_ALONG_CHANNELS = ("cat", "softmax")


@dataclass(frozen=True)
class _Seen:
    """What a node gave for the example inputs."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class _Recorder(fx.Interpreter):
    """Runs a graph and notes the tensors."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[fx.Node, _Seen] = {}
        #: Of nodes that give several tensors.
        self.parts: dict[fx.Node, list[_Seen]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.seen[node] = _Seen(result.dtype, tuple(result.shape))
        if isinstance(result, tuple | list) and all(isinstance(r, Tensor) for r in result):
            self.parts[node] = [_Seen(r.dtype, tuple(r.shape)) for r in result]
        return result


def _numbers(node: fx.Node) -> list[Any]:
    """What a module is called with beside values of the graph, lists flattened."""
    numbers: list[Any] = list(node.kwargs.values())

    def look(argument: Any) -> None:
        if isinstance(argument, list | tuple):
            for item in argument:
                look(item)
        elif not isinstance(argument, fx.Node):
            numbers.append(argument)

    look(node.args)
    return numbers


_CUTS = {torch.chunk, torch.split, "chunk", "split"}


def _is_part(node: fx.Node) -> bool:
    """True for one of the tensors that ``chunk`` or ``split`` gave."""
    return (
        node.op == "call_function"
        and node.target is operator.getitem
        and isinstance(node.args[0], fx.Node)
        and node.args[0].op in ("call_function", "call_method")
        and node.args[0].target in _CUTS
        and len(node.args[0].all_input_nodes) == 1
        and isinstance(node.args[1], int)
    )


def _channels(rank: int) -> int:
    """The dimension that a plan takes for the channels."""
    return 1 if rank == 4 else rank - 1


def _flattens(node: fx.Node) -> bool:
    """True for ``flatten(x, 1)`` as a function, method or module's call."""
    if node.op == "call_function" and node.target is torch.flatten:
        pass
    elif not (node.op == "call_method" and node.target == "flatten"):
        return False
    arguments = (*node.args[1:], *node.kwargs.values())
    return arguments in ((1,), (1, -1)) and len(node.all_input_nodes) == 1


@dataclass
class _Part:
    """One plan in the making."""

    inputs: list[fx.Node] = field(default_factory=list)
    nodes: list[tuple[fx.Node, PlanStep]] = field(default_factory=list)


class _Compiler:
    def __init__(self, module: fx.GraphModule, recorder: _Recorder) -> None:
        self.module = module
        self.seen = recorder.seen
        self.parts = recorder.parts
        self.plans: list[Plan] = []
        # Nodes that depend on no input: their batch stays whatever the inputs' is.
        self.fixed: set[fx.Node] = set()
        for node in module.graph.nodes:
            if node.op != "placeholder" and self.fixed.issuperset(node.all_input_nodes):
                self.fixed.add(node)

    def _step_of(self, node: fx.Node) -> PlanStep | None:
        """The node as a step; None if the engine has none for it."""
        inputs = self._arguments(node)
        if node not in self.seen or any(i not in self.seen for i in inputs) or not inputs:
            return None
        seen = [self.seen[i] for i in inputs]
        if any(
            not 2 <= len(s.shape) <= 4 or s.dtype not in _TYPES for s in (*seen, self.seen[node])
        ):
            return None
        if any(s.shape[0] != self.seen[node].shape[0] for s in seen):
            return None  # a broadcast batch
        if len({i in self.fixed for i in inputs}) > 1:
            return None  # of another batch it would be broadcast
        called = called_module(node, self.module)
        if isinstance(called, QuantizedModule):
            step = called.plan_step_of_call([s.dtype for s in seen], _numbers(node))
            rank = len(seen[0].shape)
            if step is None or rank not in _RANKS.get(step.kind, (2, 3, 4)):
                return None
            if step.kind in _ALONG_CHANNELS and called.dim % rank != _channels(rank):
                return None
            # Other broadcasting is left to the operators.
            if len(seen) == 2 and step.kind in ("add", "conv2d", "mul"):
                shape = self.seen[node].shape
                same = {s.shape == shape for s in (seen[1:] if step.kind == "conv2d" else seen)}
                gated = {shape, (*shape[:2], 1, 1)} == {s.shape for s in seen}
                if same != {True} and not (step.kind == "mul" and gated and len(shape) == 4):
                    return None
            return step
        if _is_part(node):
            return self._slice_of(node)
        is_codes = seen[0].dtype != torch.float32
        if (_flattens(node) or isinstance(called, nn.Flatten)) and is_codes:
            flatten = called if isinstance(called, nn.Flatten) else None
            if flatten is not None and (flatten.start_dim, flatten.end_dim) != (1, -1):
                return None
            if len(seen[0].shape) not in _RANKS["flatten"]:
                return None
            return PlanStep("flatten")
        return None

    def _arguments(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node reads; a part of a tensor that was cut reads that tensor."""
        if _is_part(node):
            return _arguments(node.args[0])  # type: ignore[arg-type]
        return _arguments(node)

    def _slice_of(self, node: fx.Node) -> PlanStep | None:
        """A part of the channels as a step."""
        cut, index = node.args
        assert isinstance(cut, fx.Node)
        assert isinstance(index, int)
        parts = self.parts.get(cut)
        source = self.seen[self._arguments(node)[0]]
        if parts is None or source.dtype == torch.float32 or not -len(parts) <= index < len(parts):
            return None
        index %= len(parts)
        channels = _channels(len(source.shape))
        others = [p.shape[:channels] + p.shape[channels + 1 :] for p in parts]
        whole = source.shape[:channels] + source.shape[channels + 1 :]
        if any(other != whole for other in others):
            return None  # cut along another dimension
        first = sum(p.shape[channels] for p in parts[:index])
        return PlanStep("slice", first=first, count=parts[index].shape[channels])

    def run(self) -> None:
        """Replaces nodes by plans."""
        steps = {node: self._step_of(node) for node in self.module.graph.nodes}
        stage: dict[fx.Node, int] = {}
        parts: dict[tuple[int, bool, int], _Part] = {}  # a plan has one batch
        for node in self.module.graph.nodes:
            step = steps[node]
            # Plans have odd stages, all else even ones; an edge between the two goes up.
            parity = 0 if step is None else 1
            sources = node.all_input_nodes if step is None else self._arguments(node)
            before = [stage[source] for source in sources]
            stage[node] = max((s + (s % 2 != parity) for s in before), default=parity)
            if step is not None:
                key = stage[node], node in self.fixed, self.seen[node].shape[0]
                parts.setdefault(key, _Part()).nodes.append((node, step))
        for part in parts.values():
            if any(step.kind not in ("quantize", "dequantize") for _, step in part.nodes):
                self._replace(part)
        self.module.graph.eliminate_dead_code()
        self.module.delete_all_unused_submodules()
        self.module.graph.lint()
        self.module.recompile()

    def _fold_contiguous(self, part: _Part) -> None:
        """Lets a dequantization write what a following ``contiguous()`` would copy."""
        inside = {node for node, _ in part.nodes}
        for node, step in part.nodes:
            users = list(node.users)
            if len(users) != 1 or users[0].op != "call_method" or users[0].target != "contiguous":
                continue
            rank = len(self.seen[node].shape)
            if users[0] in inside or (rank == 4 and step.kind != "dequantize"):
                continue
            if self.seen[node].dtype != torch.float32:
                continue
            if rank == 4:
                step.integers["contiguous"] = [1]
            users[0].replace_all_uses_with(node)
            self.module.graph.erase_node(users[0])

    def _replace(self, part: _Part) -> None:
        self._fold_contiguous(part)
        inside = dict(part.nodes)
        state = _State()
        sources = {source for node in inside for source in self._arguments(node)}
        # In the order of the graph: a plan that is the whole network takes what its forward takes.
        part.inputs = [n for n in self.module.graph.nodes if n in sources and n not in inside]
        values = {source: i for i, source in enumerate(part.inputs)}
        state.inputs = [self._input_of(source, inside) for source in part.inputs]
        count = len(part.inputs)
        layers: list[PlanLayer] = []

        def add(node: fx.Node, step: PlanStep, inputs: list[int]) -> int:
            called = called_module(node, self.module)
            source = getattr(called, "source", "") or node.name
            state.add(step, source, inputs)
            layers.append(
                PlanLayer(
                    source,
                    called.kind() if isinstance(called, QuantizedModule) else step.kind,
                    called.formats() if isinstance(called, QuantizedModule) else "8-bit",
                    getattr(called, "kernel", "") or "copy",
                )
            )
            return count + len(state.kinds) - 1

        # Codes of a tensor become codes of the plan.
        for source in part.inputs:
            dtype = self.seen[source].dtype
            if dtype != torch.float32:
                copy = PlanStep("copy", signed=dtype == torch.int8)
                values[source] = add(source, copy, [values[source]])
        for node, step in part.nodes:
            values[node] = add(node, step, [values[i] for i in self._arguments(node)])
        outputs = [node for node in inside if any(user not in inside for user in node.users)]
        for node in outputs:
            dtype = self.seen[node].dtype
            value = values[node]
            if dtype != torch.float32:
                value = add(node, PlanStep("copy", signed=dtype == torch.int8), [value])
            state.outputs.append(value)

        plan = Plan(state.as_tuple(), layers)
        name = free_name(self.module, f"plan_{len(self.plans)}")
        self.module.add_submodule(name, plan)
        self.plans.append(plan)
        with self.module.graph.inserting_after(outputs[-1]):
            call = self.module.graph.call_module(name, (list(part.inputs),))
        with self.module.graph.inserting_after(call):
            for i, node in enumerate(outputs):
                taken = self.module.graph.call_function(operator.getitem, (call, i))
                self.seen[taken] = self.seen[node]
                for user in list(node.users):
                    if user not in inside:
                        user.replace_input_with(node, taken)
        for node in reversed(inside):
            self.module.graph.erase_node(node)
        _sort(self.module.graph)

    def _zero_point_of(self, value: fx.Node, inside: dict[fx.Node, PlanStep]) -> int | None:
        """The zero point of codes, as the steps that read them have it."""
        for user, step in inside.items():
            if value not in self._arguments(user):
                continue
            if step.input_names:
                name = step.input_names[self._arguments(user).index(value)]
                return step.integers[f"{name}_zero_point"][0]
            found = self._zero_point_of(user, inside)  # a step that only moves codes
            if found is not None:
                return found
        return None

    def _input_of(self, source: fx.Node, inside: dict[fx.Node, PlanStep]) -> list[int]:
        """Rank, type and zero point of an input of the plan."""
        seen = self.seen[source]
        zero_point = None
        if seen.dtype != torch.float32:
            zero_point = self._zero_point_of(source, inside)
        return [len(seen.shape), _TYPES[seen.dtype], zero_point or 0]


@dataclass
class _State:
    """The parts of a plan as ``csrc/engine/torch`` takes them."""

    inputs: list[list[int]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    step_inputs: list[list[int]] = field(default_factory=list)
    integers: list[dict[str, list[int]]] = field(default_factory=list)
    constants: list[dict[str, Tensor]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def add(self, step: PlanStep, name: str, inputs: list[int]) -> None:
        self.kinds.append(step.kind)
        self.names.append(name)
        self.step_inputs.append(inputs)
        self.integers.append(step.integers)
        self.constants.append(step.constants)

    def as_tuple(self) -> tuple[Any, ...]:
        return (
            (_VERSION, "", self.inputs),
            ((self.kinds, self.names, self.step_inputs), self.integers, self.constants),
            (self.outputs, [], []),
        )


def _arguments(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, in order; one that is used twice comes twice."""
    result: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), result.append)
    return result


def _sort(graph: fx.Graph) -> None:
    """Puts every node behind those that it reads, else in the order that they have."""
    order: list[fx.Node] = []
    placed: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        stack = [node]
        while stack:
            missing = [n for n in stack[-1].all_input_nodes if n not in placed]
            if missing:
                stack.append(missing[0])
                continue
            top = stack.pop()
            if top not in placed:
                placed.add(top)
                order.append(top)

    nodes = list(graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            place(node)
    for node in nodes:
        place(node)
    for before, node in itertools.pairwise(order):
        before.append(node)


def compile_graph(module: fx.GraphModule, inputs: tuple[Any, ...]) -> list[Plan]:
    """Puts plans into a converted graph, in place.

    Args:
        module: its quantized modules are not changed.
        inputs: what its forward takes, as examples of ranks and dtypes.
    """
    recorder = _Recorder(module)
    with torch.no_grad():
        recorder.run(*inputs)
    compiler = _Compiler(module, recorder)
    compiler.run()
    return compiler.plans


def report_of(plan: Plan, inputs: list[Tensor], profile: bool) -> PlanReport:
    """The steps of a plan, for inputs like these."""
    (names, kinds, kernels), (shapes, counts, times), (arena, packed) = plan.plan.report(
        inputs, profile
    )
    known = set(_C.kernel_names())
    steps = tuple(
        StepReport(
            name,
            kind,
            f"{kernel} ({_C.selected_path(kernel)})" if kernel in known else kernel,
            tuple(shape),
            count[0],
            count[1],
            time if time >= 0 else None,
        )
        for name, kind, kernel, shape, count, time in zip(
            names, kinds, kernels, shapes, counts, times
        )
    )
    return PlanReport(steps, arena, packed)
