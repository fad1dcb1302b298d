"""Modules that are called more than once: one set of parameters under one name.

``prepare`` gives every call of a layer a module of its own, because calls may differ in what is
fused into them and in the ranges of their activations. The further ones hold the same parameter
objects; in a state dict these appear under the first one's name alone, as in the user's model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

_FIRST = "qtoolkit_first_call"
_SUCCESSOR = "qtoolkit_successor"


def _tensors(module: nn.Module) -> dict[str, Any]:
    named = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _before_load(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    # The first one is loaded already; with assign=True it has new tensors.
    first = getattr(module, _FIRST)[0]
    module._parameters.update(first._parameters)
    module._buffers.update(first._buffers)
    for name, tensor in _tensors(module).items():
        state_dict.setdefault(prefix + name, tensor)


def _after_state_dict(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in _tensors(module):
        state_dict.pop(prefix + name, None)


def mark_further_call(module: nn.Module, first: nn.Module) -> None:
    """Keeps the module's own parameters and buffers, which are the first one's, out of state
    dicts."""
    # In a tuple, so that the first one is not registered a second time.
    setattr(module, _FIRST, (first,))
    module.register_load_state_dict_pre_hook(_before_load)
    module.register_state_dict_post_hook(_after_state_dict)


def first_call(module: nn.Module) -> nn.Module | None:
    """The module of which this one is a further call, None if it is none."""
    return getattr(module, _FIRST, (None,))[0]


def further_call(layer: nn.Module) -> nn.Module:
    """A module that holds the layer's parameters and buffers, for a further call of it."""
    copy = layer.__class__.__new__(layer.__class__)
    copy.__dict__ = {
        name: value.copy() if name.startswith("_") and hasattr(value, "copy") else value
        for name, value in layer.__dict__.items()
    }
    mark_further_call(copy, getattr(layer, _FIRST, (layer,))[0])
    return copy


def keep_mark(old: nn.Module, new: nn.Module) -> None:
    """Lets a module take the place of another one, be it a first or a further call."""
    setattr(old, _SUCCESSOR, (new,))
    if hasattr(old, _FIRST):
        first = getattr(old, _FIRST)[0]
        mark_further_call(new, getattr(first, _SUCCESSOR, (first,))[0])
