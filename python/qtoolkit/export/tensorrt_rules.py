"""What TensorRT asks of an ONNX file with explicit quantization, checked node by node.

The rules are those of NVIDIA's documentation and of the parser's source, which each names. They
need no TensorRT: a file is checked on any machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtoolkit.export.errors import MissingPackageError

_GUIDE = "TensorRT documentation, Working with Quantized Types, Explicit Quantization"
_PLACEMENT = "TensorRT documentation, Q/DQ Layer-Placement Recommendations"
_LAYERS = "NvInfer.h, IQuantizeLayer and IDequantizeLayer"
_PARSER = "onnx-tensorrt, QuantDequantLinearHelper in onnxOpImporters.cpp"
_OPERATORS = "onnx-tensorrt, docs/operators.md"


@dataclass(frozen=True)
class Rule:
    """A rule of TensorRT.

    Attributes:
        text: what it asks for.
        source: where it is written.
        blocks: whether TensorRT refuses a file against it; if not, it computes in float what could
            be integers, or in more steps.
    """

    text: str
    source: str
    blocks: bool = True


RULES = {
    "opset": Rule("the operators are of a version from 10 to 25", _OPERATORS),
    "newest parser": Rule("every TensorRT 10 reads opset 20 and older", _OPERATORS, blocks=False),
    "operator": Rule("the parser knows the operator and its attributes", _OPERATORS),
    "format": Rule("codes are int8 (or int4, float8, float4): not uint8, not int32", _PARSER),
    "zero point": Rule("zero points are constants and zero", _PARSER),
    "scale": Rule("scales are constants, positive and finite", _PARSER),
    "sizes": Rule(
        "there is one scale, or one for each index of the axis; zero points too", _PARSER
    ),
    "activation": Rule("activations have one scale; only weights have one per channel", _LAYERS),
    "axis": Rule(
        "weights have scales per output channel: axis 0 of a convolution, 1 of a transposed one",
        _LAYERS,
    ),
    "codes": Rule("only DequantizeLinear reads codes", _OPERATORS),
    "bias": Rule("a bias is a float initializer", _LAYERS),
    "weighted layer": Rule(
        "all inputs of a convolution or matrix product are quantized, or none", _PLACEMENT, False
    ),
    "residual": Rule(
        "of the two inputs of an addition after a convolution, the residual is quantized and the "
        "convolution's result is not, so that both are one kernel",
        _PLACEMENT,
        False,
    ),
}

#: Operators of ONNX that the parser of TensorRT 10.0 imports (onnx-tensorrt, docs/operators.md).
_IMPORTED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool
    BatchNormalization Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div Dropout
    Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements GatherND
    Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization GRU HardSigmoid HardSwish Hardmax Identity If ImageScaler
    InstanceNormalization IsInf IsNaN LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop LRN LSTM LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or
    Pad ParametricSoftplus Pow PRelu QuantizeLinear RandomNormal RandomNormalLike
    RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu
    Reshape Resize ReverseSequence RNN RoiAlign Round ScaledTanh Scan Scatter
    ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile
    TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
_KNOWN = frozenset(_IMPORTED.split())
#: Inputs that must be constants (ibid.).
_CONSTANT_INPUTS = {
    "CumSum": (1,),
    "Dropout": (2,),
    "OneHot": (1,),
    "Pad": (3,),
    "Slice": (3,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}
_COORDINATES = (
    "half_pixel",
    "pytorch_half_pixel",
    "tf_half_pixel_for_nn",
    "asymmetric",
    "align_corners",
)
_CODES = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Violation:
    """A node of a file that is against a rule.

    Attributes:
        rule: its name, a key of ``RULES``.
        node: the node's name; "" where the file as a whole is meant.
        operator: the node's operator.
        module: dotted name of the module that the node comes from, or of the layer that it leads
            to; "" if no name tells.
        detail: what is found.
    """

    rule: str
    node: str
    operator: str
    module: str
    detail: str

    @property
    def blocks(self) -> bool:
        """Whether TensorRT refuses the file."""
        return RULES[self.rule].blocks

    @property
    def source(self) -> str:
        """Where the rule is written."""
        return RULES[self.rule].source

    def __str__(self) -> str:
        place = f"{self.operator} {self.node!r}" if self.node else "the file"
        module = f" of {self.module}" if self.module else ""
        return f"{place}{module}: {self.detail} (rule: {RULES[self.rule].text}; {self.source})"


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those in its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                if inner.node:
                    yield from _graphs(inner)


class _Checker:
    def __init__(self, model: Any) -> None:
        import onnx

        self.model = model
        self.onnx = onnx
        self.found: list[Violation] = []
        self.constants: dict[str, Any] = {}
        self.producers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = {}
        self.nodes: list[Any] = []
        for graph in _graphs(model.graph):
            self.constants.update({tensor.name: tensor for tensor in graph.initializer})
            self.nodes += graph.node
        for node in self.nodes:
            for name in node.output:
                self.producers[name] = node
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.constants[node.output[0]] = node.attribute[0].t
        self.outputs = {value.name for value in model.graph.output}

    def run(self) -> list[Violation]:
        self._opset()
        functions = {(function.domain, function.name) for function in self.model.functions}
        for node in self.nodes:
            if (node.domain, node.op_type) in functions:
                continue
            self._operator(node)
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                self._quantization(node)
            else:
                self._codes(node)
            if node.op_type in _WEIGHTED:
                self._weighted(node)
            if node.op_type == "Add":
                self._residual(node)
        return self.found

    # Facts

    def _add(self, rule: str, node: Any, detail: str) -> None:
        name = "" if node is None else node.name or (node.output[0] if node.output else "")
        operator = "" if node is None else node.op_type
        module = "" if node is None else self._module(node)
        self.found.append(Violation(rule, name, operator, module, detail))

    def _module(self, node: Any) -> str:
        """The scope in a node's name, or else the name of the codes that it leads to."""
        scope = node.name.rpartition("/")[0]
        while not scope and node.output:
            readers = self.readers.get(node.output[0], ())
            if node.op_type == "QuantizeLinear" or len(readers) != 1:
                break
            node = readers[0]
            scope = node.name.rpartition("/")[0]
        return str(scope)

    def _attribute(self, node: Any, name: str, default: Any) -> Any:
        for attribute in node.attribute:
            if attribute.name == name:
                value = self.onnx.helper.get_attribute_value(attribute)
                return value.decode() if isinstance(value, bytes) else value
        return default

    def _input(self, node: Any, index: int) -> str:
        return node.input[index] if index < len(node.input) else ""

    def _made_by(self, name: str, kind: str) -> Any:
        node = self.producers.get(name)
        return node if node is not None and node.op_type == kind else None

    def _format(self, name: str) -> str:
        """The format of a value that is codes; "" for others and where it is not known."""
        tensor = self.constants.get(name)
        if tensor is not None:
            return str(self.onnx.TensorProto.DataType.Name(tensor.data_type))
        node = self._made_by(name, "QuantizeLinear")
        if node is None:
            return ""
        zero_point = self.constants.get(self._input(node, 2))
        kind = self._attribute(node, "output_dtype", 0)
        if zero_point is not None:
            kind = zero_point.data_type
        return str(self.onnx.TensorProto.DataType.Name(kind or self.onnx.TensorProto.UINT8))

    # Rules

    def _opset(self) -> None:
        versions = {entry.domain: entry.version for entry in self.model.opset_import}
        version = versions.get("", versions.get("ai.onnx", 0))
        if not 10 <= version <= 25:
            self._add("opset", None, f"it has opset {version}")
        elif version > 20:
            self._add("newest parser", None, f"it has opset {version}")

    def _operator(self, node: Any) -> None:
        kind = node.op_type
        if node.domain not in ("", "ai.onnx") or kind not in _KNOWN:
            domain = f"{node.domain}." if node.domain else ""
            self._add("operator", node, f"{domain}{kind} has no importer, but for a plugin")
            return
        inputs = _CONSTANT_INPUTS.get(kind, (1,) if kind.startswith("Reduce") else ())
        for index in inputs:
            name = self._input(node, index)
            if name and name not in self.constants:
                self._add("operator", node, f"input {index} is computed, not a constant")
        if kind in ("MaxPool", "AveragePool", "LpPool"):
            if any(size != 1 for size in self._attribute(node, "dilations", [])):
                self._add("operator", node, "the window is dilated")
            if sum(bool(name) for name in node.output) > 1:
                self._add("operator", node, "it gives indices")
        if kind == "Resize":
            mode = self._attribute(node, "coordinate_transformation_mode", "half_pixel")
            if mode not in _COORDINATES:
                self._add("operator", node, f"coordinate_transformation_mode is {mode}")
            if self._attribute(node, "antialias", 0):
                self._add("operator", node, "it antialiases")
        several = sum(bool(name) for name in node.output) > 1
        if kind in ("LayerNormalization", "BatchNormalization") and several:
            self._add("operator", node, "more than its first output is used")

    def _quantization(self, node: Any) -> None:
        value = node.input[0]
        if node.op_type == "QuantizeLinear":
            kind = self._format(node.output[0])
        else:
            kind = self._format(value)
        if kind and kind not in _CODES:
            missing = self._no_format(node)
            what = "its zero point is missing, which means" if missing else "codes are"
            self._add("format", node, f"{what} {kind.lower()}")
        scale = self.constants.get(self._input(node, 1))
        if scale is None:
            self._add("scale", node, "its scale is computed")
            return
        scales = self.onnx.numpy_helper.to_array(scale).astype(np.float64)
        if not (scales > 0).all() or not np.isfinite(scales).all():
            self._add("scale", node, f"a scale is {scales.reshape(-1).min():g}")
        self._zero_point(node, scales.size)
        if scales.size == 1 or scales.ndim > 1:
            return
        root = self._made_by(value, "QuantizeLinear")
        source = value if root is None else root.input[0]
        tensor = self.constants.get(source)
        if tensor is None:
            self._add("activation", node, f"there are {scales.size} scales")
            return
        rank, axis = len(tensor.dims), self._attribute(node, "axis", 1)
        if not -rank <= axis < rank or tensor.dims[axis] != scales.size:
            shape = list(tensor.dims)
            self._add("sizes", node, f"{scales.size} scales on axis {axis} of shape {shape}")
        elif node.op_type == "DequantizeLinear":
            self._axis(node, axis % rank, rank)

    def _no_format(self, node: Any) -> bool:
        return (
            node.op_type == "QuantizeLinear"
            and not self._input(node, 2)
            and not self._attribute(node, "output_dtype", 0)
        )

    def _zero_point(self, node: Any, count: int) -> None:
        name = self._input(node, 2)
        if not name:
            return
        tensor = self.constants.get(name)
        if tensor is None:
            self._add("zero point", node, "its zero point is computed")
            return
        codes = self.onnx.numpy_helper.to_array(tensor).astype(np.float64)
        if (codes != 0).any():
            first = codes.reshape(-1)[np.flatnonzero(codes.reshape(-1))[0]]
            self._add("zero point", node, f"a zero point is {first:g}")
        if codes.size != count:
            self._add("sizes", node, f"{codes.size} zero points for {count} scales")

    def _axis(self, node: Any, axis: int, rank: int) -> None:
        for reader in self.readers.get(node.output[0], ()):
            index = list(reader.input).index(node.output[0])
            if index != 1:
                continue
            right = {
                "Conv": 0,
                "ConvTranspose": 1,
                "Gemm": 0 if self._attribute(reader, "transB", 0) else 1,
                "MatMul": rank - 1,
            }.get(reader.op_type, axis)
            if axis != right:
                self._add("axis", node, f"axis {axis} for {reader.op_type} {reader.name!r}")

    def _codes(self, node: Any) -> None:
        for name in node.input:
            made = self._made_by(name, "QuantizeLinear")
            tensor = self.constants.get(name)
            if made is not None or (tensor is not None and self._format(name) in _CODES):
                self._add("codes", node, f"it reads {name!r}")

    def _weighted(self, node: Any) -> None:
        quantized = [bool(self._made_by(name, "DequantizeLinear")) for name in node.input[:2]]
        if any(quantized) and not all(quantized):
            detail = "its weight" if quantized[0] else "its input"
            self._add("weighted layer", node, f"{detail} is in float")
        bias = self._input(node, 2) if node.op_type != "MatMul" else ""
        if bias and node.op_type != "Gemm" and bias not in self.constants:
            self._add("bias", node, f"its bias {bias!r} is computed")

    def _residual(self, node: Any) -> None:
        made = [self.producers.get(name) for name in node.input]
        if any(name in self.constants for name in node.input):
            return
        direct = [bool(source is not None and self._is_integer(source)) for source in made]
        dequantized = [
            bool(source is not None and source.op_type == "DequantizeLinear") for source in made
        ]
        if any(direct):
            other = made[1 - direct.index(True)]
            if not any(dequantized):
                what = "a graph input" if other is None else f"{other.op_type} {other.name!r}"
                self._add("residual", node, f"it adds {what} in float")
        elif all(dequantized):
            for source in made:
                assert source is not None
                between = self._made_by(source.input[0], "QuantizeLinear")
                layer = None if between is None else self.producers.get(between.input[0])
                alone = [source, between, layer]
                if layer is not None and self._is_integer(layer) and self._is_chain(alone):
                    self._add("residual", node, f"the result of {layer.name!r} is quantized before")
                    break

    def _is_integer(self, node: Any) -> bool:
        """Whether it is a convolution of codes."""
        return node.op_type in ("Conv", "ConvTranspose") and all(
            self._made_by(name, "DequantizeLinear") for name in node.input[:2]
        )

    def _is_chain(self, nodes: list[Any]) -> bool:
        """Whether the results of the nodes are read once each."""
        names = [node.output[0] for node in nodes]
        return all(len(self.readers.get(n, ())) == 1 and n not in self.outputs for n in names)


def violations(model: Any) -> list[Violation]:
    """What of an ``onnx.ModelProto`` is against TensorRT's rules, in the order of the nodes."""
    return _Checker(model).run()


def check_tensorrt(path: str | os.PathLike[str]) -> list[Violation]:
    """Checks any ONNX file against what TensorRT asks of explicit quantization.

    TensorRT is not needed. What the file holds beside quantization is checked by operator and
    attributes alone: it may still be refused for shapes or types.

    Args:
        path: an ONNX file.

    Returns:
        The violations, in the order of the nodes; ``blocks`` tells those for which TensorRT refuses
        the file from those for which it computes more slowly. An empty list: there are none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no valid ONNX file.
        MissingPackageError: onnx is not installed; the message gives the command.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise MissingPackageError(
            "check_tensorrt needs onnx, not installed: pip install 'qtoolkit[onnx]'"
        ) from error
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    try:
        onnx.checker.check_model(os.fspath(path))
        model = onnx.load(path)
    except (DecodeError, onnx.checker.ValidationError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no valid ONNX file: {error}") from error
    return violations(model)
