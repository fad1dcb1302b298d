"""Shapes and dtypes of a captured graph's values, found by running it on the example inputs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from qtoolkit.graph.modules import bound_arguments, graph_modules

_KEY = "qtoolkit_value"


class _Recorder(fx.Interpreter):
    """Runs a graph and notes shape and dtype of every tensor on its node."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            n.meta[_KEY] = (tuple(result.shape), result.dtype)
        return result


def propagate_shapes(model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Notes shapes on the nodes of every captured part of a model."""

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert isinstance(module, fx.GraphModule)
        with torch.no_grad():
            _Recorder(module).run(*bound_arguments(module, args, kwargs))

    handles = [
        module.register_forward_pre_hook(record, with_kwargs=True)
        for _, module in graph_modules(model)
    ]
    # A forward that counts its calls shall not count this one.
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        with torch.no_grad():
            model(*copy.deepcopy(example_inputs))
            for buffer, value in buffers:
                buffer.copy_(value)
    finally:
        for handle in handles:
            handle.remove()


def float_shape(value: Any) -> tuple[int, ...] | None:
    """The shape of a node's value if it is a floating-point tensor, else None."""
    if not isinstance(value, fx.Node) or _KEY not in value.meta:
        return None
    shape, dtype = value.meta[_KEY]
    return shape if dtype.is_floating_point else None


def bind_any(signature: Callable[..., None], node: fx.Node) -> dict[str, Any] | None:
    """A call's arguments by name without the first, defaults filled in.

    None if the call does not fit the signature.
    """
    try:
        bound = inspect.signature(signature).bind(*node.args, **node.kwargs)
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def bind(signature: Callable[..., None], node: fx.Node) -> dict[str, Any] | None:
    """``bind_any``, and None also if an argument is computed in the graph."""
    arguments = bind_any(signature, node)
    if arguments is None or any(isinstance(value, fx.Node) for value in arguments.values()):
        return None
    return arguments
