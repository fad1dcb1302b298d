"""Operators that only move values in TFLite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from qtoolkit.export.tflite_graph import Lowering
from qtoolkit.export.tflite_program import MOVERS, lowers
from qtoolkit.export.tflite_values import FreeSize, Out, Value
from qtoolkit.export.tflite_windows import arguments_of, cut, pad, take


@lowers(
    "aten.reshape.default",
    "aten.view.default",
    "aten._unsafe_view.default",
    "aten.flatten.using_ints",
    "aten.unflatten.int",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.squeeze.default",
    "aten.unsqueeze.default",
    into=(MOVERS,),
)
def _reshape(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    return lowering.reshape(lowering.value(node.args[0]), lowering.shape(node))


@lowers(
    "aten.contiguous.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.alias.default",
    "aten.dropout.default",
    "aten.lift_fresh_copy.default",
    into=(MOVERS,),
)
def _same(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    return lowering.value(node.args[0])


def permuted(x: Value, dims: Sequence[int]) -> Value:
    """Dimension i of the result is dimension ``dims[i]`` of x, which stays as it is stored."""
    dims = [dim % x.rank for dim in dims]
    shape = tuple(x.shape[dim] for dim in dims)
    if x.array is not None:
        return replace(x, shape=shape, order=tuple(range(x.rank)), array=x.array.transpose(dims))
    return replace(x, shape=shape, order=tuple(dims.index(dim) for dim in x.order))


@lowers("aten.permute.default", "aten.transpose.int", "aten.t.default", into=(MOVERS,))
def _permute(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.value(node.args[0])
    if str(node.target) == "aten.permute.default":
        return permuted(x, cast(Sequence[int], node.args[1]))
    dims = list(range(x.rank))
    a, b = cast(tuple[int, int], node.args[1:3] or (0, 1))
    dims[a], dims[b] = dims[b], dims[a]
    return permuted(x, dims)


@lowers("aten.channel_shuffle.default", into=(MOVERS,))
def _channel_shuffle(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, groups = lowering.value(node.args[0]), cast(int, node.args[1])
    rest = range(3, x.rank + 1)
    split = lowering.reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    return lowering.reshape(permuted(split, (0, 2, 1, *rest)), x.shape)


@lowers("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", into=(MOVERS,))
def _pixel_shuffle(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, r = lowering.value(node.args[0]), cast(int, node.args[1])
    n, c, h, w = x.shape
    if "unshuffle" in str(node.target):
        x = lowering.reshape(x, (n, c, h // r, r, w // r, r))
        x = permuted(x, (0, 1, 3, 5, 2, 4))
    else:
        x = lowering.reshape(x, (n, c // (r * r), r, r, h, w))
        x = permuted(x, (0, 1, 4, 2, 5, 3))
    return lowering.reshape(x, lowering.shape(node))


def _bound(value: Any, size: int, default: int) -> int:
    if value is None:
        return default
    return min(max(value + size if value < 0 else value, 0), size)


@lowers("aten.slice.Tensor", into=(MOVERS,))
def _slice(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, arguments = lowering.value(node.args[0]), arguments_of(node)
    dim = arguments["dim"] % x.rank
    size = x.shape[dim]
    start, end = (lowering.number(arguments[key]) for key in ("start", "end"))
    start, end = _bound(start, size, 0), _bound(end, size, size)
    if isinstance(size, FreeSize) and (start, end) != (0, size):
        lowering.need_fixed(node, x.shape)
    return cut(lowering, x, dim, start, end, arguments["step"])


@lowers("aten.select.int", into=(MOVERS,))
def _select(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.value(node.args[0])
    dim, index = (lowering.number(argument) for argument in node.args[1:3])
    dim %= x.rank
    if isinstance(x.shape[dim], FreeSize):
        lowering.need_fixed(node, x.shape)
    index = index + x.shape[dim] if index < 0 else index
    part = cut(lowering, x, dim, index, index + 1)
    return lowering.reshape(part, lowering.shape(node))


@lowers("<built-in function getitem>", into=(MOVERS,))
def _part(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    """A part of what was cut."""
    whole, number = cast(tuple[fx.Node, int], node.args)
    target = str(whole.target)
    if target not in {"aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"}:
        raise lowering.unsupported(whole, "TFLite has no such operator")
    arguments = arguments_of(whole)
    dim = arguments["dim"]
    sizes = [lowering.sizes(part.shape)[dim] for part in whole.meta["val"]]
    start = sum(sizes[:number])
    return cut(lowering, lowering.value(whole.args[0]), dim, start, start + sizes[number])


@lowers("aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default", into=(MOVERS,))
def _chunk(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    return lowering.value(node.args[0])


@lowers("aten.expand.default", into=(MOVERS,))
def _expand(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, shape = lowering.value(node.args[0]), lowering.shape(node)
    if x.shape == shape:
        return x
    lowering.need_fixed(node, shape)
    if x.rank < len(shape):
        x = lowering.reshape(x, (1,) * (len(shape) - x.rank) + x.shape)
    sizes = lowering.model.constant("shape", np.asarray([shape[dim] for dim in x.order], np.int32))
    like = replace(x, shape=shape, array=None)
    return lowering.emit("BROADCAST_TO", [x, sizes], like, Out(x.quantization))


@lowers("aten.pad.default", "aten.constant_pad_nd.default", into=(MOVERS,))
def _pad(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, arguments = lowering.value(node.args[0]), arguments_of(node)
    sides = [(0, 0)] * x.rank
    numbers = [lowering.number(number) for number in arguments["pad"]]
    for index in range(len(numbers) // 2):
        sides[x.rank - 1 - index] = (numbers[2 * index], numbers[2 * index + 1])
    mode = arguments.get("mode", "constant")
    for dim, (before, after) in enumerate(sides):
        if before < 0 or after < 0:
            size = x.shape[dim]
            x = cut(lowering, x, dim, max(-before, 0), size - max(-after, 0))
        sides[dim] = (max(before, 0), max(after, 0))
        if mode != "constant" and any(sides[dim]):
            places = torch.arange(x.shape[dim], dtype=torch.float32).reshape(1, 1, -1)
            found = torch.nn.functional.pad(places, sides[dim], mode=mode).reshape(-1)
            x = take(lowering, x, dim, found.to(torch.int32))
    if mode != "constant" or not any(map(any, sides)):
        return x
    if arguments.get("value"):
        raise lowering.unsupported(node, "only zeros can be padded with in a TFLite file")
    return pad(lowering, x, sides)
