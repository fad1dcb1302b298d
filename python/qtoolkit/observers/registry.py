"""The table of observers by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from qtoolkit.observers.base import Observer
    from qtoolkit.qconfig import TensorSpec

_OBSERVERS: dict[str, type[Observer]] = {}

ObserverClass = TypeVar("ObserverClass", bound="type[Observer]")


def register_observer(name: str) -> Callable[[ObserverClass], ObserverClass]:
    """Class decorator that makes an Observer available as `TensorSpec(observer=name)`.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def register(cls: ObserverClass) -> ObserverClass:
        known = _OBSERVERS.get(name)
        # A module that is reloaded registers its class again under the same qualified name.
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"observer {name!r} is registered already, for {known.__qualname__}")
        _OBSERVERS[name] = cls
        return cls

    return register


def registered_observers() -> tuple[str, ...]:
    """The names that a TensorSpec may give."""
    return tuple(sorted(_OBSERVERS))


def get_observer_class(name: str) -> type[Observer]:
    """The class registered as `name`; raises ValueError that lists the names there are."""
    if not isinstance(name, str) or name not in _OBSERVERS:
        known = ", ".join(registered_observers())
        raise ValueError(f"unknown observer {name!r}: use one of {known}")
    return _OBSERVERS[name]


def make_observer(spec: TensorSpec, name: str = "") -> Observer:
    """A new observer for a tensor that is quantized as `spec` says.

    Args:
        spec: names the observer, its options and the number format.
        name: the module that the tensor belongs to, for error messages.

    Raises:
        ValueError: an option's value is not allowed.
    """
    options: dict[str, Any] = dict(spec.observer_options)
    return get_observer_class(spec.observer)(spec, name=name, **options)
