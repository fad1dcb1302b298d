"""Names of an ONNX graph's inputs, outputs and dynamic sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qtoolkit.export.program import QdqProgram, free_name

if TYPE_CHECKING:
    from qtoolkit.export.registry import Job

#: The name of the dynamic first dimension.
BATCH = "batch"


def _checked(names: Sequence[str], count: int, kind: str) -> list[str]:
    if isinstance(names, str) or len(names) != count or len(set(names)) != count:
        raise ValueError(
            f"{kind}_names must be {count} different names, one for each {kind} of the model; got "
            f"{names!r}"
        )
    return list(names)


def _rename_batch(model: Any, program: QdqProgram) -> None:
    """Gives the size that is free in the inputs its name, wherever a shape has it."""
    import onnx_ir as ir

    free = {
        str(size.value)
        for value in model.graph.inputs
        for size in value.shape or ()
        if isinstance(size, ir.SymbolicDim) and size.value is not None
    }
    if len(free) != 1:
        return
    old = free.pop()
    values = [*model.graph.inputs, *(v for node in model.graph for v in node.outputs)]
    for value in values:
        if value.shape is None or value.shape.is_static():
            continue
        sizes = [
            size if isinstance(size, int) else str(size.value or "").replace(old, BATCH) or None
            for size in value.shape
        ]
        value.shape = ir.Shape(sizes)


def name_interface(
    model: Any,
    job: Job,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> None:
    """Names the inputs and outputs of a graph, and its dynamic batch.

    Raises:
        ValueError: the names are too many or too few, or not different from each other and from
            other values.
    """
    import onnx_ir as ir

    graph = model.graph
    _rename_batch(model, job.program)
    taken = {value.name for node in graph for value in node.outputs}
    taken |= set(graph.initializers)
    outputs = list(graph.outputs)
    for index, value in enumerate(outputs):
        # An output that is an input, a constant, codes or an output already gets a node of its own.
        node = value.producer()
        if node is None or node.op_type == "QuantizeLinear" or value in outputs[:index]:
            identity = ir.node("Identity", [value])
            identity.name = f"Identity_{index}"
            graph.append(identity)
            identity.outputs[0].type, identity.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = identity.outputs[0]
    inputs, outputs = list(graph.inputs), list(graph.outputs)
    taken -= {value.name for value in outputs}
    if input_names is not None:
        for value, name in zip(inputs, _checked(input_names, len(inputs), "input")):
            value.name = name
    clash = taken & {value.name for value in inputs}
    if clash:
        raise ValueError(f"input_names: {', '.join(sorted(clash))} is the name of a layer's codes")
    taken |= {str(value.name) for value in inputs}
    if output_names is not None:
        names = _checked(output_names, len(outputs), "output")
        clash = taken & set(names)
        if clash:
            raise ValueError(
                f"output_names: {', '.join(sorted(clash))} is the name of other values"
            )
    else:
        names = [free_name(name, taken) for name in job.program.output_names]
    for value, name in zip(outputs, names):
        value.name = name
