"""Options and tensors of layers: which there are, and of which types."""

from __future__ import annotations

import inspect
import math
import types
import typing
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.nn import QParams, QuantizedModule
from qtoolkit.nn.base import SAVED
from qtoolkit.saving.container import require
from qtoolkit.saving.values import decode, encode

_RECURRENT = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout")
_ARGUMENTS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.GRU: (*_RECURRENT, "bidirectional"),
    nn.LSTM: (*_RECURRENT, "bidirectional", "proj_size"),
    nn.RNN: (*_RECURRENT, "bidirectional", "nonlinearity"),
}
_NOT_SAVED = {"device", "dtype", "min_value", "max_value"}
#: Of those that stand for whether there is a tensor, and have another name than it.
_FLAGS: dict[tuple[type[nn.Module], str], str] = {
    (nn.MultiheadAttention, "bias"): "in_proj_bias",
    (nn.MultiheadAttention, "add_bias_kv"): "bias_k",
}


def _arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names that a float layer's constructor takes."""
    if kind in _ARGUMENTS:
        return _ARGUMENTS[kind]
    for base in kind.__mro__:
        parameters = inspect.signature(base).parameters.values()
        if base is nn.Module:
            break
        if not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            names = (p.name for p in parameters)
            return tuple(n for n in names if n not in _NOT_SAVED and not n.startswith("_"))
    return ()


def float_options(layer: nn.Module) -> dict[str, Any]:
    """What a float layer was made with, as JSON.

    Raises:
        TypeError: something of it has no place in a file.
    """
    options = {}
    for name in _arguments(type(layer)):
        flag = _FLAGS.get((type(layer), name))
        value = getattr(layer, flag or name)
        if flag is not None or (name == "bias" and not isinstance(value, bool)):
            value = value is not None
        options[name] = encode(value)
    return options


def make_float(kind: type[nn.Module], options: Any, tensors: int) -> nn.Module:
    """A float layer without memory for its tensors.

    Args:
        tensors: how many the file has for it.

    Raises:
        InvalidFileError: the options are not those of the layer.
        Exception: what its constructor raises.
    """
    require(isinstance(options, dict), f"the options of a {kind.__name__} must be an object")
    wanted = set(_arguments(kind))
    require(options.keys() == wanted, f"the options of a {kind.__name__} must be {sorted(wanted)}")
    arguments = {name: decode(value) for name, value in options.items()}
    if issubclass(kind, nn.RNNBase):  # the constructor's only loop
        layers = arguments["num_layers"]
        require(type(layers) is int and 0 < layers <= tensors, f"{layers!r} layers")
    with torch.device("meta"):
        return kind(**arguments).eval()


def _fits(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if isinstance(kind, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(kind))
    if typing.get_origin(kind) is typing.Literal:
        return isinstance(value, str) and value in typing.get_args(kind)
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(v, item) for v in value)
    if typing.get_origin(kind) is tuple:
        items = typing.get_args(kind)
        good = isinstance(value, tuple) and len(value) == len(items)
        return good and all(_fits(v, item) for v, item in zip(value, items))
    return type(value) is (type(None) if kind is None else kind)


def _is_buffer(kind: Any) -> bool:
    return kind is Tensor or isinstance(kind, torch.dtype)


def _schema(cls: type[QuantizedModule]) -> dict[str, Any]:
    """Types of attributes, and of buffers, of a class of quantized modules."""
    result: dict[str, Any] = {"source": str, "float_node": str}
    for name, kind in SAVED[cls.__name__][1].items():
        if kind is not QParams:
            result[name] = kind
            continue
        result.update({f"{name}_scale": torch.float32, f"{name}_zero_point": torch.int32})
        if name == "output":
            result.update(quant_min=int, quant_max=int, format_max=int, upper=float | None)
    return result


#: What torch.jit.script leaves on every module that it compiles.
_LEFT_BY_SCRIPT = {"__overloads__"}


