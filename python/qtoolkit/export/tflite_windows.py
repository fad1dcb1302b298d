"""Padding, pools and resizing in TFLite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.nn import functional

from qtoolkit.export.tflite_flatbuffer import Quantization
from qtoolkit.export.tflite_graph import Lowering
from qtoolkit.export.tflite_program import CONDITIONS, FLOATS, INTEGERS, MOVERS, lowers
from qtoolkit.export.tflite_values import FLOAT, LOWEST, NHWC, ONE, Out, Value

SAME, VALID = 0, 1


def pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1]) if len(value) else (0, 0)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by name, with defaults."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    values = {argument.name: argument.default_value for argument in schema}
    values.update({argument.name: value for argument, value in zip(schema, node.args)})
    return values | dict(node.kwargs)


def _starts(size: int, kernel: int, stride: int, before: int, result: int) -> tuple[bool, int]:
    """Whether TFLite's padding SAME is that of PyTorch along a dimension; else how much is missing
    at the end."""
    total = max((result - 1) * stride + kernel - size, 0)
    same = result == math.ceil(size / stride) and total // 2 == before
    return same, max(total - before, 0)


def pad_for_windows(
    lowering: Lowering,
    x: Value,
    result: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    before: Sequence[int],
    *,
    lowest: bool = False,
) -> tuple[Value, int]:
    """The input of an operator on windows, and the padding that the operator does itself.

    PyTorch pads equally at both ends; TFLite's SAME pads one more at the end than at the start if
    that is enough. Where they differ an operator pads, with zero or the lowest code.

    Args:
        lowering: where it is added.
        x: of PyTorch's shape [N, C, H, W], stored as [N, H, W, C].
        result: height and width of the result.
        kernel: height and width of a window, dilation included.
        stride: in both directions.
        before: the padding at the top and at the left.
        lowest: pad with the lowest number.
    """
    found = [_starts(*numbers) for numbers in zip(x.shape[2:], kernel, stride, before, result)]
    if all(same for same, _ in found):
        return x, SAME
    ends = [end for _, end in found]
    if not any(before) and not any(ends):
        return x, VALID
    sides = [(0, 0), (0, 0), (before[0], ends[0]), (before[1], ends[1])]
    return pad(lowering, x, sides, lowest=lowest), VALID


def pad(
    lowering: Lowering, x: Value, sides: Sequence[tuple[int, int]], *, lowest: bool = False
) -> Value:
    """Pads dimensions of PyTorch's with zero, or with the lowest number."""
    shape = tuple(size + sum(side) if any(side) else size for size, side in zip(x.shape, sides))
    widths = np.asarray([sides[dim] for dim in x.order], np.int32)
    paddings = lowering.model.constant("paddings", widths)
    like, out = replace(x, shape=shape), Out(x.quantization)
    if not lowest or (x.quantization is not None and x.quantization.zero_point == LOWEST):
        return lowering.emit("PAD", [x, paddings], like, out, "PadOptions")
    value = np.full(1, LOWEST, np.int8)
    if x.quantization is None:
        value = np.full(1, np.finfo(np.float32).min, np.float32)
    fill = lowering.model.constant("lowest", value, x.quantization)
    return lowering.emit("PADV2", [x, paddings, fill], like, out, "PadV2Options")


