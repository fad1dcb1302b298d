"""Writing operators of a TFLite graph, and the order in which values are stored.

PyTorch's sizes are N, C, H, W and TFLite's operators want N, H, W, C. So a value has the shape that
it has in PyTorch, and an order in which its dimensions are stored. A permutation changes the order
alone; an operator that wants another one transposes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qtoolkit.export.program import free_name
from qtoolkit.export.tflite_flatbuffer import FlatbufferModel, Quantization
from qtoolkit.export.tflite_values import (
    FLOAT,
    HIGHEST,
    LOWEST,
    ONE,
    FixedBatchError,
    FreeSize,
    Out,
    Value,
    groups_of,
    is_unit,
)


class GraphWriter:
    """Adds operators to a graph.

    Attributes:
        model: the graph.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.model = FlatbufferModel()
        self._names = set(names)
        self._cached: dict[Any, Value] = {}

    def free_name(self, name: str) -> str:
        """A name that no other tensor has."""
        return free_name(name, self._names)

    def dequantized(self, value: Value) -> Value:
        """The value in float."""
        if value.quantization is None:
            return value
        if value.array is not None:
            steps = value.array.astype(np.float32) - np.float32(value.quantization.zero_point)
            array = steps * np.float32(value.quantization.scale[0])
            return replace(value, array=array, quantization=None)
        key = ("real", value.tensor)
        if key not in self._cached:
            name = f"{self.model.tensors[value.tensor].name}.dequantized"
            self._cached[key] = self.emit("DEQUANTIZE", [value], value, FLOAT, name=name)
        return replace(self._cached[key], shape=value.shape, order=value.order)

    def tensor(self, value: Value) -> int:
        """The tensor of a value in the file."""
        if value.array is None:
            return value.tensor
        name = free_name(value.name or "constant", self._names)
        return self.model.constant(name, value.array.transpose(value.order), value.quantization)

    def stored_as(self, value: Value, order: Sequence[int]) -> Value:
        """The same value, stored in another order."""
        order = tuple(order)
        if value.order == order:
            return value
        if value.array is not None:
            return replace(value, order=order)
        key = ("order", value.tensor, value.shape, value.order, order)
        if key in self._cached:
            return self._cached[key]
        moved = replace(value, order=order)
        out = Out(value.quantization)
        if [d for d in order if not is_unit(value.shape[d])] == [
            d for d in value.order if not is_unit(value.shape[d])
        ]:
            result = self._reshaped(value, moved, out)
        else:
            axes = np.asarray([value.order.index(dim) for dim in order], np.int32)
            permutation = self.model.constant("permutation", axes)
            result = self.emit("TRANSPOSE", [value, permutation], moved, out, "TransposeOptions")
        self._cached[key] = result
        return result

    def plain(self, value: Value) -> Value:
        """The same value, stored in PyTorch's order."""
        return self.stored_as(value, range(value.rank))

    def shape_constant(self, stored: Sequence[int]) -> int:
        """A shape as a constant, with -1 for a size that is free."""
        free = [axis for axis, size in enumerate(stored) if isinstance(size, FreeSize)]
        if len(free) > 1:
            raise FixedBatchError("a reshape has two sizes that depend on the batch")
        sizes = [-1 if axis in free else int(size) for axis, size in enumerate(stored)]
        return self.model.constant("shape", np.asarray(sizes, np.int32))

    def _reshaped(self, value: Value, result: Value, out: Out) -> Value:
        shape = self.shape_constant(result.stored)
        sizes = self.model.tensors[shape].data
        assert sizes is not None
        return self.emit(
            "RESHAPE", [value, shape], result, out, "ReshapeOptions", NewShape=sizes.tolist()
        )

    def reshape(self, value: Value, shape: Sequence[int]) -> Value:
        """The value in another shape, transposed only where dimensions that become one are not
        stored one after the other."""
        shape = tuple(shape)
        if value.array is not None:
            array = value.array.reshape([int(n) for n in shape])
            return replace(value, shape=shape, order=tuple(range(len(shape))), array=array)
        groups = groups_of(value.shape, shape)
        group_of = {dim: index for index, (dims, _) in enumerate(groups) for dim in dims}
        places: list[int] = []  # groups in the order in which they are stored
        for dim in value.order:
            if not is_unit(value.shape[dim]) and group_of[dim] not in places:
                places.append(group_of[dim])
        for index in range(len(groups)):  # groups of one element are stored after the one before
            if index not in places:
                places.insert(places.index(index - 1) + 1 if index else 0, index)
        wanted = [dim for index in places for dim in groups[index][0]]
        moving = [dim for dim in wanted if not is_unit(value.shape[dim])]
        if moving != [dim for dim in value.order if not is_unit(value.shape[dim])]:
            value = self.stored_as(value, wanted)
        order = tuple(dim for index in places for dim in groups[index][1])
        result = Value(shape, order, -1, value.quantization)
        if result.stored == value.stored:
            return replace(result, tensor=value.tensor)
        return self._reshaped(value, result, Out(value.quantization))

    def aligned(self, values: Sequence[Value]) -> list[Value]:
        """Values that are broadcast with each other, stored in one order."""
        rank = max(value.rank for value in values)
        changing = [v for v in values if v.array is None and v.rank == rank]
        first = max(changing or values, key=lambda value: math.prod(value.shape))
        order = first.order if first.rank == rank else tuple(range(rank))
        result = []
        for value in values:
            if value.rank < rank:
                value = self.reshape(value, (1,) * (rank - value.rank) + value.shape)
            result.append(self.stored_as(value, order))
        return result

    # Operators

    def rescaled(self, value: Value, out: Out) -> Value:
        """Codes with another scale: a product with one, which runtimes round once. (XNNPACK
        multiplies by 8 bits in QUANTIZE from int8 to int8.)"""
        one = self.model.constant("one", np.full(1, ONE, np.int8), Quantization((1 / ONE,)))
        return self.emit("MUL", [value, one], value, out, "MulOptions", fuses=True)

    def clip(self, value: Value, out: Out) -> Value:
        """Codes within bounds."""
        bounds = [("MAXIMUM", out.low, LOWEST), ("MINIMUM", out.high, HIGHEST)]
        used = [(kind, bound) for kind, bound, limit in bounds if bound != limit]
        for number, (kind, bound) in enumerate(used, 1):
            constant = self.model.constant("bound", np.full(1, bound, np.int8), out.quantization)
            name = out.name if number == len(used) else ""
            free = Out(out.quantization, name)
            value = self.emit(kind, [value, constant], value, free, "MaximumMinimumOptions")
        return value

    def emit(
        self,
        kind: str,
        inputs: Sequence[Value | int],
        like: Value,
        out: Out,
        table: str | None = None,
        *,
        fuses: bool = False,
        name: str = "",
        dtype: Any = None,
        **options: Any,
    ) -> Value:
        """Adds an operator.

        Args:
            kind: its name in TFLite.
            inputs: values and tensors of the file.
            like: a value of the shape and order of the result.
            out: what is written.
            table: of the schema with the operator's options.
            fuses: it has an activation function.
            name: of a result that has no name in ``out``.
            dtype: of a result that is neither codes nor float.
            options: by the schema's names.
        """
        activation = out.activation
        clips = activation != "NONE" and not (fuses and activation)
        if fuses and not clips:
            options["FusedActivationFunction"] = _activation(activation or "NONE")
        if out.name and not clips:
            name = out.name
        else:
            name = free_name(name or (f"{out.name}.unclipped" if clips else kind), self._names)
        codes = np.float32 if out.quantization is None else np.int8
        index = self.model.tensor(name, like.stored, dtype or codes, out.quantization)
        indices = [self.tensor(item) if isinstance(item, Value) else item for item in inputs]
        self.model.operator(kind, indices, [index], table, **options)
        result = Value(like.shape, like.order, index, out.quantization)
        return self.clip(result, out) if clips else result


def _activation(name: str) -> int:
    import tflite

    return int(getattr(tflite.ActivationFunctionType, name))
