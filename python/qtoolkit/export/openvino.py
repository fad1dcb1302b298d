"""OpenVINO IR: an ``.xml`` with its weights in a ``.bin`` beside it.

The graph is translated by OpenVINO's own PyTorch frontend, which knows the float operators too.
Translations of quantize and dequantize are added to it. They give the form that OpenVINO's plug-ins
execute on codes: an activation passes one FakeQuantize, a weight is a constant of codes with
Convert and Multiply.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.four_bits import in_four_bits
from qtoolkit.export.integrity import XML_SEAL
from qtoolkit.export.openvino_residuals import mark_residuals
from qtoolkit.export.program import QdqProgram
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import Runner

# The plug-in executes these on integers.
_LEVELS = {16, 255, 256}
# OpenVINO renames operators that are named alike, as a layer and an input may be.
_PREFIX = "qtoolkit/"


@dataclass(frozen=True)
class _Codes:
    """How a named value is quantized."""

    scale: float
    zero_point: int
    quant_min: int
    quant_max: int

    def of(self, real: Tensor) -> Tensor:
        """The codes of dequantized values."""
        codes = (real / self.scale).round() + self.zero_point
        return codes.to(torch.int8 if self.quant_min < 0 else torch.uint8)

    def limits(self, levels: bool) -> tuple[np.float32, np.float32]:
        """The real numbers of the lowest and highest code; with ``levels`` of those that a
        FakeQuantize in a number of levels that plug-ins know can have."""
        low, high = self.quant_min, self.quant_max
        if levels and self.levels != high - low + 1:
            low = -128 if low < 0 else 0
            high = low + 255
        scale = np.float32(self.scale)
        return np.float32((low - self.zero_point) * scale), np.float32(
            (high - self.zero_point) * scale
        )

    @property
    def levels(self) -> int:
        """The number of codes if plug-ins compute with it on integers, else 256."""
        count = self.quant_max - self.quant_min + 1
        return count if count in _LEVELS else 256


def _value(context: Any, index: int) -> Any:
    """A constant argument as an array; None where it is None."""
    node = context.get_input(index).get_node()
    return node.data if node.get_type_name() == "Constant" else None


class _Translator:
    """Translates the operators of the QDQ form into OpenVINO's."""

    def __init__(self, four_bits: bool) -> None:
        self.four_bits = four_bits
        #: Of the named values that were met.
        self.codes: dict[str, _Codes] = {}
        #: What the graph uses and does not own: operators in Python, memory of constants.
        self.alive: list[Any] = []

    def extensions(self) -> list[Any]:
        """For the frontend."""
        from openvino.frontend.pytorch import ConversionExtension

        return [
            ConversionExtension("qtoolkit_export.quantize.default", self._quantize),
            ConversionExtension("qtoolkit_export.dequantize.default", self._dequantize),
        ]

    def _quantize(self, context: Any) -> list[Any]:
        """A stand-in for a FakeQuantize, which would dequantize too."""
        name = bytes(_value(context, 5)).decode()
        scale, *integers = (_value(context, index) for index in range(1, 5))
        self.codes[name] = _Codes(float(scale), *(int(value) for value in integers))
        node = _stand_in()([context.get_input(0)])
        node.set_friendly_name(_PREFIX + name)
        self.alive.append(node)
        return [node.output(0)]

    def _dequantize(self, context: Any) -> list[Any]:
        """A constant's Convert and Multiply; an activation is dequantized already."""
        from openvino import opset13 as op

        source = context.get_input(0)
        codes = _value(context, 0)
        if codes is None:
            return [source]
        scale, axis = _value(context, 1), _value(context, 3)
        if axis is not None:
            axis = int(axis)
            scale = scale.reshape([-1 if dim == axis else 1 for dim in range(codes.ndim)])
        if codes.dtype == np.int32:  # a bias, which OpenVINO adds in float
            return [op.constant(codes.astype(np.float32) * scale).output(0)]
        small = in_four_bits(codes, axis) if self.four_bits else None
        if small is not None:
            source = op.constant(small[0]).output(0)
            scale = scale * small[1].astype(np.float32)
        real = op.convert(source, "f32")
        return [op.multiply(real, op.constant(scale)).output(0)]


@functools.cache
def _stand_in() -> Any:
    """The class of an operator with the shape of its input. OpenVINO's passes that follow the
    translation would drop a FakeQuantize before a concatenation; they do not know this one."""
    import openvino as ov

    class Quantize(ov.Op):
        class_type_info = ov.DiscreteTypeInfo("Quantize", "qtoolkit")

        def __init__(self, inputs: Any = None) -> None:
            super().__init__(self, inputs)

        def validate_and_infer_types(self) -> None:
            self.set_output_type(0, self.get_input_element_type(0), self.get_input_partial_shape(0))

        def clone_with_new_inputs(self, inputs: Any) -> Any:
            return Quantize(inputs)

        def evaluate(self, *arguments: Any) -> bool:
            return False

        def has_evaluate(self) -> bool:
            return False

        def get_type_info(self) -> Any:
            return self.class_type_info

    return Quantize


