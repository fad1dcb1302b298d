"""The QDQ form as a TFLite graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.program import DEQUANTIZE, QUANTIZE, QdqProgram
from qtoolkit.export.tflite_flatbuffer import FlatbufferModel, Quantization
from qtoolkit.export.tflite_program import FLOATS, INTEGERS, MOVERS, Analysis, Plan
from qtoolkit.export.tflite_values import (
    FLOAT,
    HIGHEST,
    LOWEST,
    NHWC,
    FreeSize,
    Out,
    Value,
    Weight,
)
from qtoolkit.export.tflite_writer import GraphWriter


class Lowering(Analysis, GraphWriter):
    """Makes a TFLite graph of a program.

    Attributes:
        orders: of named codes, the order in which they are stored.
        coarse: the named codes that LiteRT's own kernels, without XNNPACK, round twice.
    """

    def __init__(
        self, program: QdqProgram, *, nhwc: bool, fixed: bool, integer: bool = False
    ) -> None:
        Analysis.__init__(self, program, fixed=fixed, integer=integer)
        names = (*program.names(), *program.input_names, *program.output_names)
        GraphWriter.__init__(self, names)
        self.nhwc = nhwc
        self.orders: dict[str, tuple[int, ...]] = {}
        self.coarse: set[str] = set()
        self._values: dict[fx.Node, Value | Weight] = {}

    def run(self) -> FlatbufferModel:
        """Writes all operators.

        Raises:
            UnsupportedError: names an operator that has no translation, and its module.
            FixedBatchError: an operator has none with a free batch.
        """
        inputs = dict(zip(self.program.inputs, self.program.input_names))
        for node in self.program.graph.nodes:
            if node.name in inputs:
                self._input(node, inputs[node.name])
            elif node in self.needed and node not in self.constants:
                self._values[node] = self._lower(node)
        for node, name in zip(self.program.outputs, self.program.output_names):
            self._output(node, name)
        self.model.clean()
        return self.model

    def _input(self, node: fx.Node, name: str) -> None:
        value = node.meta["val"]
        kinds = {torch.float32: "float32", torch.int32: "int32", torch.int64: "int64"}
        if value.dtype not in kinds:
            raise UnsupportedError(f"the input {name} is {value.dtype}; nothing was written")
        shape = self.shape(node)
        order = NHWC if self.nhwc and len(shape) == 4 else tuple(range(len(shape)))
        stored = [shape[dim] for dim in order]
        readers = [plan for plan in self.plans.values() if plan.source is node]
        quantization = readers[0].out.quantization if self.integer and readers else None
        kind = "int8" if quantization is not None else kinds[value.dtype]
        index = self.model.tensor(name, stored, kind, quantization)
        self.model.tensors[index].free = tuple(
            axis for axis, size in enumerate(stored) if isinstance(size, FreeSize)
        )
        self.model.inputs.append(index)
        self._values[node] = Value(shape, order, index, quantization)

    def _output(self, node: fx.Node, name: str) -> None:
        value = self.value(node)
        value = value if self.integer else self.dequantized(value)
        order = NHWC if self.nhwc and value.rank == 4 else tuple(range(value.rank))
        value = self.stored_as(value, order)
        taken = {*self.model.inputs, *self.model.outputs}
        if value.array is not None or value.tensor in taken:
            shape = self.shape_constant(value.stored)
            tensor = self.model.tensors[self.tensor(value)]
            value = self.emit(
                "RESHAPE", [value, shape], value, Out(value.quantization), dtype=tensor.dtype
            )
        tensor = self.model.tensors[value.tensor]
        if value.quantization is None:
            tensor.name = name
        tensor.free = tuple(
            axis for axis, size in enumerate(value.stored) if isinstance(size, FreeSize)
        )
        self.model.outputs.append(value.tensor)
        self.model.output_names.append(name)

    def operand(self, node: Any) -> Value | Weight:
        """The value of an argument."""
        if node in self.constants and node not in self._values:
            tensor = self.constants[node]
            if node.target is QUANTIZE:
                out = self.quantized(node)
                codes = tensor.to(torch.int16) + (LOWEST if out.name in self.unsigned else 0)
                array = codes.to(torch.int8).numpy()
                self._values[node] = self._constant(array, node, out.quantization)
            else:
                self._values[node] = self._constant(tensor.numpy(), node)
        return self._values[node]

    def _constant(
        self, array: NDArray[Any], node: fx.Node, quantization: Quantization | None = None
    ) -> Value:
        order = tuple(range(array.ndim))
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        return Value(array.shape, order, -1, quantization, array, node.name)

    def value(self, node: Any) -> Value:
        """The value of an argument, as codes where it is that."""
        value = self.operand(node)
        if isinstance(value, Weight):
            array = value.real().numpy()
            return self._constant(array, node)
        return value

    def real(self, node: Any) -> Value:
        """The value of an argument in float."""
        return self.dequantized(self.value(node))

    def input(self, node: Any, out: Out) -> Value:
        """The value of an argument, as codes if the operator writes codes."""
        return self.real(node) if out.quantization is None else self.value(node)

    def _lower(self, node: fx.Node) -> Value | Weight:
        if node.target is QUANTIZE:
            return self._quantize(node)
        if node.target is DEQUANTIZE:
            return self._dequantize(node)
        target = str(node.target)
        handler = MOVERS.get(target) or FLOATS.get(target)
        if handler is None and all(self._is_size(source) for source in node.all_input_nodes):
            self.need_fixed(node, self.shape(node))
        if handler is None:
            raise self.unsupported(node, "TFLite has no such operator")
        return handler(self, node, FLOAT)

    def _dequantize(self, node: fx.Node) -> Value | Weight:
        codes, scale, zero_point, axis = (cast(Any, argument) for argument in node.args)
        if node in self.codes:
            return self.operand(codes)
        scales = self.constants[scale]
        if zero_point is not None and self.constants[zero_point].any():
            raise self.unsupported(node, "weights must be symmetric, with zero point 0")
        return Weight(self.constants[codes], scales, axis)

    def _quantize(self, node: fx.Node) -> Value:
        plan = self.plans[node]
        out = plan.out
        if plan.kind == "operator":
            result = INTEGERS[str(plan.source.target)](self, plan.source, out)
        elif plan.kind == "requantize":
            result = self._requantize(self.value(plan.source), out)
        elif plan.kind == "table":
            result = self._table(node, plan)
        else:
            x = self.value(plan.source)
            if x.quantization is None:
                result = self.emit("QUANTIZE", [x], x, out, "QuantizeOptions")
            else:  # an input that is codes in the file
                result = self._requantize(x, out)
        if plan.kind == "operator":
            self._rename(result, out.name)
        if self.model.tensors[result.tensor].name == out.name:
            self.orders[out.name] = result.order
        return result

    def _rename(self, value: Value, name: str) -> None:
        """Names codes, where a part of their operator has taken the name."""
        tensor = self.model.tensors[value.tensor]
        if tensor.name != name:
            for other in reversed(self.model.tensors):
                if other.name == name:
                    other.name = tensor.name
                    break
            tensor.name = name

    def _requantize(self, value: Value, out: Out) -> Value:
        if value.quantization != out.quantization:
            return self.rescaled(value, out)
        if out.activation != "NONE":
            return self.clip(value, out)
        tensor = self.model.tensors[value.tensor]
        if value.tensor not in self.model.inputs and tensor.name not in self.program.names():
            tensor.name = out.name
        return value

    def _table(self, node: fx.Node, plan: Plan) -> Value:
        """A function of one value on codes, looked up among the codes of all 256."""
        x, out = self.value(plan.source), plan.out
        assert x.quantization is not None
        codes = torch.arange(256).to(torch.uint8).to(torch.int8)  # in the order of their bytes
        steps = codes.to(torch.float32) - x.quantization.zero_point
        results = {plan.source: steps * x.quantization.scale[0]}

        def compute(current: fx.Node) -> Tensor:
            if current in self.constants:
                return self.constants[current].reshape(())
            if current not in results:
                for source in current.all_input_nodes:
                    compute(source)
                args, kwargs = fx.map_arg((current.args, current.kwargs), compute)
                results[current] = current.target(*args, **kwargs)  # type: ignore[operator]
            return results[current]

        found = compute(node).to(torch.int16) + (LOWEST if out.name in self.unsigned else 0)
        table = self.model.constant(
            f"{out.name}.table", found.to(torch.int8).numpy(), out.quantization
        )
        index = x
        for source, target, dtype in (("INT8", "UINT8", np.uint8), ("UINT8", "INT32", np.int32)):
            options: dict[str, Any] = {
                "InDataType": kind_of(source),
                "OutDataType": kind_of(target),
            }
            index = self.emit("CAST", [index], x, FLOAT, "CastOptions", dtype=dtype, **options)
        unclipped = replace(out, low=LOWEST, high=HIGHEST)
        return self.emit("GATHER", [table, index], x, unclipped, "GatherOptions", Axis=0)


def kind_of(name: str) -> int:
    """The number of a tensor's type in the schema."""
    import tflite

    return int(getattr(tflite.TensorType, name))
