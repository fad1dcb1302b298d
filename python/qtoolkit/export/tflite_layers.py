"""Convolutions and linear layers in TFLite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from qtoolkit.export.tflite_flatbuffer import Quantization
from qtoolkit.export.tflite_graph import Lowering
from qtoolkit.export.tflite_program import CONDITIONS, FLOATS, INTEGERS, lowers
from qtoolkit.export.tflite_values import FLOAT, NHWC, Out, Value, Weight
from qtoolkit.export.tflite_windows import VALID, arguments_of, cut, pad_for_windows, pair


def _on_codes(lowering: Lowering, node: fx.Node) -> bool:
    """A layer on codes with a weight of codes."""
    return node.args[0] in lowering.codes and lowering.is_weight(node.args[1])


def _parameters(
    lowering: Lowering,
    node: fx.Node,
    x: Value,
    weight: Value | Weight,
    bias: Value | Weight | None,
    axes: Sequence[int],
    axis: int,
    out: Out,
    stored: Sequence[int] | None = None,
) -> list[Value | int]:
    """The weight and the bias of a layer.

    Args:
        lowering: where they are added.
        node: the layer.
        x: its input.
        weight: in PyTorch's layout.
        bias: None is zero.
        axes: the order of the weight's dimensions in TFLite.
        axis: the dimension of output channels there.
        out: what the layer writes; codes where its input is codes.
        stored: the weight's shape in TFLite, if it has more dimensions than in PyTorch.
    """
    place = lowering.place(node)
    name = lowering.free_name(f"{place}.weight")
    codes = weight.codes if isinstance(weight, Weight) else torch.from_numpy(weight.array)
    laid_out = codes.permute(*axes)
    array = laid_out.reshape(*(stored or laid_out.shape)).contiguous().numpy()
    channels = array.shape[axis]
    tensor: Value | int
    if not isinstance(weight, Weight):
        tensor = lowering.model.constant(name, array)
    else:
        if int(codes.min()) < -127:
            raise lowering.unsupported(node, "TFLite's weights have codes in [-127, 127]")
        quantization = Quantization(weight.scales(channels), 0, axis)
        tensor = lowering.model.constant(name, array, quantization)
        if out.quantization is None:
            like = Value(array.shape, tuple(range(array.ndim)))
            tensor = lowering.emit("DEQUANTIZE", [tensor], like, FLOAT, name=f"{name}.real")
    name = lowering.free_name(f"{place}.bias")
    if out.quantization is None:
        numbers = _numbers(bias, channels).astype(np.float32)
        return [tensor, lowering.model.constant(name, numbers)]
    assert x.quantization is not None
    assert isinstance(weight, Weight)
    scales = np.asarray(weight.scales(channels)) * x.quantization.scale[0]
    if isinstance(bias, Weight):
        steps = bias.codes.to(torch.int32).numpy()
    else:
        steps = np.rint(_numbers(bias, channels) / scales).astype(np.int32)
    return [tensor, lowering.model.constant(name, steps, Quantization(tuple(scales.tolist())))]


def _numbers(value: Value | Weight | None, channels: int) -> NDArray[np.float64]:
    """A bias in float; zeros where there is none."""
    if value is None:
        return np.zeros(channels)
    array = value.real().numpy() if isinstance(value, Weight) else value.array
    assert array is not None
    return array.astype(np.float64)


def _weights(lowering: Lowering, node: fx.Node) -> tuple[Value | Weight, Value | Weight | None]:
    """Weight and bias of a layer, which must be constants."""
    found = [lowering.operand(a) for a in (*node.args[1:3], None)[:2] if a is not None]
    if any(isinstance(value, Value) and value.array is None for value in found):
        raise lowering.unsupported(node, "its weight is computed, and TFLite's is a constant")
    return found[0], found[1] if len(found) > 1 else None


@lowers(
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.conv1d.default",
    "aten.conv1d.padding",
    into=(FLOATS, INTEGERS),
)
def _conv(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    arguments = arguments_of(node)
    x = lowering.input(node.args[0], out)
    result = lowering.shape(node)
    flat = x.rank == 3  # a line is an image of height 1
    if flat:
        x = lowering.reshape(x, (*x.shape[:2], 1, x.shape[2]))
    x = lowering.stored_as(x, NHWC)
    weight, bias = _weights(lowering, node)
    shape = list(weight.codes.shape if isinstance(weight, Weight) else weight.shape)
    if flat:
        shape.insert(2, 1)
    stride, dilation = pair(arguments["stride"]), pair(arguments["dilation"])
    spread = [(k - 1) * d + 1 for k, d in zip(shape[2:], dilation)]
    padding = arguments["padding"]
    if padding == "valid":
        before = (0, 0)
    elif padding == "same":
        before = ((spread[0] - 1) // 2, (spread[1] - 1) // 2)
    else:
        before = pair(padding)
    if flat:
        stride, dilation, before = (1, stride[1]), (1, dilation[1]), (0, before[1])
    like = Value((*result[:2], 1, result[2]) if flat else result, NHWC)
    x, mode = pad_for_windows(lowering, x, like.shape[2:], spread, stride, before)
    groups, channels = arguments["groups"], shape[0]
    options: dict[str, Any] = {
        "Padding": mode,
        "StrideH": stride[0],
        "StrideW": stride[1],
        "DilationHFactor": dilation[0],
        "DilationWFactor": dilation[1],
    }
    axes = (0, 2, 1) if flat else (0, 2, 3, 1)
    if groups > 1 and groups == x.shape[1]:
        stored = (1, shape[2], shape[3], channels)
        axes = (1, 2, 0) if flat else (1, 2, 3, 0)
        parameters = _parameters(lowering, node, x, weight, bias, axes, 3, out, stored)
        kind, table = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        options["DepthMultiplier"] = channels // groups
    else:
        stored = (channels, shape[2], shape[3], shape[1])
        parameters = _parameters(lowering, node, x, weight, bias, axes, 0, out, stored)
        kind, table = "CONV_2D", "Conv2DOptions"
    value = lowering.emit(kind, [x, *parameters], like, out, table, fuses=True, **options)
    return lowering.reshape(value, result) if flat else value


@lowers("aten.linear.default", into=(FLOATS, INTEGERS))
def _linear(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    x = lowering.input(node.args[0], out)
    if x.order[-1] != x.rank - 1:
        x = lowering.plain(x)
    result = lowering.shape(node)
    parameters = _parameters(lowering, node, x, *_weights(lowering, node), (0, 1), 0, out)
    return lowering.emit(
        "FULLY_CONNECTED",
        [x, *parameters],
        Value(result, x.order),
        out,
        "FullyConnectedOptions",
        fuses=True,
        KeepNumDims=x.rank != 2,
    )


@lowers("aten.conv_transpose2d.input", into=(FLOATS, INTEGERS))
def _transposed(lowering: Lowering, node: fx.Node, out: Out) -> Value:
    """A transposed convolution: all that it gives without padding, of which a part is taken."""
    arguments = arguments_of(node)
    x = lowering.stored_as(lowering.input(node.args[0], out), NHWC)
    result = lowering.shape(node)
    lowering.need_fixed(node, result)
    weight, bias = _weights(lowering, node)
    groups, rows = arguments["groups"], x.shape[1] // arguments["groups"]
    part = out if groups == 1 else Out(out.quantization, "", out.low, out.high)
    values = []
    for group in range(groups):
        own = x if groups == 1 else cut(lowering, x, 1, group * rows, (group + 1) * rows)
        pieces = _piece(weight, group, rows), _piece(bias, group, result[1] // groups)
        values.append(_transposed_group(lowering, node, own, *pieces, part))
    if groups == 1:
        return values[0]
    like, table = Value(result, NHWC), "ConcatenationOptions"
    return lowering.emit("CONCATENATION", values, like, out, table, fuses=True, Axis=3)


def _piece(operand: Any, group: int, count: int) -> Any:
    """The part of a group's weight or bias."""
    if operand is None:
        return None
    start = group * count
    if not isinstance(operand, Weight):
        return replace(operand, array=operand.array[start : start + count])
    scale = operand.scale
    if operand.codes.dim() == 1:  # a bias
        return Weight(operand.codes[start : start + count], scale[start : start + count], 0)
    if operand.axis is None and scale.numel() > 1:  # scales of all groups, in the weight's shape
        return Weight(operand.codes[start : start + count], scale[start].reshape(-1), 1)
    return Weight(operand.codes[start : start + count], scale, operand.axis)


