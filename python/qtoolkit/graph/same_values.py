"""Operators that move values without changing them: they work on codes as on real numbers.

Their output has the scale and zero point of their input, so they need no observer of their own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from qtoolkit.graph.modules import called_module, pair
from qtoolkit.graph.patterns.registry import AsModule
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.resizing import as_upsample
from qtoolkit.graph.shapes import bind, bind_any, float_shape
from qtoolkit.nn import functional as own
from qtoolkit.nn import moving, pooling
from qtoolkit.nn.base import QParams

#: Modules that return their input in evaluation.
IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    own.StochasticDepth,
)
_MODULES = (
    *IDENTITIES,
    nn.Flatten,
    nn.Unflatten,
    nn.MaxPool2d,
    nn.PixelShuffle,
    nn.PixelUnshuffle,
    nn.ChannelShuffle,
    own.Pad,
    own.UpsampleNearest2d,
)
_PADDING = {
    nn.modules.padding._ConstantPadNd: "constant",
    nn.modules.padding._ReflectionPadNd: "reflect",
    nn.modules.padding._ReplicationPadNd: "replicate",
    nn.modules.padding._CircularPadNd: "circular",
}
_FUNCTIONS = {
    torch.flatten,
    torch.reshape,
    torch.squeeze,
    torch.unsqueeze,
    torch.permute,
    torch.transpose,
    torch.chunk,
    torch.split,
    torch.narrow,
}
_METHODS = {
    "chunk",
    "clone",
    "contiguous",
    "detach",
    "expand",
    "flatten",
    "narrow",
    "permute",
    "reshape",
    "split",
    "squeeze",
    "transpose",
    "unsqueeze",
    "view",
}
# What a graph may ask of a tensor without reading its values.
_FACT_METHODS = {"dim", "ndimension", "numel", "size"}
_FACT_ATTRIBUTES = {"device", "ndim", "shape"}

_DROPOUT = {functional.dropout, torch.dropout, functional.dropout2d}
_MAX_POOL = {functional.max_pool2d, torch.max_pool2d}


def keeps_values(node: fx.Node, module: fx.GraphModule) -> bool:
    """True if the node only moves the values of its first argument."""
    if node.op == "call_module":
        called = called_module(node, module)
        if _padding(called) is not None:
            return True
        return is_plain(called, _MODULES) and not getattr(called, "return_indices", False)
    if node.target is operator.getitem:
        # A part of a tensor, or one of those that it was cut into; not of an LSTM's result.
        source = node.args[0]
        return isinstance(source, fx.Node) and (float_shape(source) is not None or _cuts(source))
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _padding(module: nn.Module | None) -> tuple[str, list[int]] | None:
    """Mode and numbers of a padding layer that adds no other values than 0, else None."""
    for kind, mode in _PADDING.items():
        if not is_plain(module, kind):
            continue
        assert module is not None
        pad = list(module.padding)  # type: ignore[arg-type]
        fits = getattr(module, "value", 0) == 0 if mode == "constant" else len(pad) <= 4
        return (mode, pad) if fits else None
    return None


_CUTS = {torch.chunk, torch.split, "chunk", "split"}


def _cuts(node: fx.Node) -> bool:
    return node.op in ("call_function", "call_method") and node.target in _CUTS


def asks_fact(node: fx.Node) -> bool:
    """True if the node reads only a tensor's shape or device."""
    if node.op == "call_method":
        return node.target in _FACT_METHODS
    return (
        node.op == "call_function" and node.target is getattr and node.args[1] in _FACT_ATTRIBUTES
    )


def origin(node: fx.Node, module: fx.GraphModule) -> fx.Node:
    """The node that computed the values which this node may only have moved."""
    while keeps_values(node, module) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> None:
    """The parameters of the dropout functions."""


