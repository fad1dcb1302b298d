"""TFLite files: tensors, operators and what the flatbuffer schema wants of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Version of the schema; there has been no other since 2017.
_SCHEMA = 3
_IDENTIFIER = b"TFL3"
#: The least version of operators whose meaning here is not that of version 1, which is what old
#: runtimes check: int8 codes came with it, or an option that is used.
_VERSIONS = {
    "ADD": 2,
    "AVERAGE_POOL_2D": 2,
    "BATCH_MATMUL": 2,
    "BROADCAST_TO": 2,
    "CONCATENATION": 2,
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "DEPTH_TO_SPACE": 2,
    "DEQUANTIZE": 2,
    "FULLY_CONNECTED": 5,
    "GATHER": 2,
    "GELU": 2,
    "MAXIMUM": 2,
    "MAX_POOL_2D": 2,
    "MEAN": 2,
    "MINIMUM": 2,
    "MIRROR_PAD": 2,
    "MUL": 3,
    "PAD": 2,
    "PADV2": 2,
    "RESIZE_BILINEAR": 3,
    "RESIZE_NEAREST_NEIGHBOR": 3,
    "SOFTMAX": 2,
    "SPACE_TO_DEPTH": 2,
    "STRIDED_SLICE": 2,
    "SUB": 2,
    "SUM": 2,
    "TRANSPOSE": 2,
    "TRANSPOSE_CONV": 3,
}


@dataclass(frozen=True)
class Quantization:
    """Codes of a tensor: ``real = scale * (code - zero_point)``.

    Attributes:
        scale: one, or one for each index of ``axis``.
        zero_point: in int8.
        axis: of the tensor as it is stored.
    """

    scale: tuple[float, ...]
    zero_point: int = 0
    axis: int = 0


@dataclass
class FileTensor:
    """A tensor of the file.

    Attributes:
        shape: with the batch of the example inputs.
        free: dimensions that may have other sizes, where it is an input or output.
        data: the value of a constant.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    quantization: Quantization | None = None
    data: NDArray[Any] | None = None
    free: tuple[int, ...] = ()


@dataclass
class _Operator:
    kind: str
    inputs: list[int]
    outputs: list[int]
    options: dict[str, Any]
    #: The table of the schema that holds the options; None where there are none.
    table: str | None


@dataclass
class FlatbufferModel:
    """A model of one subgraph, to which tensors and operators are added in order."""

    tensors: list[FileTensor] = field(default_factory=list)
    operators: list[_Operator] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    output_names: list[str] = field(default_factory=list)
    metadata: dict[str, bytes] = field(default_factory=dict)
    _stored: dict[Any, int] = field(default_factory=dict)

    def tensor(
        self,
        name: str,
        shape: Sequence[int],
        dtype: Any,
        quantization: Quantization | None = None,
    ) -> int:
        """Adds a tensor that an operator writes; gives its index."""
        self.tensors.append(
            FileTensor(name, tuple(int(n) for n in shape), np.dtype(dtype), quantization)
        )
        return len(self.tensors) - 1

    def constant(
        self, name: str, data: NDArray[Any], quantization: Quantization | None = None
    ) -> int:
        """Adds a constant, once for equal contents; gives its index."""
        data = np.ascontiguousarray(data)
        key = (data.tobytes(), data.shape, data.dtype.str, quantization)
        if key not in self._stored:
            self._stored[key] = self.tensor(name, data.shape, data.dtype, quantization)
            self.tensors[-1].data = data
        return self._stored[key]

    def operator(
        self,
        kind: str,
        inputs: Sequence[int],
        outputs: Sequence[int],
        table: str | None,
        **options: Any,
    ) -> None:
        """Adds an operator; an option that is a list is a vector of integers."""
        self.operators.append(_Operator(kind, list(inputs), list(outputs), options, table))

    def version(self, op: _Operator) -> int:
        """The version of an operator that old runtimes refuse which would misread it."""
        inputs = [self.tensors[index] for index in op.inputs]
        scales = [len(t.quantization.scale) if t.quantization else 0 for t in inputs]
        if op.kind == "FULLY_CONNECTED" and scales[1] > 1:
            return 12
        if op.kind == "DEQUANTIZE" and scales[0] > 1:
            return 5
        if op.kind == "CONV_2D" and inputs[0].shape[3] != inputs[1].shape[3]:
            return 6
        if op.kind == "TRANSPOSE_CONV" and op.options["FusedActivationFunction"]:
            return 4
        if op.kind == "TRANSPOSE" and len(inputs[0].shape) > 4:
            return 4 if len(inputs[0].shape) == 5 else 6
        return _VERSIONS.get(op.kind, 1)

    def clean(self) -> None:
        """Drops tensors that nothing uses, and gives each tensor that is left a name of its own."""
        used = {index for op in self.operators for index in (*op.inputs, *op.outputs)}
        used |= {*self.inputs, *self.outputs}
        order = [index for index in range(len(self.tensors)) if index in used]
        places = {old: new for new, old in enumerate(order)} | {-1: -1}
        for op in self.operators:
            op.inputs = [places[index] for index in op.inputs]
            op.outputs = [places[index] for index in op.outputs]
        self.inputs = [places[index] for index in self.inputs]
        self.outputs = [places[index] for index in self.outputs]
        self.tensors = [self.tensors[index] for index in order]
        self._stored = {}

    def to_bytes(self) -> bytes:
        """The file."""
        return bytes(_Writer(self).write())