@lowers("aten.max_pool2d.default", into=(MOVERS,))
def _max_pool(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    if pair(arguments["dilation"]) != (1, 1):
        raise lowering.unsupported(node, "TFLite's max pool has no dilation")
    x = lowering.stored_as(lowering.value(node.args[0]), NHWC)
    kernel = pair(arguments["kernel_size"])
    stride = pair(arguments["stride"] or kernel)
    like = replace(x, shape=lowering.shape(node))
    before = pair(arguments["padding"])
    x, mode = pad_for_windows(lowering, x, like.shape[2:], kernel, stride, before, lowest=True)
    return lowering.emit(
        "MAX_POOL_2D",
        [x],
        like,
        Out(x.quantization),
        "Pool2DOptions",
        fuses=True,
        Padding=mode,
        StrideH=stride[0],
        StrideW=stride[1],
        FilterHeight=kernel[0],
        FilterWidth=kernel[1],
    )


def _windows(lowering: Lowering, node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Kernel, stride and padding of an average pool whose windows all have the same count; None of
    another one."""
    shape, result = lowering.shape(node.args[0]), lowering.shape(node)  # type: ignore[arg-type]
    arguments = arguments_of(node)
    if "output_size" in arguments:
        if any(size % count for size, count in zip(shape[-2:], result[-2:])):
            return None
        kernel = (shape[-2] // result[-2], shape[-1] // result[-1])
        return kernel, kernel, (0, 0)
    kernel = pair(arguments["kernel_size"])
    stride, padding = pair(arguments["stride"] or kernel), pair(arguments["padding"])
    if any(padding) and not arguments["count_include_pad"]:
        return None
    fits = all(
        (count - 1) * step + window <= size + 2 * side
        for size, count, step, window, side in zip(shape[-2:], result[-2:], stride, kernel, padding)
    )
    return (kernel, stride, padding) if fits else None


def _mean_of_windows(lowering: Lowering, node: fx.Node) -> bool:
    return node.args[0] in lowering.codes and _windows(lowering, node) is not None


@lowers("aten.avg_pool2d.default", "aten.adaptive_avg_pool2d.default", into=(FLOATS, INTEGERS))
def _average_pool(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.stored_as(lowering.input(node.args[0], out), NHWC)
    like = Value(lowering.shape(node), NHWC)
    windows = _windows(lowering, node)
    if windows is None:
        return linear_map(lowering, node, x)
    if windows == ((1, 1), (1, 1), (0, 0)) and out.quantization is None:
        return x
    if like.shape[2:] == (1, 1) and windows[0] == x.shape[2:]:
        return mean(lowering, x, [2, 3], True, out)
    kernel, stride, before = windows
    x, mode = pad_for_windows(lowering, x, like.shape[2:], kernel, stride, before)
    # A convolution with one weight divides by any number, and gives codes of any scale. LiteRT's
    # own kernels round twice, which shows least where sums are large: so 1 has the code 127.
    channels, count = x.shape[1], math.prod(kernel)
    count = arguments_of(node).get("divisor_override") or count
    ones = np.full((1, *kernel, channels), ONE, np.int8)
    weight = Quantization((1.0 / count / ONE,) * channels, 0, 3)
    if out.quantization is None:
        filled = lowering.model.constant("ones", np.full(ones.shape, 1 / count, np.float32))
        bias = lowering.model.constant("zeros", np.zeros(channels, np.float32))
    else:
        assert x.quantization is not None
        scales = tuple(scale * x.quantization.scale[0] for scale in weight.scale)
        filled = lowering.model.constant("ones", ones, weight)
        bias = lowering.model.constant("zeros", np.zeros(channels, np.int32), Quantization(scales))
    return lowering.emit(
        "DEPTHWISE_CONV_2D",
        [x, filled, bias],
        like,
        out,
        "DepthwiseConv2DOptions",
        fuses=True,
        Padding=mode,
        StrideH=stride[0],
        StrideW=stride[1],
        DepthMultiplier=1,
        DilationHFactor=1,
        DilationWFactor=1,
    )


for _name in ("avg_pool2d.default", "adaptive_avg_pool2d.default"):
    CONDITIONS[f"aten.{_name}"] = _mean_of_windows


def reduce(
    lowering: Lowering, kind: str, x: Value, dims: Sequence[int], keepdim: bool, out: Out
) -> Value:
    """A sum, mean or extreme over dimensions of PyTorch's."""
    dims = [dim % x.rank for dim in dims]
    axes = np.asarray(sorted(x.axis(dim) for dim in dims), np.int32)
    axis = lowering.model.constant("axes", axes)
    if keepdim:
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
        like = Value(shape, x.order)
    else:
        kept = [dim for dim in range(x.rank) if dim not in dims]
        order = tuple(kept.index(dim) for dim in x.order if dim in kept)
        like = Value(tuple(x.shape[dim] for dim in kept), order)
    return lowering.emit(kind, [x, axis], like, out, "ReducerOptions", KeepDims=keepdim)


def mean(lowering: Lowering, x: Value, dims: Sequence[int], keepdim: bool, out: Out) -> Value:
    """The mean over dimensions of PyTorch's."""
    lowering.coarse.add(out.name)
    return reduce(lowering, "MEAN", x, dims, keepdim, out)


@lowers("aten.mean.dim", into=(FLOATS, INTEGERS))
def _mean(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    x = lowering.input(node.args[0], out)
    dims = arguments["dim"] or range(x.rank)
    return mean(lowering, x, dims, bool(arguments["keepdim"]), out)


def linear_map(lowering: Lowering, node: fx.Node, x: Value) -> Value:
    """A float operator that gives each pixel of its result as a weighted sum of pixels, channel by
    channel, as a product of matrices."""
    x = lowering.stored_as(lowering.dequantized(x), NHWC)
    result, (height, width) = lowering.shape(node), x.shape[2:]
    pixels, found = height * width, result[2] * result[3]
    if pixels * found > 2**22:
        raise lowering.unsupported(node, "TFLite has no such operator")
    basis = torch.eye(pixels).reshape(1, pixels, height, width)
    matrix = node.target(basis, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    rows = matrix.reshape(pixels, found).t().contiguous().numpy()
    constant = lowering.model.constant("pixels", rows[None])
    flat = lowering.reshape(x, (*x.shape[:2], pixels))
    flat = lowering.stored_as(flat, (0, 2, 1))
    like = Value((*result[:2], found), (0, 2, 1))
    value = lowering.emit("BATCH_MATMUL", [constant, flat], like, FLOAT, "BatchMatMulOptions")
    return lowering.reshape(value, result)


@lowers("aten.upsample_bilinear2d.vec", into=(FLOATS,))
def _bilinear(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    x = lowering.stored_as(lowering.real(node.args[0]), NHWC)
    result = lowering.shape(node)
    factors = arguments["scale_factors"]
    exact = not factors or all(
        math.isclose(factor * size, count) for factor, size, count in
        zip(factors, x.shape[2:], result[2:])
    )  # fmt: skip
    if not exact and not arguments["align_corners"]:
        return linear_map(lowering, node, x)
    size = lowering.model.constant("size", np.asarray(result[2:], np.int32))
    corners = bool(arguments["align_corners"])
    return lowering.emit(
        "RESIZE_BILINEAR",
        [x, size],
        Value(result, NHWC),
        out,
        "ResizeBilinearOptions",
        AlignCorners=corners,
        HalfPixelCenters=not corners,
    )


@lowers("aten.upsample_nearest2d.vec", "aten._upsample_nearest_exact2d.vec", into=(MOVERS,))
def _nearest(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    """Rows and columns that are taken, as PyTorch computes them."""
    x, result = lowering.value(node.args[0]), lowering.shape(node)
    mode = "nearest-exact" if "exact" in str(node.target) else "nearest"
    factors = arguments_of(node)["scale_factors"]
    for dim in (2, 3):
        places = torch.arange(x.shape[dim], dtype=torch.float32).reshape(1, 1, -1)
        options: dict[str, Any] = {"scale_factor": factors[dim - 2]} if factors else {}
        if not factors:
            options["size"] = int(result[dim])
        found = functional.interpolate(places, mode=mode, **options).reshape(-1)
        x = take(lowering, x, dim, found.to(torch.int32))
    return x


def take(lowering: Lowering, x: Value, dim: int, indices: Tensor) -> Value:
    """Elements of a dimension by constant indices."""
    index = lowering.model.constant("indices", indices.to(torch.int32).numpy())
    shape = tuple(len(indices) if d == dim else size for d, size in enumerate(x.shape))
    like, out = replace(x, shape=shape), Out(x.quantization)
    return lowering.emit("GATHER", [x, index], like, out, "GatherOptions", Axis=x.axis(dim))


def cut(lowering: Lowering, x: Value, dim: int, start: int, end: int, step: int = 1) -> Value:
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
