"""Float ONNX files with the quantization of their tensors beside them, as AIMET writes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.onnx import OnnxTarget
from qtoolkit.export.onnx_graph import Lowering
from qtoolkit.export.onnx_run import OnnxRuntime
from qtoolkit.export.program import DEQUANTIZE, QUANTIZE, QdqProgram, tensors_of
from qtoolkit.export.registry import Job
from qtoolkit.export.verify import Runner
from qtoolkit.graph.encodings import float_copy, mark_prepared
from qtoolkit.graph.report import get_report

#: Versions of the format that can be written (AIMET's Quantization Encoding Specification).
VERSIONS = ("1.0.0", "0.6.1")
#: dB that the file's outputs must reach beside the float model's.
MIN_SQNR = 60.0


def _bits(low: int, high: int) -> int:
    """Bits of codes in a range; 8 for one that is clipped."""
    for bits in range(4, 8):
        half = 2 ** (bits - 1)
        if (low, high) in ((0, 2 * half - 1), (-half, half - 1), (1 - half, half - 1)):
            return bits
    return 8


class Encoding:
    """The quantization of one tensor: ``real = scale * (code + offset)``, code from 0.

    Attributes:
        value: the tensor, an ``onnx_ir.Value`` whose name may still change.
        bits: of its codes.
        symmetric: whether zero is the middle code.
        scales: one, or one for each channel.
        offsets: as many, not above zero.
        per_channel: whether there is one for each channel, even if that is one.
    """

    def __init__(
        self, value: Any, bits: int, scales: Any, zero_points: Any, *, signed: bool, axis: int
    ) -> None:
        self.value, self.bits = value, bits
        self.scales = [float(scale) for scale in np.asarray(scales).reshape(-1)]
        middle = 2 ** (bits - 1)
        lowest = -middle if signed else 0
        codes = np.broadcast_to(np.asarray(zero_points).reshape(-1), len(self.scales))
        self.offsets = [lowest - int(code) for code in codes]
        self.symmetric = all(offset == -middle for offset in self.offsets)
        self.per_channel = axis >= 0

    def newest(self) -> dict[str, Any]:
        """In version 1.0.0."""
        return {
            "name": self.value.name,
            "enc_type": "PER_CHANNEL" if self.per_channel else "PER_TENSOR",
            "dtype": "INT",
            "bw": self.bits,
            "is_sym": self.symmetric,
            "scale": self.scales,
            "offset": self.offsets,
        }

    def legacy(self) -> list[dict[str, Any]]:
        """In version 0.6.1."""
        return [
            {
                "bitwidth": self.bits,
                "dtype": "int",
                "is_symmetric": str(self.symmetric),
                "max": scale * (offset + 2**self.bits - 1),
                "min": scale * offset,
                "offset": offset,
                "scale": scale,
            }
            for scale, offset in zip(self.scales, self.offsets)
        ]


class EncodingsLowering(Lowering):
    """Takes quantize and dequantize out of a graph, and notes what they would do.

    Attributes:
        activations: the encodings of values.
        parameters: those of weights.
        weight_bits: of the weights of layers; 8 where it names none.
    """

    def __init__(self, model: Any, weight_bits: dict[str, int]) -> None:
        super().__init__(model, clips="float", onnxruntime=False)
        self.activations: dict[Any, Encoding] = {}
        self.parameters: dict[Any, Encoding] = {}
        self.weight_bits = weight_bits

    def _lower_all(self) -> None:
        prefixes = self._name_values()
        nodes = [node for node in self.graph if node.domain]
        for node in nodes:
            if node.op_type == "Quantize":
                self._note_activation(node)
        for node in nodes:
            if node.op_type == "Dequantize":
                source = node.inputs[0].producer()
                if source is not None and source.op_type == "Quantize":
                    self._replace(node, source.inputs[0])
                else:
                    self._lower_constant(node, prefixes)

    def _note_activation(self, node: Any) -> None:
        value = node.inputs[0]
        while (source := value.producer()) is not None and source.op_type == "Dequantize":
            value = source.inputs[0].producer().inputs[0]
        if value in self.activations:
            return
        low, high = (node.attributes[key].as_int() for key in ("quant_min", "quant_max"))
        scale, zero_point = (each.const_value.numpy() for each in node.inputs[1:3])
        self.activations[value] = Encoding(
            value, _bits(low, high), scale, zero_point, signed=low < 0, axis=-1
        )
        if value.producer() is not None:
            value.name = node.attributes["name"].as_string()

    def _lower_constant(self, node: Any, prefixes: set[str]) -> None:
        numbers, scale = (value.const_value.numpy() for value in node.inputs[:2])
        axis = node.attributes["axis"].as_int()
        layer, name = self._layer_and_name(node, prefixes)
        if numbers.dtype != np.float32:
            shape = [-1 if dim == axis else 1 for dim in range(numbers.ndim)]
            spread = scale if axis < 0 else scale.reshape(shape)
            real = (numbers.astype(np.float64) * spread).astype(np.float32)
        else:
            real = numbers
        value = self._initializer(name, np.ascontiguousarray(real))
        if numbers.dtype != np.int32 and (axis >= 0 or scale.size == 1):
            bits = self.weight_bits.get(layer, 8)
            self.parameters[value] = Encoding(value, bits, scale, 0, signed=True, axis=axis)
        self._replace(node, value)


class _Float(fx.Interpreter):
    """Runs a program as if nothing but constants were quantized."""

    def __init__(self, program: QdqProgram) -> None:
        super().__init__(program.exported.graph_module)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        if target is QUANTIZE:
            return args[0]
        if target is DEQUANTIZE and args[0].is_floating_point():
            return args[0]
        return super().call_function(target, args, kwargs)


def _run_float(program: QdqProgram) -> list[torch.Tensor]:
    values = dict(zip(program.inputs, program.example_inputs))
    names = [node.name for node in program.graph.nodes if node.op == "placeholder"]
    arguments = [values.get(name, program.constants.get(name)) for name in names]
    with torch.no_grad():
        return tensors_of(_Float(program).run(*arguments))


class EncodingsTarget(OnnxTarget):
    """See ``onnx.onnx`` with ``form="encodings"``."""

    gives_codes = False
    converts = False
    min_opset = 18

    def __init__(
        self,
        *,
        opset: int,
        input_names: Sequence[str] | None,
        output_names: Sequence[str] | None,
        version: str,
    ) -> None:
        super().__init__(opset=opset, input_names=input_names, output_names=output_names)
        if version not in VERSIONS:
            raise ValueError(
                f"encodings of version {version!r}: use one of {', '.join(map(repr, VERSIONS))}"
            )
        self.version = version
        self.weight_bits: dict[str, int] = {}
        self.unmarked: dict[str, str] = {}
        self.found: Any = None

    def lowering(self, model: Any) -> Lowering:
        self.found = EncodingsLowering(model, self.weight_bits)
        return self.found

    def check(self, job: Job) -> None:
        report = get_report(job.model)
        if report is not None and not report.converted:
            try:
                marked = mark_prepared(job.model)
            except ValueError as error:
                raise UnsupportedError(f"export.onnx: {error}; nothing was written") from error
            self.weight_bits, self.unmarked = marked.weight_bits, marked.unmarked
            with torch.no_grad():
                job.expected = tensors_of(float_copy(job.model)(*job.example_inputs))
            job.program = QdqProgram.of_marked(
                marked.model, job.example_inputs, dynamic_batch=job.dynamic_batch
            )
        else:
            job.expected = _run_float(job.program)
        super().check(job)

    def notes(self, path: Path) -> list[str]:
        activations = list(self.found.activations.values())
        parameters = list(self.found.parameters.values())
        new = self.version == "1.0.0"
        document: dict[str, Any] = {"version": self.version}
        for key, encodings in (
            ("activation_encodings", activations),
            ("param_encodings", parameters),
        ):
            document[key] = (
                [encoding.newest() for encoding in encodings]
                if new
                else {encoding.value.name: encoding.legacy() for encoding in encodings}
            )
        document["quantizer_args"] = {
            "activation_bitwidth": max((e.bits for e in activations), default=8),
            "dtype": "int",
            "is_symmetric": _said(all(e.symmetric for e in parameters), new),
            "param_bitwidth": max((e.bits for e in parameters), default=8),
            "per_channel_quantization": _said(any(e.per_channel for e in parameters), new),
            "quant_scheme": "post_training_tf",
        }
        file = path.with_suffix(".encodings")
        file.write_text(json.dumps(document, indent=1) + "\n")
        return [
            f"{len(activations)} encodings of activations and {len(parameters)} of parameters are "
            f"in {file.name}",
            *(f"{name}.weight has no encoding: {why}" for name, why in self.unmarked.items()),
        ]

    def runners(self, path: Path) -> list[Runner]:
        return [OnnxRuntime(path)]


def _said(value: bool, new: bool) -> bool | str:
    return value if new else str(value)
