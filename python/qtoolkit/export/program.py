"""The graph that files for other runtimes are written from."""

from __future__ import annotations

import copy
import warnings as python_warnings
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from qtoolkit.graph.qdq import to_qdq

QUANTIZE = torch.ops.qtoolkit_export.quantize.default
DEQUANTIZE = torch.ops.qtoolkit_export.dequantize.default

KEEP = object()
#: Values that lie so near the middle between two codes, in steps, may have either code: runtimes
#: add in another order.
TIE = 1e-3


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors of a model's inputs or outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []


def map_tensors(value: Any, function: Callable[[Tensor], Any], other: Any = KEEP) -> Any:
    """The value with each tensor replaced by what a function makes of it, in the order of
    ``tensors_of``; what is neither a tensor nor holds any becomes ``other`` where that is given."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(item, function, other) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, function, other) for key, item in value.items()}
    return value if other is KEEP else other


def _keys_of_nodes(value: Any, key: str | None = None) -> Iterator[str | None]:
    """For each node in a value the key of the dictionary that holds it, in the order of
    ``tensors_of``; None where none does."""
    if isinstance(value, fx.Node):
        yield key
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _keys_of_nodes(item, str(name))
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _keys_of_nodes(item, key)


def free_name(name: str, taken: set[str]) -> str:
    """The name, with a number behind it if it is taken; it is taken then."""
    free, number = name, 1
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    taken.add(free)
    return free


def _why_fixed(error: Exception) -> str:
    """What torch.export says against a dynamic batch, in one sentence."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    found = next((line[2:] for line in lines if line.startswith("- ")), lines[0] if lines else "")
    if "specialized it to be a constant" in found:  # perhaps that of the trace
        return "the model's own code fixes it"
    return found.split(". ")[0]


def trace(
    model: nn.Module, example_inputs: tuple[Any, ...], *, dynamic_batch: bool
) -> tuple[ExportedProgram, str | None]:
    """The program of a model, by ``torch.export``.

    With a dynamic batch the first dimension of all inputs that have that of the first one is free.
    Where the model cannot have one it is fixed.

    Returns:
        The program, and why its batch is fixed though a dynamic one was asked for, else None.
    """
    first = next((t for t in tensors_of(example_inputs) if t.dim() > 0), None)
    reason = None
    with torch.no_grad(), python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        if dynamic_batch and first is not None:
            batch = first.shape[0]
            dim = torch.export.Dim("batch", min=1)

            def is_batch(x: Tensor) -> bool:
                return x.dim() > 0 and x.shape[0] == batch

            inputs = example_inputs
            if batch == 1:  # torch.export takes a 1 for a fixed size
                inputs = map_tensors(inputs, lambda x: torch.cat([x, x]) if is_batch(x) else x)
            shapes = map_tensors(example_inputs, lambda x: {0: dim} if is_batch(x) else None, None)
            try:
                return torch.export.export(model, inputs, dynamic_shapes=shapes), None
            except Exception as error:
                reason = _why_fixed(error)
        return torch.export.export(model, example_inputs), reason


class _Run(fx.Interpreter):
    """Runs the graph; may be given the codes that a runtime computed, which it goes on with."""

    def __init__(self, program: QdqProgram, given: Mapping[str, Tensor] | None) -> None:
        super().__init__(program.exported.graph_module)
        self.given = given or {}
        self.codes: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is not QUANTIZE:
            return result
        name = str(n.args[-1])
        given = self.given.get(name, result)
        if given.shape == result.shape and not torch.equal(given, result):
            (x, scale, zero_point, *limits, _), _ = self.fetch_args_kwargs_from_env(n)
            steps = (x / scale + zero_point).clamp(*limits)
            result = torch.where((given - steps).abs() <= 0.5 + TIE, given, result)
        self.codes[name] = result
        return given


