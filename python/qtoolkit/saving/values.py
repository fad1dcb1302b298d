"""Arguments of calls and options of layers as JSON.

None, booleans, integers, finite floats, strings and lists are themselves; all else is an object
with one key, which names its type.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qtoolkit.saving.container import InvalidFileError, require

_MOST_NESTED = 16
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPES = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype)
}
_MEMORY_FORMATS = {
    str(value).removeprefix("torch."): value
    for value in (torch.contiguous_format, torch.channels_last, torch.preserve_format)
}


def encode(value: Any) -> Any:
    """A value as JSON.

    Raises:
        TypeError: values of its type have no place in a file.
    """
    if value is None or isinstance(value, bool | str):
        return value
    if type(value) is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise TypeError(f"the integer {value} has more than 64 bits")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return {"tuple": [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(item) for key, item in value.items()}}
    if isinstance(value, slice):
        return {"slice": [encode(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, torch.memory_format) and value in _MEMORY_FORMATS.values():
        return {"memory_format": str(value).removeprefix("torch.")}
    if value is Ellipsis:
        return {"ellipsis": True}
    raise TypeError(f"a value of type {type(value).__qualname__}")


def decode(value: Any, nodes: Mapping[str, fx.Node] | None = None, depth: int = 0) -> Any:
    """The value that ``encode`` wrote.

    Args:
        nodes: the nodes that it may name.

    Raises:
        InvalidFileError: it is nothing that ``encode`` writes.
    """
    require(depth <= _MOST_NESTED, "a value is nested too deeply")
    if value is None or isinstance(value, bool | str | float):
        return value
    if isinstance(value, int):
        require(-(1 << 63) <= value < 1 << 63, "an integer has more than 64 bits")
        return value
    if isinstance(value, list):
        return [decode(item, nodes, depth + 1) for item in value]
    require(isinstance(value, dict) and len(value) == 1, f"{str(value)[:80]} is no value")
    ((kind, content),) = value.items()
    if kind in ("tuple", "slice"):
        require(isinstance(content, list), f"a {kind} must be a list")
        items = [decode(item, nodes, depth + 1) for item in content]
        if kind == "tuple":
            return tuple(items)
        require(len(items) == 3, "a slice must have three parts")
        return slice(*items)
    if kind == "dict":
        require(isinstance(content, dict), "a dict must be an object")
        return {key: decode(item, nodes, depth + 1) for key, item in content.items()}
    if kind == "ellipsis":
        return Ellipsis
    require(isinstance(content, str), f"{kind[:80]!r} must be text")
    if kind == "node":
        require(nodes is not None and content in nodes, f"there is no node {content[:80]!r} before")
        assert nodes is not None
        return nodes[content]
    tables: dict[str, Mapping[str, Any]] = {
        "float": _FLOATS,
        "dtype": _DTYPES,
        "memory_format": _MEMORY_FORMATS,
    }
    if kind in tables:
        require(content in tables[kind], f"unknown {kind} {content[:80]!r}")
        return tables[kind][content]
    require(kind == "device", f"unknown kind of value {kind[:80]!r}")
    try:
        return torch.device(content)
    except RuntimeError as error:
        raise InvalidFileError(f"unknown device {content[:80]!r}") from error


_TYPES: dict[str, Any] = {"Tensor": Tensor, "int": int, "float": float, "bool": bool, "str": str}
_TYPE_NAMES = {value: name for name, value in _TYPES.items()}
_GENERIC: dict[str, Any] = {
    "optional": typing.Optional,
    "list": typing.List,  # noqa: UP006  (the forms that TorchScript reads)
    "tuple": typing.Tuple,  # noqa: UP006
    "dict": typing.Dict,  # noqa: UP006
}


def encode_type(annotation: Any) -> Any:
    """The annotation of a graph's input as JSON; None for one that TorchScript does not read."""
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    parts = [encode_type(argument) for argument in arguments if argument is not type(None)]
    if not parts or None in parts:
        return None
    if len(parts) == 1 and len(arguments) == 2:  # X | None
        return {"optional": parts}
    names = {list: "list", tuple: "tuple", dict: "dict"}
    return {names[origin]: parts} if origin in names else None


def decode_type(value: Any, depth: int = 0) -> Any:
    """The annotation that ``encode_type`` wrote.

    Raises:
        InvalidFileError: it is none.
    """
    require(depth <= _MOST_NESTED, "an annotation is nested too deeply")
    if value is None:
        return None
    if isinstance(value, str):
        require(value in _TYPES, f"unknown annotation {value[:80]!r}")
        return _TYPES[value]
    require(isinstance(value, dict) and len(value) == 1, f"{str(value)[:80]} is no annotation")
    ((kind, parts),) = value.items()
    counts = {"optional": (1, 1), "list": (1, 1), "tuple": (1, 16), "dict": (2, 2)}
    require(kind in counts and isinstance(parts, list), f"{str(value)[:80]} is no annotation")
    least, most = counts[kind]
    good = least <= len(parts) <= most and None not in parts
    require(good, f"{str(value)[:80]} is no annotation")
    arguments = tuple(decode_type(part, depth + 1) for part in parts)
    return _GENERIC[kind][arguments if len(arguments) > 1 else arguments[0]]