def _transposed_group(
    lowering: Lowering,
    node: fx.Node,
    x: Value,
    weight: Value | Weight,
    bias: Value | Weight | None,
    out: Out,
) -> Value:
    arguments = arguments_of(node)
    stride, padding = pair(arguments["stride"]), pair(arguments["padding"])
    weight = _spread(weight, pair(arguments["dilation"]))
    _, channels, *kernel = weight.codes.shape if isinstance(weight, Weight) else weight.shape
    parameters = _parameters(lowering, node, x, weight, bias, (1, 2, 3, 0), 0, out)
    wanted = lowering.shape(node)[2:]
    sizes = [
        max((size - 1) * step + window, side + count)
        for size, step, window, side, count in zip(x.shape[2:], stride, kernel, padding, wanted)
    ]
    like = Value((x.shape[0], channels, *sizes), NHWC)
    shape = lowering.model.constant("shape", np.asarray(like.stored, np.int32))
    value = lowering.emit(
        "TRANSPOSE_CONV",
        [shape, parameters[0], x, parameters[1]],
        like,
        out,
        "TransposeConvOptions",
        fuses=True,
        Padding=VALID,
        StrideH=stride[0],
        StrideW=stride[1],
    )
    for dim, side, count in zip((2, 3), padding, wanted):
        value = cut(lowering, value, dim, side, side + count)
    return value


def _spread(weight: Value | Weight, dilation: tuple[int, int]) -> Value | Weight:
    """A weight with zeros between its numbers, for which TFLite has no dilation."""
    if dilation == (1, 1):
        return weight
    codes = weight.codes if isinstance(weight, Weight) else torch.from_numpy(weight.array)
    sizes = [(size - 1) * step + 1 for size, step in zip(codes.shape[2:], dilation)]
    wide = codes.new_zeros((*codes.shape[:2], *sizes))
    wide[:, :, :: dilation[0], :: dilation[1]] = codes
    if isinstance(weight, Weight):
        return replace(weight, codes=wide)
    return replace(weight, shape=tuple(wide.shape), array=wide.numpy())


for _name in (
    "conv2d.default",
    "conv2d.padding",
    "conv1d.default",
    "conv1d.padding",
    "linear.default",
    "conv_transpose2d.input",
):
    CONDITIONS[f"aten.{_name}"] = _on_codes