@dataclass
class QdqProgram:
    """A converted model in QDQ form, as one graph of ATen operators.

    Beside them the graph holds ``qtoolkit_export.quantize`` and ``.dequantize``; see ``ops.qdq``.

    Attributes:
        exported: the program; its graph has a placeholder for each constant.
        constants: the value of each placeholder that is no input, by the node's name.
        inputs: names of the input nodes.
        outputs: the output nodes, in the order of ``tensors_of``.
        example_inputs: the tensors that the model was traced with, in the order of ``inputs``.
        fixed_batch: why its batch is that of the example inputs; None where the batch is dynamic or
            was not to be.
    """

    exported: ExportedProgram
    constants: dict[str, Tensor]
    inputs: list[str]
    outputs: list[fx.Node]
    example_inputs: list[Tensor]
    fixed_batch: str | None = None
    _arguments: list[Any] = field(default_factory=list)

    @classmethod
    def trace(
        cls,
        model: nn.Module,
        example_inputs: tuple[Any, ...],
        *,
        dynamic_batch: bool = True,
        branches: bool = True,
    ) -> QdqProgram:
        """The program of a converted model, which is not changed.

        ``branches`` is that of ``graph.qdq.to_qdq``.

        Raises:
            ValueError: see ``graph.qdq.to_qdq``.
        """
        qdq = to_qdq(model, branches=branches)
        return cls.of_marked(qdq, example_inputs, dynamic_batch=dynamic_batch)

    @classmethod
    def of_marked(
        cls, model: nn.Module, example_inputs: tuple[Any, ...], *, dynamic_batch: bool = True
    ) -> QdqProgram:
        """The program of a model that has the operators of ``ops.qdq_quantize``."""
        example_inputs = copy.deepcopy(example_inputs)
        exported, reason = trace(model, example_inputs, dynamic_batch=dynamic_batch)
        return cls._of(exported, tensors_of(example_inputs), reason)

    @classmethod
    def _of(
        cls, exported: ExportedProgram, example_inputs: list[Tensor], fixed_batch: str | None
    ) -> QdqProgram:
        constants, inputs = {}, []
        values = {**exported.state_dict, **exported.constants}
        for spec in exported.graph_signature.input_specs:
            name = getattr(spec.arg, "name", "")
            if spec.kind == InputKind.USER_INPUT:
                inputs.append(name)
            elif spec.target in values and isinstance(values[spec.target], Tensor):
                constants[name] = values[spec.target].detach()
        nodes = {node.name: node for node in exported.graph.nodes}
        outputs = [
            nodes[spec.arg.name]
            for spec in exported.graph_signature.output_specs
            if hasattr(spec.arg, "name")
        ]
        # Inputs that are no tensors are constants of the graph; their placeholders are unused.
        tensor_inputs = [name for name in inputs if isinstance(nodes[name].meta["val"], Tensor)]
        return cls(exported, constants, tensor_inputs, outputs, example_inputs, fixed_batch, inputs)

    def decomposed(self, known: Container[str]) -> QdqProgram:
        """The program with operators that are not known expressed by others, where PyTorch does.

        Args:
            known: names of operators, such as "aten.linear.default", which stay.
        """
        table = torch.export.default_decompositions()
        program = self
        for _ in range(3):  # what an operator is expressed by may be unknown itself
            calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
            unknown = [op for op in calls if str(op) not in known and op in table]
            if not unknown:
                break
            exported = program.exported.run_decompositions({op: table[op] for op in unknown})
            program = self._of(exported, self.example_inputs, self.fixed_batch)
        return program

    @property
    def graph(self) -> fx.Graph:
        """The graph of ATen operators."""
        return self.exported.graph

    def run(
        self, inputs: list[Tensor], given: Mapping[str, Tensor] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Computes the program in PyTorch.

        Args:
            inputs: as ``example_inputs``.
            given: codes by name that a runtime computed. Each value is still computed from what
                comes before it, but what follows continues from the given codes, so that every
                layer is seen alone.

        Returns:
            The outputs, and the codes of every quantized value by name. A given code that is as
            good, see ``TIE``, is taken for the computed one.
        """
        values = dict(zip(self.inputs, inputs))
        run = _Run(self, given)
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        arguments = [
            values[n.name] if n.name in values else self.constants.get(n.name) for n in placeholders
        ]
        with torch.no_grad():
            outputs = run.run(*arguments)
        return tensors_of(outputs), run.codes

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs in files: those of ``forward``; none is a quantized value's."""
        taken = set(self.names())
        return [free_name(name, taken) for name in self.inputs]

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs in files: where a dictionary holds one its key, else ``output``,
        with a number where there are several; none is an input's or a quantized value's."""
        results = pytree.tree_unflatten(
            list(next(node for node in self.graph.nodes if node.op == "output").args[0]),
            self.exported.call_spec.out_spec,
        )
        keys = list(_keys_of_nodes(results))
        count = sum(key is None for key in keys)
        numbers = iter(range(count))
        names = [key or ("output" if count == 1 else f"output_{next(numbers)}") for key in keys]
        taken = {*self.names(), *self.input_names}
        return [free_name(name, taken) for name in names]

    def module_of(self, node: fx.Node) -> str:
        """The dotted name of the module that a node comes from; "" for the model itself."""
        stack = node.meta.get("nn_module_stack") or {}
        path = next((path for path, _ in reversed(stack.values())), "")
        return path.removesuffix(".layer") if isinstance(path, str) else ""

    def names(self) -> list[str]:
        """The names of the quantized values in the order of the graph."""
        return [str(n.args[-1]) for n in self.graph.nodes if n.target is QUANTIZE]

    def constant(self, node: Any) -> Tensor | None:
        """The value of a node that is a constant, else None."""
        return self.constants.get(node.name) if isinstance(node, fx.Node) else None
