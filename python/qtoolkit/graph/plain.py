"""Which modules may be replaced: those that compute what their class says, and nothing else."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def not_plain(module: nn.Module) -> str | None:
    """Why a layer's type does not say what it computes, or None if it does.

    A subclass may override ``forward``, a hook may change inputs or outputs, a parametrization the
    weight. Such a layer is called as it is.
    """
    for method in ("forward", "_conv_forward"):
        function = getattr(type(module), method, None)
        origin = getattr(function, "__module__", None) or ""
        if method in module.__dict__:
            return f"its {method} was replaced"
        if function is not None and not origin.startswith(("torch.nn.", "qtoolkit.")):
            return f"{type(module).__qualname__} overrides {method}"
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks"
    if parametrize.is_parametrized(module) or "weight_g" in module._parameters:
        return "its weight is parametrized (remove_parametrizations or remove_weight_norm first)"
    return None


def is_plain(
    module: nn.Module | None, types: type[nn.Module] | tuple[type[nn.Module], ...]
) -> bool:
    """True for a module of one of the types that computes what the type says."""
    return isinstance(module, types) and not_plain(module) is None
