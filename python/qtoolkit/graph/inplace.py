"""Rewrites in-place operators as ordinary ones.

Quantization gives a value's readers different tensors (codes, or a dequantized copy), so a change
made to one of them would not reach the others.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from qtoolkit.graph.modules import called_module

_OPERATORS = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.ipow: operator.pow,
    operator.imod: operator.mod,
    operator.imatmul: operator.matmul,
}
# What may return its input itself, or a view of it.
_ALIASING_METHODS = {
    "chunk", "contiguous", "detach", "expand", "flatten", "narrow", "permute", "reshape", "select",
    "split", "squeeze", "t", "to", "transpose", "unbind", "unsqueeze", "view", "float", "swapaxes",
}  # fmt: skip
_ALIASING_FUNCTIONS = {
    operator.getitem, torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze, torch.permute,
    torch.transpose, torch.chunk, torch.split, torch.narrow, torch.select, torch.unbind,
}  # fmt: skip
_ALIASING_MODULES = (nn.Flatten, nn.Unflatten, nn.Identity, nn.modules.dropout._DropoutNd)


class AliasError(RuntimeError):
    """An in-place operator whose effect on other values cannot be followed."""


def _aliases(node: fx.Node, module: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return isinstance(called_module(node, module), _ALIASING_MODULES)
    if node.op == "call_function":
        return node.target in _ALIASING_FUNCTIONS
    return node.op == "call_method" and node.target in _ALIASING_METHODS


def _out_of_place(node: fx.Node, module: fx.GraphModule) -> bool:
    """Makes an in-place node an ordinary one; False if it is none.

    Raises:
        AliasError: it changes its input in a way that has no ordinary form.
    """
    if node.op == "call_module":
        called = called_module(node, module)
        # Other modules keep their ways; changes_input finds those that change their input.
        builtin = type(called).__module__.startswith("torch.nn.")
        if called is None or not builtin or not getattr(called, "inplace", False):
            return False
        called.inplace = False  # type: ignore[assignment]
        return True
    if node.op == "call_method":
        name = str(node.target)
        if name.startswith("__") or not name.endswith("_"):
            return False
        if not hasattr(torch.Tensor, name[:-1]):
            raise AliasError(f"the in-place method {name} has no ordinary form")
        node.target = name[:-1]
        return True
    if node.op != "call_function":
        return False
    if node.target in _OPERATORS:
        node.target = _OPERATORS[node.target]
        return True
    if node.target is operator.setitem:
        raise AliasError("an assignment to a part of a tensor cannot be followed")
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    name = getattr(node.target, "__name__", "")
    if name.endswith("_") and not name.startswith("__"):
        for library in (functional, torch):
            if getattr(library, name, None) is node.target and hasattr(library, name[:-1]):
                node.target = getattr(library, name[:-1])
                return True
        raise AliasError(f"the in-place function {name} has no ordinary form")
    return False


def remove_inplace(module: fx.GraphModule) -> None:
    """Rewrites every in-place operator of a captured graph; later readers get its result.

    Raises:
        AliasError: an in-place operator changes a value that is read later under another name. The
            graph is then of no use; the modules are as they were.
    """
    inplace = [child for child in module.modules() if getattr(child, "inplace", False)]
    try:
        _rewrite(module)
    except AliasError:
        for child in inplace:
            child.inplace = True  # type: ignore[assignment]
        raise


def _rewrite(module: fx.GraphModule) -> None:
    position = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if not _out_of_place(node, module):
            continue
        if not node.args or not isinstance(node.args[0], fx.Node):
            raise AliasError(f"{node.name} changes something that is no tensor of the graph")
        changed = node.args[0]
        if _is_number(changed):
            continue  # Python's numbers never change: other names keep the old value
        if changed.op == "get_attr":
            raise AliasError(f"{node.name} changes {changed.target} in place")
        for user in list(changed.users):
            if user is not node and position[user] > position[node]:
                user.replace_input_with(changed, node)
        _check_aliases(node, changed, module, position)
    module.graph.lint()
    module.recompile()


def _is_number(node: fx.Node) -> bool:
    """True for a size, or what is computed from sizes alone."""
    if node.op == "call_method":
        return node.target in {"size", "dim", "numel", "item", "stride"}
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] in {"shape", "ndim"}
    inputs = node.all_input_nodes
    module = getattr(node.target, "__module__", "")
    return module == "_operator" and bool(inputs) and all(map(_is_number, inputs))


class _Watch(fx.Interpreter):
    """Runs a graph and refuses a node that changes its input."""

    def run_node(self, n: fx.Node) -> Any:
        inputs = [self.env.get(node) for node in n.all_input_nodes]
        tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
        before = [tensor._version for tensor in tensors]
        result = super().run_node(n)
        if [tensor._version for tensor in tensors] != before:
            raise AliasError(f"{n.name} changes its input in place")
        return result


def changes_input(module: fx.GraphModule, args: tuple[Any, ...]) -> str | None:
    """Which call of a graph still changes a tensor in place when it runs; None if none does."""
    try:
        _Watch(module).run(*args)
    except AliasError as error:
        return str(error)
    return None


def _check_aliases(
    node: fx.Node, changed: fx.Node, module: fx.GraphModule, position: dict[fx.Node, int]
) -> None:
    """Refuses a change that other names of the same memory would show to a later reader."""
    base = changed
    while _aliases(base, module) and base.args and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    names, queue = {base}, [base]
    while queue:
        name = queue.pop()
        earlier = [user for user in name.users if position[user] < position[node]]
        later = [user for user in name.users if position[user] > position[node]]
        if later and name is not changed:
            raise AliasError(
                f"{node.name} changes a tensor in place that is read later through {name.name}"
            )
        new = [user for user in earlier if user not in names and _aliases(user, module)]
        names.update(new)
        queue += new