def _finish(model: Any, codes: Mapping[str, _Codes]) -> None:
    """Puts FakeQuantize where it stands in, and pools that plug-ins compute on codes."""
    from openvino import opset1, opset13
    from openvino.utils import replace_node

    for node in model.get_ordered_ops():
        kind, name = node.get_type_name(), node.get_friendly_name()
        if kind == "Quantize" and name.startswith(_PREFIX):
            name = name.removeprefix(_PREFIX)
            how = codes[name]
            x = node.input_value(0)
            if how.levels != how.quant_max - how.quant_min + 1:
                x = opset13.clamp(x, *map(float, how.limits(False))).output(0)
            limits = [opset13.constant(limit) for limit in how.limits(True)]
            new = opset13.fake_quantize(x, *limits, *limits, how.levels)
            replace_node(node, new)
            # What is alive, though in no graph any more, would count as a reader.
            node.input(0).replace_source_output(opset13.constant(np.float32(0)).output(0))
            new.set_friendly_name(name)
            new.output(0).set_names({name})
        elif kind == "MaxPool" and _rounds_up(node):
            attributes = node.get_attributes()
            ends = _pads_end(node, attributes)
            new = opset1.max_pool(
                node.input_value(0),
                attributes["strides"],
                attributes["pads_begin"],
                ends,
                attributes["kernel"],
            )
            new.set_friendly_name(name)
            node.output(0).replace(new.output(0))
    model.validate_nodes_and_infer_types()


def _store_in_four_bits(model: Any) -> list[np.ndarray]:
    """Makes int4 of the int8 constants that fit, once nothing folds constants any more; gives the
    memory that they use.

    Plug-ins would compute with int4 constants in float. So a Convert to int8 follows, which is
    folded when they load the file.
    """
    import openvino as ov
    from openvino import opset13 as op

    alive = []
    for node in model.get_ordered_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.i8:
            continue
        codes = node.data
        if codes.size == 0 or codes.min() < -8 or codes.max() > 7:
            continue
        packed = _packed(codes)
        alive.append(packed)
        constant = op.constant(ov.Tensor(packed, list(codes.shape), ov.Type.i4))
        node.output(0).replace(op.convert(constant, "i8").output(0))
    return alive


def _rounds_up(node: Any) -> bool:
    """Whether a max pool rounds its output's size up in a way that is executed in float only, and
    can be written as padding."""
    attributes = node.get_attributes()
    sizes = [node.get_input_partial_shape(0), node.get_output_partial_shape(0)]
    return (
        "ceil" in attributes["rounding_type"]
        and not (node.get_output_size() > 1 and node.output(1).get_target_inputs())
        and all(step == 1 for step in attributes.get("dilations", []))
        and all(shape.rank.is_static for shape in sizes)
        and all(size.is_static for shape in sizes for size in list(shape)[2:])
    )


def _pads_end(node: Any, attributes: Mapping[str, Any]) -> list[int]:
    """The padding with which a pool that rounds down gives the same sizes."""
    sizes = (list(port.get_partial_shape())[2:] for port in (node.input(0), node.output(0)))
    return [
        max(0, (y.get_length() - 1) * stride + kernel - x.get_length() - begin)
        for x, y, stride, kernel, begin in zip(
            *sizes, attributes["strides"], attributes["kernel"], attributes["pads_begin"]
        )
    ]


def _packed(codes: np.ndarray) -> np.ndarray:
    """Codes of four bits, two a byte, the lower half first."""
    halves = (codes.astype(np.uint8) & 15).ravel()
    halves = np.pad(halves, (0, halves.size % 2))
    return halves[0::2] | halves[1::2] << 4


def _shape(node: torch.fx.Node) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in node.meta["val"].shape]


def _unsupported(program: QdqProgram, error: Exception) -> UnsupportedError:
    """Names the operators that the frontend could not translate, and their modules."""
    found = re.findall(r"^-- (\S+) with a message", str(error), re.MULTILINE)
    places = []
    for name in dict.fromkeys(found):
        users = [node for node in program.graph.nodes if str(node.target) == name]
        places.append(name + "".join(f" in {program.module_of(node)}" for node in users[:1]))
    what = ", ".join(places) or str(error).strip().splitlines()[-1]
    return UnsupportedError(
        f"OpenVINO has no operators for {what}; nothing was written. Replace it in the model, or "
        "export to another target"
    )


