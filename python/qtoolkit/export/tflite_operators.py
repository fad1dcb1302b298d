"""Operators on elements, moved values, products of matrices and normalization in TFLite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from qtoolkit.export.tflite_graph import Lowering
from qtoolkit.export.tflite_layers import _arguments, mean, pad, take
from qtoolkit.export.tflite_program import CONDITIONS, FLOATS, INTEGERS, MOVERS, clip_bounds, lowers
from qtoolkit.export.tflite_values import FreeSize, Out, Value

_REAL = Out()
_BINARY = {
    "add.Tensor": "ADD",
    "add_.Tensor": "ADD",
    "sub.Tensor": "SUB",
    "mul.Tensor": "MUL",
    "mul_.Tensor": "MUL",
    "div.Tensor": "DIV",
    "maximum.default": "MAXIMUM",
    "minimum.default": "MINIMUM",
}
_TABLES = {
    "ADD": "AddOptions",
    "SUB": "SubOptions",
    "MUL": "MulOptions",
    "DIV": "DivOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
}
#: Functions of one value, with the table of their options.
_UNARY: dict[str, tuple[str, str | None]] = {
    "abs": ("ABS", None),
    "cos": ("COS", None),
    "exp": ("EXP", None),
    "floor": ("FLOOR", None),
    "hardswish": ("HARD_SWISH", None),
    "log": ("LOG", None),
    "neg": ("NEG", None),
    "rsqrt": ("RSQRT", None),
    "sigmoid": ("LOGISTIC", None),
    "sin": ("SIN", None),
    "sqrt": ("SQRT", None),
    "square": ("SQUARE", None),
    "tanh": ("TANH", None),
}


def _scalar(value: float) -> Value:
    return Value((), (), -1, None, np.asarray(value, np.float32), "scalar")


def _binary(lowering: Lowering, kind: str, a: Value, b: Value, out: Out = _REAL) -> Value:
    """An operator on two values, broadcast with each other."""
    if a.rank and b.rank:
        a, b = lowering.aligned([a, b])
    large = a if a.rank >= b.rank else b
    shape = tuple(
        x if not isinstance(y, FreeSize) and y == 1 else y
        for x, y in zip(a.shape or (1,) * large.rank, b.shape or (1,) * large.rank)
    )
    like = Value(shape, large.order)
    return lowering.emit(kind, [a, b], like, out, _TABLES[kind], fuses=kind in {"ADD", "MUL"})


def _unary(
    lowering: Lowering, kind: str, x: Value, table: str | None = None, **options: Any
) -> Value:
    return lowering.emit(kind, [x], x, _REAL, table, **options)


def _operand(lowering: Lowering, argument: Any, out: Out) -> Value:
    if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
        return lowering.input(argument, out)
    return _scalar(float(lowering.number(argument)))


@lowers(*(f"aten.{name}" for name in _BINARY), into=(FLOATS,))
@lowers("aten.add.Tensor", "aten.mul.Tensor", into=(INTEGERS,))
def _elementwise(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = _arguments(node)
    kind = _BINARY[str(node.target).removeprefix("aten.")]
    a, b = (_operand(lowering, argument, out) for argument in node.args[:2])
    if arguments.get("alpha", 1) != 1:
        b = _binary(lowering, "MUL", b, _scalar(arguments["alpha"]))
    return _binary(lowering, kind, a, b, out)


def _both_codes(lowering: Lowering, node: fx.Node) -> bool:
    """An operator on two tensors of codes, without a factor."""
    scaled = node.kwargs.get("alpha") not in (None, 1)
    return not scaled and all(x in lowering.codes for x in node.args[:2])


for _name in ("aten.add.Tensor", "aten.mul.Tensor"):
    CONDITIONS[_name] = _both_codes


@lowers(*(f"aten.{name}.default" for name in _UNARY), into=(FLOATS,))
def _function(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    kind, table = _UNARY[str(node.target).split(".")[1]]
    return _unary(lowering, kind, lowering.real(node.args[0]), table)


@lowers("aten.gelu.default", "aten.leaky_relu.default", into=(FLOATS,))
def _function_with_option(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, arguments = lowering.real(node.args[0]), _arguments(node)
    if "approximate" in arguments:
        tanh = arguments["approximate"] == "tanh"
        return _unary(lowering, "GELU", x, "GeluOptions", Approximate=tanh)
    slope = arguments["negative_slope"]
    return _unary(lowering, "LEAKY_RELU", x, "LeakyReluOptions", Alpha=slope)


@lowers("aten.silu.default", into=(FLOATS,))
def _silu(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.real(node.args[0])
    return _binary(lowering, "MUL", x, _unary(lowering, "LOGISTIC", x))


@lowers("aten.hardsigmoid.default", into=(FLOATS,))
def _hardsigmoid(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.real(node.args[0])
    x = _unary(lowering, "RELU6", _binary(lowering, "ADD", x, _scalar(3.0)))
    return _binary(lowering, "MUL", x, _scalar(1 / 6))


@lowers(
    "aten.relu.default",
    "aten.relu6.default",
    "aten.hardtanh.default",
    "aten.clamp.default",
    "aten.clamp_min.default",
    "aten.clamp_max.default",
    into=(FLOATS,),
)
def _clip(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, bounds = lowering.real(node.args[0]), clip_bounds(node)
    assert bounds is not None
    if bounds in ((0.0, None), (0.0, 6.0)):
        return _unary(lowering, "RELU" if bounds[1] is None else "RELU6", x)
    for kind, bound in zip(("MAXIMUM", "MINIMUM"), bounds):
        if bound is not None:
            x = _binary(lowering, kind, x, _scalar(bound))
    return x


@lowers("aten.pow.Tensor_Scalar", into=(FLOATS,))
def _power(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, exponent = lowering.real(node.args[0]), node.args[1]
    if exponent == 2:
        return _binary(lowering, "MUL", x, x)
    index = lowering.model.constant("exponent", np.asarray(exponent, np.float32))
    return lowering.emit("POW", [x, index], x, _REAL, "PowOptions")


@lowers("aten.cat.default", into=(FLOATS, INTEGERS))
def _concatenate(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = _arguments(node)
    sources: Sequence[Any] = arguments["tensors"]
    shape = lowering.shape(node)
    dim = arguments["dim"] % len(shape)
    values = [lowering.input(source, out) for source in sources]
    if out.quantization is not None:  # TFLite only copies
        free = Out(out.quantization)
        values = [
            value if value.quantization == out.quantization else lowering.rescaled(value, free)
            for value in values
        ]
    first = next((value for value in values if value.array is None), values[0])
    values = [lowering.stored_as(value, first.order) for value in values]
    like = Value(shape, first.order)
    table = "ConcatenationOptions"
    axis = like.axis(dim)
    return lowering.emit("CONCATENATION", values, like, out, table, fuses=True, Axis=axis)


# Moved values


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


def _permuted(x: Value, dims: Sequence[int]) -> Value:
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
        return _permuted(x, cast(Sequence[int], node.args[1]))
    dims = list(range(x.rank))
    a, b = cast(tuple[int, int], node.args[1:3] or (0, 1))
    dims[a], dims[b] = dims[b], dims[a]
    return _permuted(x, dims)


@lowers("aten.channel_shuffle.default", into=(MOVERS,))
def _channel_shuffle(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, groups = lowering.value(node.args[0]), cast(int, node.args[1])
    rest = range(3, x.rank + 1)
    split = lowering.reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    return lowering.reshape(_permuted(split, (0, 2, 1, *rest)), x.shape)


@lowers("aten.pixel_shuffle.default", "aten.pixel_unshuffle.default", into=(MOVERS,))
def _pixel_shuffle(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, r = lowering.value(node.args[0]), cast(int, node.args[1])
    n, c, h, w = x.shape
    if "unshuffle" in str(node.target):
        x = lowering.reshape(x, (n, c, h // r, r, w // r, r))
        x = _permuted(x, (0, 1, 3, 5, 2, 4))
    else:
        x = lowering.reshape(x, (n, c // (r * r), r, r, h, w))
        x = _permuted(x, (0, 1, 4, 2, 5, 3))
    return lowering.reshape(x, lowering.shape(node))


def _cut(lowering: Lowering, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
    """Elements of a dimension from start up to end."""
    dim %= x.rank
    shape = tuple(
        len(range(start, end, step)) if d == dim else size for d, size in enumerate(x.shape)
    )
    if shape == x.shape:
        return x
    if x.array is not None:
        part = x.array[(slice(None),) * dim + (slice(start, end, step),)]
        return replace(x, shape=shape, array=part)
    axis = x.axis(dim)
    others = sum(1 << other for other in range(x.rank) if other != axis)
    numbers = []
    for name, value, default in (("begin", start, 0), ("end", end, 0), ("steps", step, 1)):
        values = np.full(x.rank, default, np.int32)
        values[axis] = value
        numbers.append(lowering.model.constant(name, values))
    like, table = replace(x, shape=shape), "StridedSliceOptions"
    masks: dict[str, Any] = {"BeginMask": others, "EndMask": others}
    return lowering.emit("STRIDED_SLICE", [x, *numbers], like, Out(x.quantization), table, **masks)


def _bound(value: Any, size: int, default: int) -> int:
    if value is None:
        return default
    return min(max(value + size if value < 0 else value, 0), size)


@lowers("aten.slice.Tensor", into=(MOVERS,))
def _slice(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, arguments = lowering.value(node.args[0]), _arguments(node)
    dim = arguments["dim"] % x.rank
    size = x.shape[dim]
    start, end = (lowering.number(arguments[key]) for key in ("start", "end"))
    start, end = _bound(start, size, 0), _bound(end, size, size)
    if isinstance(size, FreeSize) and (start, end) != (0, size):
        lowering.need_fixed(node, x.shape)
    return _cut(lowering, x, dim, start, end, arguments["step"])


@lowers("aten.select.int", into=(MOVERS,))
def _select(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.value(node.args[0])
    dim, index = (lowering.number(argument) for argument in node.args[1:3])
    dim %= x.rank
    if isinstance(x.shape[dim], FreeSize):
        lowering.need_fixed(node, x.shape)
    index = index + x.shape[dim] if index < 0 else index
    part = _cut(lowering, x, dim, index, index + 1)
    return lowering.reshape(part, lowering.shape(node))


@lowers("<built-in function getitem>", into=(MOVERS,))
def _part(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    """A part of what was cut."""
    cut, number = cast(tuple[fx.Node, int], node.args)
    target = str(cut.target)
    if target not in {"aten.chunk.default", "aten.split.Tensor", "aten.split_with_sizes.default"}:
        raise lowering.unsupported(cut, "TFLite has no such operator")
    arguments = _arguments(cut)
    dim = arguments["dim"]
    sizes = [lowering.sizes(part.shape)[dim] for part in cut.meta["val"]]
    start = sum(sizes[:number])
    return _cut(lowering, lowering.value(cut.args[0]), dim, start, start + sizes[number])


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
    x, arguments = lowering.value(node.args[0]), _arguments(node)
    sides = [(0, 0)] * x.rank
    numbers = [lowering.number(number) for number in arguments["pad"]]
    for index in range(len(numbers) // 2):
        sides[x.rank - 1 - index] = (numbers[2 * index], numbers[2 * index + 1])
    mode = arguments.get("mode", "constant")
    for dim, (before, after) in enumerate(sides):
        if before < 0 or after < 0:
            size = x.shape[dim]
            x = _cut(lowering, x, dim, max(-before, 0), size - max(-after, 0))
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


# Products of matrices and normalization


def _product(
    lowering: Lowering, a: Value, b: Value, shape: Sequence[int], out: Out = _REAL
) -> Value:
    """The product of matrices in the last two dimensions."""
    swapped = (*range(b.rank - 2), b.rank - 1, b.rank - 2)
    turned = b.array is None and b.order == swapped
    b = b if turned else lowering.plain(b)
    like = Value(tuple(shape), tuple(range(len(shape))))
    inputs = [lowering.plain(a), b]
    return lowering.emit("BATCH_MATMUL", inputs, like, out, "BatchMatMulOptions", AdjY=turned)


@lowers("aten.matmul.default", "aten.bmm.default", "aten.mm.default", into=(FLOATS, INTEGERS))
def _matmul(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    a, b = (lowering.input(argument, out) for argument in node.args[:2])
    if min(a.rank, b.rank) < 2:
        raise lowering.unsupported(node, "TFLite multiplies matrices, not vectors")
    return _product(lowering, a, b, lowering.shape(node), out)


for _name in ("matmul", "bmm", "mm"):
    CONDITIONS[f"aten.{_name}.default"] = _both_codes


def softmax(lowering: Lowering, x: Value, dim: int) -> Value:
    """Softmax along a dimension, in float."""
    dim %= x.rank
    if x.order[-1] != dim:
        x = lowering.stored_as(x, [*(d for d in x.order if d != dim), dim])
    return lowering.emit("SOFTMAX", [x], x, _REAL, "SoftmaxOptions", Beta=1.0)


@lowers("aten.softmax.int", "aten._softmax.default", into=(FLOATS,))
def _softmax(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    return softmax(lowering, lowering.real(node.args[0]), cast(int, node.args[1]))


@lowers("aten.layer_norm.default", into=(FLOATS,))
def _layer_norm(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = _arguments(node)
    x = lowering.real(node.args[0])
    dims = range(x.rank - len(arguments["normalized_shape"]), x.rank)
    centred = _binary(lowering, "SUB", x, mean(lowering, x, dims, True, _REAL))
    variance = mean(lowering, _binary(lowering, "MUL", centred, centred), dims, True, _REAL)
    inverse = _unary(
        lowering, "RSQRT", _binary(lowering, "ADD", variance, _scalar(arguments["eps"]))
    )
    value = _binary(lowering, "MUL", centred, inverse)
    for kind, key in (("MUL", "weight"), ("ADD", "bias")):
        if arguments[key] is not None:
            value = _binary(lowering, kind, value, lowering.real(arguments[key]))
    return value


@lowers("aten.batch_norm.default", into=(FLOATS,))
def _batch_norm(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = _arguments(node)
    x = lowering.real(node.args[0])
    mean_of, variance = (
        lowering.real(arguments[f"running_{key}"]).array for key in ("mean", "var")
    )
    assert mean_of is not None
    assert variance is not None
    factor = 1 / np.sqrt(variance.astype(np.float64) + arguments["eps"])
    offset = -mean_of * factor
    for key in ("weight", "bias"):
        value = None if arguments[key] is None else lowering.real(arguments[key]).array
        if value is not None and key == "weight":
            factor, offset = factor * value, offset * value
        elif value is not None:
            offset = offset + value
    shape = (-1,) + (1,) * (x.rank - 2)
    for kind, numbers in (("MUL", factor), ("ADD", offset)):
        array = numbers.reshape(shape).astype(np.float32)
        constant = Value(array.shape, tuple(range(array.ndim)), -1, None, array, "batch_norm")
        x = _binary(lowering, kind, x, constant)
    return x


@lowers("aten.scaled_dot_product_attention.default", into=(FLOATS,))
def _attention(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = _arguments(node)
    if arguments["enable_gqa"]:
        raise lowering.unsupported(node, "grouped queries have no TFLite operator")
    q, k, v = (lowering.real(argument) for argument in node.args[:3])
    scale = arguments["scale"] or 1 / math.sqrt(q.shape[-1])
    q = _binary(lowering, "MUL", q, _scalar(scale))
    keys = _permuted(lowering.plain(k), (*range(k.rank - 2), k.rank - 1, k.rank - 2))
    scores = _product(lowering, q, keys, (*q.shape[:-1], k.shape[-2]))
    mask = arguments["attn_mask"]
    if arguments["is_causal"]:
        future = torch.full((q.shape[-2], k.shape[-2]), -1e9).triu(1).numpy()
        scores = _binary(lowering, "ADD", scores, Value(future.shape, (0, 1), -1, None, future))
    elif mask is not None:
        value = lowering.value(mask)
        if value.array is not None and value.array.dtype == np.bool_:
            array = np.where(value.array, np.float32(0), np.float32(-1e9))
            value = replace(value, array=array)
        scores = _binary(lowering, "ADD", scores, value)
    return _product(lowering, softmax(lowering, scores, -1), v, lowering.shape(node))
