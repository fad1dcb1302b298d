"""The table of post-training algorithms by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from qtoolkit.algorithms.context import Context

BEFORE, AFTER = "before_calibration", "after_calibration"


class Algorithm:
    """Something that makes a prepared model lose less when it is converted.

    A subclass is a frozen dataclass whose fields are its options (numbers, strings, booleans or
    None, so that a recipe can hold them), and is registered with ``@register_algorithm("name")``.

    Attributes:
        stage: when it runs. ``"before_calibration"``: it may change weights and scales of the float
            network, so ranges are observed after it. ``"after_calibration"``: ranges are known.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = AFTER

    def run(self, context: Context) -> None:
        """Changes ``context.prepared`` in place."""
        raise NotImplementedError


_ALGORITHMS: dict[str, type[Algorithm]] = {}
_T = TypeVar("_T", bound=type[Algorithm])


def register_algorithm(name: str) -> Callable[[_T], _T]:
    """Class decorator that adds an algorithm under the name that recipes give.

    Raises:
        ValueError: the name belongs to another class already.
    """

    def register(cls: _T) -> _T:
        known = _ALGORITHMS.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"algorithm {name!r} is registered already, for {known.__qualname__}")
        cls.name = name
        _ALGORITHMS[name] = cls
        return cls

    return register


def registered_algorithms() -> tuple[str, ...]:
    """The names that a recipe may give."""
    return tuple(sorted(_ALGORITHMS))


def make_algorithm(name: str, options: Mapping[str, Any] | None = None) -> Algorithm:
    """The algorithm of a name with its options.

    Raises:
        ValueError: an unknown name or option; lists those that there are.
    """
    if not isinstance(name, str) or name not in _ALGORITHMS:
        raise ValueError(
            f"unknown algorithm {name!r}: use one of {', '.join(registered_algorithms())}"
        )
    cls = _ALGORITHMS[name]
    options = dict(options or {})
    known = list(inspect.signature(cls).parameters)
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"algorithm {name!r} has no option {unknown}: its options are {known}")
    return cls(**options)