class _Loaded:
    """An IR on OpenVINO's CPU plug-in, in float32 where it is not in codes."""

    def __init__(self, path: Path, codes: Mapping[str, _Codes]) -> None:
        import openvino as ov

        self.version = f"OpenVINO {ov.__version__.split('-')[0]} (CPU)"
        self.core = ov.Core()
        self.model = self.core.read_model(path)
        self.codes = codes
        self.compiled = self._compile(self.model)

    def _compile(self, model: Any) -> Any:
        # It would compute what is left in float in bfloat16 on CPUs that have AMX.
        return self.core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        arrays = [tensor.detach().cpu().contiguous().numpy() for tensor in inputs]
        outputs = self._run(self.compiled, arrays)
        present = {n for op in self.model.get_ops() for o in op.outputs() for n in o.get_names()}
        wanted = [name for name in names if name in self.codes and name in present]
        if not wanted:
            return outputs, {}
        # Values are visible as outputs only, dequantized. A copy of the model has them, so that
        # its own outputs are those of the file as it is.
        model = self.model.clone()
        model.add_outputs(wanted)
        reals = self._run(self._compile(model), arrays)[len(outputs) :]
        return outputs, {name: self.codes[name].of(real) for name, real in zip(wanted, reals)}

    def _run(self, compiled: Any, arrays: list[np.ndarray]) -> list[Tensor]:
        results = compiled(arrays)
        return [torch.from_numpy(results[output].copy()) for output in compiled.outputs]


@register_target("openvino")
class OpenVinoTarget(Target):
    """See ``openvino``."""

    suffix = ".xml"
    fixed_suffix = True
    packages = ("openvino",)
    extra = "openvino"
    integrity = XML_SEAL
    preset = "openvino"
    branches = False

    def __init__(self, *, four_bits: bool = True) -> None:
        self.four_bits = four_bits
        self.model: Any = None
        self.alive: list[Any] = []
        self.codes: dict[str, _Codes] = {}

    def check(self, job: Job) -> None:
        import openvino as ov

        program = job.program
        translator = _Translator(self.four_bits)
        nodes = {node.name: node for node in program.graph.nodes}
        shapes = [ov.PartialShape(_shape(nodes[name])) for name in program.inputs]
        try:
            model = ov.convert_model(
                program.exported, input=shapes, extension=translator.extensions()
            )
        except Exception as error:
            raise _unsupported(program, error) from error
        _finish(model, translator.codes)
        mark_residuals(model)
        if self.four_bits:
            translator.alive += _store_in_four_bits(model)
        for port, name in zip(model.inputs, program.input_names):
            port.get_tensor().set_names({name})
            port.get_node().set_friendly_name(name)
        for port, name in zip(model.outputs, program.output_names):
            port.get_tensor().add_names({name})
            port.get_node().set_friendly_name(name)
        self.model, self.codes, self.alive = model, translator.codes, translator.alive

    def write(self, job: Job, path: Path) -> list[str]:
        import openvino as ov

        try:
            ov.save_model(self.model, path, compress_to_fp16=False)
        except RuntimeError as error:  # it says no more than that its stream failed
            raise OSError(
                f"OpenVINO cannot write {path.name}, is the disk full? {error}"
            ) from error
        return job.float_layers()

    def load(self, path: Path) -> Runner:
        return _Loaded(path, self.codes)


def openvino(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
    dynamic_batch: bool = True,
    min_sqnr: float = 10.0,
    four_bits: bool = True,
) -> ExportReport:
    """Writes a converted model as OpenVINO IR in the form that its plug-ins execute on codes.

    Activations pass a FakeQuantize that has the name of their layer. Weights are stored as codes:
    int8, or int4 where they fit. A layer that stayed in float is written in float, as far as
    OpenVINO has its operators. A convolution and the addition of a residual are one step in
    OpenVINO: their sum is quantized once, even where the model rounds the convolution's output too.

    Args:
        model: the result of ``qt.convert``; one that is only prepared is converted first. It is not
            changed.
        path: the ``.xml``; the weights go into a ``.bin`` beside it. Written under another name and
            renamed when all went well, so that older files stay whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: load the file on OpenVINO's CPU plug-in, run it on the example inputs and compare
            its outputs with the model's, and each layer's codes.
        dynamic_batch: leave the first dimension of the inputs open.
        min_sqnr: dB that each output must reach beside the model's.
        four_bits: store codes as int4 where they fit, up to a factor for each channel; the plug-in
            makes int8 of them when it loads the file.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: OpenVINO lacks an operator of the model; nothing was written.
        ValueError: the model is compiled, or simulates a format in float, or cannot be converted.
        MissingPackageError: ``openvino`` is not installed.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the files cannot be written.
        VerificationError: the file computes something else; nothing is left at ``path``.
    """
    return run_export(
        OpenVinoTarget(four_bits=four_bits),
        model,
        path,
        example_inputs,
        verify=verify,
        dynamic_batch=dynamic_batch,
        min_sqnr=min_sqnr,
    )
