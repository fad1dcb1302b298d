"""Finding modules in captured models and graphs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import fx, nn


def graph_modules(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """The captured parts of a model, outermost first, with their dotted names."""
    for name, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            yield name, module


def called_module(node: Any, module: fx.GraphModule) -> nn.Module | None:
    """The module that a node calls, or None."""
    if isinstance(node, fx.Node) and node.op == "call_module":
        return module.get_submodule(str(node.target))
    return None


def free_name(module: nn.Module, name: str) -> str:
    """A name for a new child: the wanted one, or with a number if that is taken."""
    if not hasattr(module, name):
        return name
    number = 1
    while hasattr(module, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"


def innermost_module(node: fx.Node) -> str:
    """Dotted name of the module that a captured node calls, or in whose ``forward`` a function is
    called; empty for the captured module itself."""
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    return str(next(reversed(stack.values()))[0])


_WHOLE = "qtoolkit_whole"


def keep_whole(module: nn.Module) -> None:
    """Marks a module that capture must not look into; it stays in float."""
    setattr(module, _WHOLE, True)


def is_kept_whole(module: nn.Module) -> bool:
    """True for a module that ``keep_whole`` marked."""
    return hasattr(module, _WHOLE)


def bound_arguments(
    module: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, ...]:
    """The arguments of a call of a captured part, by position, defaults filled in."""
    bound = inspect.signature(type(module).forward).bind(module, *args, **kwargs)
    bound.apply_defaults()
    return bound.args[1:]


def pair(value: Any) -> tuple[int, int]:
    """Height and width of an option that may be one number for both."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])