def quantized_options(layer: QuantizedModule) -> dict[str, Any]:
    """The attributes of a quantized layer as JSON.

    Raises:
        TypeError: its class is not registered with ``saved``, or it has other attributes or buffers
            than registered.
    """
    cls = type(layer)
    if SAVED.get(cls.__name__, (None,))[0] is not cls:
        raise TypeError("a quantized layer of a class without @saved")
    schema = _schema(cls)
    attributes = {name for name, kind in schema.items() if not _is_buffer(kind)}
    buffers = {name for name, kind in schema.items() if _is_buffer(kind)}
    own = vars(layer).keys() - vars(nn.Module()).keys() - _LEFT_BY_SCRIPT
    unknown = (own - attributes) | (layer._buffers.keys() ^ buffers)
    if unknown:
        raise TypeError(f"a {cls.__name__} whose {', '.join(sorted(unknown))} @saved does not know")
    options = {}
    for name in sorted(attributes):
        value = getattr(layer, name)
        if type(value) is int and schema[name] in (float, float | None):
            value = float(value)
        if not _fits(value, schema[name]):
            raise TypeError(f"a {cls.__name__} whose {name} is {value!r}")
        options[name] = encode(value)
    return options


def make_quantized(name: str, options: Any, buffers: dict[str, Tensor | None]) -> QuantizedModule:
    """A quantized layer from its parts.

    Raises:
        InvalidFileError: the class is unknown, or the parts are not those of the class.
    """
    require(name in SAVED, f"unknown quantized layer {name[:80]!r}")
    cls = SAVED[name][0]
    schema = _schema(cls)
    wanted = {key for key, kind in schema.items() if not _is_buffer(kind)}
    good = isinstance(options, dict) and options.keys() == wanted
    require(good, f"the options of a {name} must be {sorted(wanted)}")
    wanted = schema.keys() - wanted
    buffers = {**buffers, **{key: None for key in cls.newer_buffers if key not in buffers}}
    require(buffers.keys() == wanted, f"the buffers of a {name} must be {sorted(wanted)}")
    layer = cls.__new__(cls)
    nn.Module.__init__(layer)
    for key, value in options.items():
        value = decode(value)
        require(_fits(value, schema[key]), f"the {key} of a {name} is {str(value)[:80]}")
        setattr(layer, key, value)
    for key, tensor in buffers.items():
        _check_buffer(f"the {key} of a {name}", schema[key], key, tensor)
        layer.register_buffer(key, tensor)
    _check_codes(layer, name)
    return layer


def _check_buffer(what: str, kind: Any, key: str, tensor: Tensor | None) -> None:
    if tensor is None:
        return
    require(kind is Tensor or tensor.dtype == kind, f"{what} is {tensor.dtype}, not {kind}")
    if key.endswith("_scale"):
        good = bool(torch.isfinite(tensor).all()) and bool((tensor >= 0).all())
        require(good, f"{what} is not finite or negative")


def _check_codes(layer: QuantizedModule, name: str) -> None:
    for key, tensor in layer._buffers.items():
        if not key.endswith("_zero_point"):
            continue
        scale = layer._buffers[key.removesuffix("zero_point") + "scale"]
        good = (tensor is None) == (scale is None)
        if tensor is not None and scale is not None:
            good = tensor.dim() == 0 and scale.dim() == 0 and float(scale) > 0
            good = good and -128 <= int(tensor) <= 255
        require(good, f"the {key} of a {name} is no zero point of one scale")
    if "output_scale" in layer._buffers:
        low, high, most = layer.quant_min, layer.quant_max, layer.format_max
        good = (0 <= low <= high <= most <= 255) or (-128 <= low <= high <= most <= 127)
        require(good, f"the codes of a {name} are {low} to {high} of {most}")
        upper = layer.upper
        require(upper is None or math.isfinite(upper), f"the upper bound of a {name} is {upper}")
