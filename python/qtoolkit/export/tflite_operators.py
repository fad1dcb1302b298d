"""Operators on elements, products of matrices and normalization in TFLite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import fx

from qtoolkit.export.tflite_graph import Lowering, kind_of
from qtoolkit.export.tflite_movers import permuted
from qtoolkit.export.tflite_program import CONDITIONS, FLOATS, INTEGERS, clip_bounds, lowers
from qtoolkit.export.tflite_values import FLOAT, Out, Value, is_unit
from qtoolkit.export.tflite_windows import arguments_of, mean, reduce

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
    "elu": ("ELU", None),
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


def _binary(lowering: Lowering, kind: str, a: Value, b: Value, out: Out = FLOAT) -> Value:
    """An operator on two values, broadcast with each other."""
    if a.rank and b.rank:
        a, b = lowering.aligned([a, b])
    large = a if a.rank >= b.rank else b
    shape = tuple(
        x if is_unit(y) else y
        for x, y in zip(a.shape or (1,) * large.rank, b.shape or (1,) * large.rank)
    )
    like = Value(shape, large.order)
    return lowering.emit(kind, [a, b], like, out, _TABLES[kind], fuses=kind in {"ADD", "MUL"})


def _unary(
    lowering: Lowering, kind: str, x: Value, table: str | None = None, **options: Any
) -> Value:
    return lowering.emit(kind, [x], x, FLOAT, table, **options)


def _operand(lowering: Lowering, argument: Any, out: Out) -> Value:
    if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
        return lowering.input(argument, out)
    return _scalar(float(lowering.number(argument)))


@lowers(*(f"aten.{name}" for name in _BINARY), into=(FLOATS,))
@lowers("aten.add.Tensor", "aten.mul.Tensor", into=(INTEGERS,))
def _elementwise(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
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
    if any(arguments_of(node).get(key, 1) != 1 for key in ("alpha", "scale", "input_scale")):
        raise lowering.unsupported(node, "TFLite has it with the scales of one only")
    kind, table = _UNARY[str(node.target).split(".")[1]]
    return _unary(lowering, kind, lowering.real(node.args[0]), table)


@lowers("aten.gelu.default", into=(FLOATS, INTEGERS))
def _gelu(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    """GELU, which runtimes compute on codes by a table of their own."""
    x, tanh = lowering.input(node.args[0], out), arguments_of(node)["approximate"] == "tanh"
    return lowering.emit("GELU", [x], x, out, "GeluOptions", Approximate=tanh)


@lowers("aten.leaky_relu.default", into=(FLOATS,))
def _leaky_relu(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    slope = arguments_of(node)["negative_slope"]
    return _unary(
        lowering, "LEAKY_RELU", lowering.real(node.args[0]), "LeakyReluOptions", Alpha=slope
    )


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
    return lowering.emit("POW", [x, index], x, FLOAT, "PowOptions")


@lowers("aten.cat.default", into=(FLOATS, INTEGERS))
def _concatenate(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
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


@lowers("aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default", into=(FLOATS,))
def _reduce(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    kinds = {"sum": "SUM", "amax": "REDUCE_MAX", "amin": "REDUCE_MIN"}
    x, arguments = lowering.real(node.args[0]), arguments_of(node)
    kind = kinds[str(node.target).split(".")[1]]
    return reduce(lowering, kind, x, arguments["dim"], bool(arguments["keepdim"]), out)


@lowers("aten.argmax.default", into=(FLOATS,))
def _argmax(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x, arguments = lowering.value(node.args[0]), arguments_of(node)
    if arguments["dim"] is None:
        raise lowering.unsupported(node, "TFLite finds the largest along a dimension only")
    dim = arguments["dim"] % x.rank
    axis = lowering.model.constant("axis", np.asarray(x.axis(dim), np.int32))
    kept = [d for d in range(x.rank) if d != dim]
    like = Value(tuple(x.shape[d] for d in kept), tuple(kept.index(d) for d in x.order if d != dim))
    options: dict[str, Any] = {"OutputType": kind_of("INT64")}
    table = "ArgMaxOptions"
    value = lowering.emit("ARG_MAX", [x, axis], like, out, table, dtype=np.int64, **options)
    return lowering.reshape(value, lowering.shape(node))


@lowers("aten.embedding.default", into=(FLOATS,))
def _embedding(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    weight, index = lowering.real(node.args[0]), lowering.plain(lowering.value(node.args[1]))
    shape = lowering.shape(node)
    like = Value(shape, tuple(range(len(shape))))
    return lowering.emit("GATHER", [weight, index], like, out, "GatherOptions", Axis=0)


# Products of matrices and normalization


def _product(
    lowering: Lowering, a: Value, b: Value, shape: Sequence[int], out: Out = FLOAT
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
    return lowering.emit("SOFTMAX", [x], x, FLOAT, "SoftmaxOptions", Beta=1.0)


@lowers("aten.softmax.int", "aten._softmax.default", into=(FLOATS,))
def _softmax(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    return softmax(lowering, lowering.real(node.args[0]), cast(int, node.args[1]))


def _normalized(lowering: Lowering, x: Value, dims: Sequence[int], eps: float) -> Value:
    """Numbers less their mean over dimensions, divided by their deviation."""
    centred = _binary(lowering, "SUB", x, mean(lowering, x, dims, True, FLOAT))
    variance = mean(lowering, _binary(lowering, "MUL", centred, centred), dims, True, FLOAT)
    inverse = _unary(lowering, "RSQRT", _binary(lowering, "ADD", variance, _scalar(eps)))
    return _binary(lowering, "MUL", centred, inverse)


@lowers("aten.group_norm.default", into=(FLOATS,))
def _group_norm(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    x, groups = lowering.real(node.args[0]), arguments["num_groups"]
    split = lowering.reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    value = _normalized(lowering, split, range(2, split.rank), arguments["eps"])
    value = lowering.reshape(value, x.shape)
    for kind, key in (("MUL", "weight"), ("ADD", "bias")):
        if arguments[key] is not None:
            factor = lowering.real(arguments[key])
            factor = lowering.reshape(factor, (x.shape[1], *(1,) * (x.rank - 2)))
            value = _binary(lowering, kind, value, factor)
    return value


@lowers("aten.layer_norm.default", into=(FLOATS,))
def _layer_norm(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    x = lowering.real(node.args[0])
    dims = range(x.rank - len(arguments["normalized_shape"]), x.rank)
    value = _normalized(lowering, x, dims, arguments["eps"])
    for kind, key in (("MUL", "weight"), ("ADD", "bias")):
        if arguments[key] is not None:
            value = _binary(lowering, kind, value, lowering.real(arguments[key]))
    return value


@lowers("aten.batch_norm.default", into=(FLOATS,))
def _batch_norm(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
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
    arguments = arguments_of(node)
    if arguments["enable_gqa"]:
        raise lowering.unsupported(node, "grouped queries have no TFLite operator")
    q, k, v = (lowering.real(argument) for argument in node.args[:3])
    scale = arguments["scale"] or 1 / math.sqrt(q.shape[-1])
    q = _binary(lowering, "MUL", q, _scalar(scale))
    keys = permuted(lowering.plain(k), (*range(k.rank - 2), k.rank - 1, k.rank - 2))
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