class _Writer:
    def __init__(self, model: FlatbufferModel) -> None:
        import flatbuffers
        import tflite

        self.model, self.schema = model, tflite
        weights = sum(t.data.nbytes for t in model.tensors if t.data is not None)
        self.builder = flatbuffers.Builder(weights + 1024 * (1 + len(model.tensors)))

    def table(self, kind: str, **fields: Any) -> int:
        """A table of the schema with some of its fields; None leaves one out."""
        getattr(self.schema, f"{kind}Start")(self.builder)
        for name, value in fields.items():
            if value is not None:
                getattr(self.schema, f"{kind}Add{name}")(self.builder, value)
        return getattr(self.schema, f"{kind}End")(self.builder)

    def vector(self, values: Sequence[int] | NDArray[Any], dtype: Any = np.int32) -> int:
        return self.builder.CreateNumpyVector(np.asarray(values, dtype=dtype))

    def tables(self, offsets: Sequence[int]) -> int:
        self.builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            self.builder.PrependUOffsetTRelative(offset)
        return self.builder.EndVector()

    def bytes(self, data: bytes) -> int:
        """Contents of a buffer, which runtimes map into memory: aligned to 16 bytes."""
        builder = self.builder
        builder.StartVector(1, len(data), 16)
        builder.head = builder.head - len(data)
        builder.Bytes[builder.head : builder.head + len(data)] = data
        return builder.EndVector()

    def write(self) -> bytearray:
        schema, model = self.schema, self.model
        # Buffer 0 is empty, for tensors that operators write.
        buffers = [self.table("Buffer")]
        tensors = []
        for tensor in model.tensors:
            place = 0
            if tensor.data is not None:
                buffers.append(self.table("Buffer", Data=self.bytes(tensor.data.tobytes())))
                place = len(buffers) - 1
            tensors.append(self._tensor(tensor, place))
        metadata = []
        for name, content in model.metadata.items():
            buffers.append(self.table("Buffer", Data=self.bytes(content)))
            text = self.builder.CreateString(name)
            metadata.append(self.table("Metadata", Name=text, Buffer=len(buffers) - 1))
        codes: dict[tuple[str, int], int] = {}
        operators = [self._operator(op, codes) for op in model.operators]
        graph = self.table(
            "SubGraph",
            Name=self.builder.CreateString("main"),
            Tensors=self.tables(tensors),
            Inputs=self.vector(model.inputs),
            Outputs=self.vector(model.outputs),
            Operators=self.tables(operators),
        )
        op_codes = []
        for kind, version in codes:
            number = getattr(schema.BuiltinOperator, kind)
            op_codes.append(
                self.table(
                    "OperatorCode",
                    DeprecatedBuiltinCode=min(number, 127),
                    BuiltinCode=number,
                    Version=version,
                )
            )
        root = self.table(
            "Model",
            Version=_SCHEMA,
            OperatorCodes=self.tables(op_codes),
            Subgraphs=self.tables([graph]),
            Description=self.builder.CreateString("qtoolkit"),
            Buffers=self.tables(buffers),
            Metadata=self.tables(metadata) if metadata else None,
            SignatureDefs=self.tables([self._signature()]),
        )
        self.builder.Finish(root, file_identifier=_IDENTIFIER)
        return self.builder.Output()

    def _tensor(self, tensor: FileTensor, place: int) -> int:
        quantization = None
        if tensor.quantization is not None:
            scale = tensor.quantization.scale
            quantization = self.table(
                "QuantizationParameters",
                Scale=self.vector(np.asarray(scale), np.float32),
                ZeroPoint=self.vector([tensor.quantization.zero_point] * len(scale), np.int64),
                QuantizedDimension=tensor.quantization.axis,
            )
        kinds = {"float32": "FLOAT32", "int32": "INT32", "int8": "INT8", "uint8": "UINT8"}
        kinds |= {"int64": "INT64", "bool": "BOOL"}
        signature = None
        if tensor.free:
            sizes = [-1 if dim in tensor.free else n for dim, n in enumerate(tensor.shape)]
            signature = self.vector(sizes)
        return self.table(
            "Tensor",
            Shape=self.vector(tensor.shape),
            Type=getattr(self.schema.TensorType, kinds[tensor.dtype.name]),
            Buffer=place,
            Name=self.builder.CreateString(tensor.name),
            Quantization=quantization,
            ShapeSignature=signature,
            HasRank=True,
        )

    def _operator(self, op: _Operator, codes: dict[tuple[str, int], int]) -> int:
        code = codes.setdefault((op.kind, self.model.version(op)), len(codes))
        options = kind = None
        if op.table is not None:
            values = {
                name: self.vector(value) if isinstance(value, list) else value
                for name, value in op.options.items()
            }
            options = self.table(op.table, **values)
            kind = getattr(self.schema.BuiltinOptions, op.table)
        return self.table(
            "Operator",
            OpcodeIndex=code,
            Inputs=self.vector(op.inputs),
            Outputs=self.vector(op.outputs),
            BuiltinOptionsType=kind,
            BuiltinOptions=options,
        )

    def _signature(self) -> int:
        """The inputs and outputs by name."""

        def maps(indices: Sequence[int], names: Sequence[str]) -> int:
            found = []
            for index, name in zip(indices, names):
                text = self.builder.CreateString(name)
                found.append(self.table("TensorMap", Name=text, TensorIndex=index))
            return self.tables(found)

        model = self.model
        return self.table(
            "SignatureDef",
            Inputs=maps(model.inputs, [model.tensors[index].name for index in model.inputs]),
            Outputs=maps(model.outputs, model.output_names),
            SignatureKey=self.builder.CreateString("serving_default"),
            SubgraphIndex=0,
        )