def _max_pool2d(
    x: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> None:
    """The parameters of the max pooling functions."""


def _stochastic_depth(x: Any, p: float, mode: str, training: bool = True) -> None:
    """The parameters of ``torchvision.ops.stochastic_depth``."""


def _is_stochastic_depth(function: Any) -> bool:
    # By name: torchvision need not be installed.
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
    return name == "torchvision.ops.stochastic_depth.stochastic_depth"


def _pad(x: Any, pad: Any, mode: Any = "constant", value: Any = None) -> None:
    """The parameters of ``F.pad``."""


def _shuffle(x: Any, factor: Any) -> None:
    """The parameters of the shuffles."""


_SHUFFLES = {
    functional.pixel_shuffle: nn.PixelShuffle,
    functional.pixel_unshuffle: nn.PixelUnshuffle,
    functional.channel_shuffle: nn.ChannelShuffle,
}


def _pad_as_module(node: fx.Node) -> AsModule | None:
    arguments = bind_any(_pad, node)
    if arguments is None or arguments["mode"] not in _PADDING.values():
        return None
    pad, mode = arguments["pad"], arguments["mode"]
    if mode == "constant":
        moves = arguments["value"] in (None, 0)
    else:
        moves = isinstance(pad, list | tuple) and len(pad) <= 4
    return AsModule(own.Pad(mode), (node.args[0], pad)) if moves else None


def as_module(node: fx.Node) -> AsModule | None:
    """The module for a function that moves values.

    A traced ``F.dropout(x, p, self.training)`` holds the mode of the day; the module follows the
    model's mode.
    """
    if node.op != "call_function" or not node.args or float_shape(node.args[0]) is None:
        return None
    if node.target in _DROPOUT:
        arguments = bind(_dropout, node)
        # The trace is in evaluation mode: True was written as such, and is meant.
        if arguments is None or arguments["training"]:
            return None
        kind = nn.Dropout2d if node.target is functional.dropout2d else nn.Dropout
        return AsModule(kind(arguments["p"]), node.args[:1])
    if _is_stochastic_depth(node.target):
        arguments = bind(_stochastic_depth, node)
        if arguments is None or arguments.pop("training"):
            return None
        return AsModule(own.StochasticDepth(**arguments), node.args[:1])
    if node.target in _MAX_POOL:
        arguments = bind(_max_pool2d, node)
        if arguments is None or arguments.pop("return_indices"):
            return None
        return AsModule(nn.MaxPool2d(**arguments), node.args[:1])
    if node.target in _SHUFFLES:
        arguments = bind(_shuffle, node)
        if arguments is None:
            return None
        return AsModule(_SHUFFLES[node.target](arguments["factor"]), node.args[:1])
    if node.target is functional.pad:
        return _pad_as_module(node)
    return as_upsample(node, own.UpsampleNearest2d)


def lower_same_values(
    node: fx.Node, module: fx.GraphModule, qparams: QParams
) -> nn.Module | str | None:
    """How a value-preserving node is written on codes.

    Args:
        qparams: of the codes.

    Returns:
        A module to call instead, the name of a method to call instead, or None to keep the node.
    """
    called = called_module(node, module)
    if isinstance(called, nn.MaxPool2d):
        return pooling.MaxPool2d(
            pair(called.kernel_size),
            pair(called.stride),
            pair(called.padding),
            pair(called.dilation),
            called.ceil_mode,
        )
    padding = _padding(called)
    if padding is not None:
        return moving.Pad(padding[0], padding[1], input=qparams)
    if isinstance(called, own.Pad):
        return moving.Pad(called.mode, input=qparams)
    if isinstance(called, own.UpsampleNearest2d):
        exact = called.mode == "nearest-exact"
        return moving.UpsampleNearest2d(called.scale_factors, exact, called.recompute)
    if isinstance(called, nn.ChannelShuffle):
        return moving.ChannelShuffle(called.groups)
    if isinstance(called, nn.PixelShuffle):
        return moving.PixelShuffle(called.upscale_factor)
    if isinstance(called, nn.PixelUnshuffle):
        return moving.PixelUnshuffle(called.downscale_factor)
    # Codes are channels-last inside a converted model, where a view may be impossible.
    if node.op == "call_method" and node.target == "view":
        return "reshape"
    return None
