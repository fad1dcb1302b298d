"""The table of fake-quantize methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from qtoolkit.fake_quantize.base import FakeQuantize
    from qtoolkit.qconfig import TensorSpec

_METHODS: dict[str, type[FakeQuantize]] = {}

FakeQuantizeClass = TypeVar("FakeQuantizeClass", bound="type[FakeQuantize]")


def register_fake_quantize(name: str) -> Callable[[FakeQuantizeClass], FakeQuantizeClass]:
    """Class decorator that makes a FakeQuantize available as `TensorSpec(method=name)`.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def register(cls: FakeQuantizeClass) -> FakeQuantizeClass:
        known = _METHODS.get(name)
        # A module that is reloaded registers its class again under the same qualified name.
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"method {name!r} is registered already, for {known.__qualname__}")
        _METHODS[name] = cls
        return cls

    return register


def registered_methods() -> tuple[str, ...]:
    """The names that a TensorSpec may give."""
    return tuple(sorted(_METHODS))


def get_fake_quantize_class(name: str) -> type[FakeQuantize]:
    """The class registered as `name`; raises ValueError that lists the names there are."""
    if not isinstance(name, str) or name not in _METHODS:
        known = ", ".join(registered_methods())
        raise ValueError(f"unknown method {name!r}: use one of {known}")
    return _METHODS[name]


def methods_for(kind: str) -> tuple[str, ...]:
    """The methods that quantize to formats of a kind, see `NumberFormat.kind`."""
    return tuple(name for name in registered_methods() if kind in _METHODS[name].kinds)


def make_fake_quantize(
    spec: TensorSpec, name: str = "", is_weight: bool | None = None
) -> FakeQuantize:
    """A new module that fake-quantizes a tensor as `spec` says.

    Args:
        spec: names the method and the number format.
        name: the module that the tensor belongs to, for error messages.
        is_weight: whether the tensor is a weight; specs that are not per tensor are of weights,
            when not given.
    """
    return get_fake_quantize_class(spec.method)(spec, name, is_weight=is_weight)
