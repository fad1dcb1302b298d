"""Plan files: a compiled network that a C++ program runs without PyTorch."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from qtoolkit import ops
from qtoolkit.export.files import staged
from qtoolkit.nn.plan import Plan


def whole_plan(model: nn.Module) -> tuple[Plan, list[int], list[int]]:
    """The plan that is all of a compiled model.

    Returns:
        The plan; for each of its inputs the number of the argument of ``forward``; for each output
        of ``forward`` the number of the plan's.
    """
    plans = [module for module in model.modules() if isinstance(module, Plan)]
    if not plans:
        raise ValueError("save_plan needs the result of qt.compile; this model has no plan")
    where = "a plan file holds networks that are one plan as a whole; qt.explain lists the layers"
    if not isinstance(model, fx.GraphModule):
        raise ValueError(f"save_plan: the model could not be captured as a whole; {where}")
    arguments = [node for node in model.graph.nodes if node.op == "placeholder"]
    calls = [
        node
        for node in model.graph.nodes
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), Plan)
    ]
    parts = {
        node: node.args[1]
        for node in model.graph.nodes
        if node.target is operator.getitem and node.args[0] in calls
    }
    for node in model.graph.nodes:  # only where the result lies in memory, which a program is told
        if node.op == "call_method" and node.target == "contiguous" and node.args[0] in parts:
            parts[node] = parts[node.args[0]]
    allowed = {*arguments, *calls, *parts}
    others = [n for n in model.graph.nodes if n not in allowed and n.op != "output"]
    if others or len(calls) != 1:
        names = ", ".join(repr(node.name) for node in others[:5]) or "between plans"
        raise ValueError(f"save_plan: parts of the model run in PyTorch ({names}); {where}")
    (call,) = calls
    (result,) = next(n for n in model.graph.nodes if n.op == "output").args
    leaves = pytree.tree_leaves(result)
    order = [parts[leaf] for leaf in leaves if leaf in parts]
    if len({*order}) != len(leaves):
        raise ValueError("save_plan: the model returns an input, a constant, or a value twice")
    plan = model.get_submodule(call.target)
    assert isinstance(plan, Plan)
    return plan, [arguments.index(node) for node in call.args[0]], order


def _with_outputs(plan: Any, order: list[int]) -> Any:
    """The plan with its outputs in that order."""
    head, steps, (outputs, keys, choices) = plan.state()
    if order == list(range(len(outputs))):
        return plan
    return ops.make_plan((head, steps, ([outputs[i] for i in order], keys, choices)))


def save_plan(model: nn.Module, path: str | os.PathLike[str], example_inputs: Any = None) -> None:
    """Writes a compiled network as a plan file, which runs without PyTorch.

    C++ programs run it through ``qtoolkit/plan.h`` (``find_package(qtoolkit COMPONENTS engine)``),
    ``load_plan`` in Python. Its inputs and outputs are those of ``model.forward`` in their order,
    without arguments that the network does not read; outputs of rank 4 may be channels_last. It
    gives the model's bits on every CPU; what ``compile`` measured is kept for CPUs like this one.

    Args:
        model: the result of ``qt.compile``, all of it one plan; it is not changed.
        path: the file; an older one there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple or one tensor. With it the file is
            loaded again, run, and must give the model's bits.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the model is not compiled, or a part of it is not in the plan; names the part.
        OSError: the file cannot be written.
        RuntimeError: the loaded file computes something else.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_plan needs a torch.nn.Module, got {type(model).__name__}")
    plan, inputs, outputs = whole_plan(model)
    with staged(path) as file:
        try:
            _with_outputs(plan.plan, outputs).save(str(file))
        except RuntimeError as error:
            raise OSError(f"save_plan cannot write {os.fspath(path)}: {error}") from error
        if example_inputs is not None:
            if isinstance(example_inputs, Tensor):
                example_inputs = (example_inputs,)
            with torch.no_grad():
                expected = pytree.tree_leaves(model(*example_inputs))
                found = load_plan(file)([example_inputs[i] for i in inputs])
            if not all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)):
                raise RuntimeError("save_plan: the file gives other results; nothing was written")


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """The network of a plan file as a module: from a list of tensors to a list of tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of a newer version; says what is wrong.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    return Plan.load(os.fspath(path))
