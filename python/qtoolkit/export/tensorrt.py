"""ONNX files under TensorRT's rules of explicit quantization."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.onnx import OnnxTarget
from qtoolkit.export.onnx_graph import Lowering
from qtoolkit.export.onnx_run import OnnxRuntime
from qtoolkit.export.program import QUANTIZE, QdqProgram
from qtoolkit.export.registry import Job, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.tensorrt_engine import TensorRtEngine, why_no_engine
from qtoolkit.export.tensorrt_rules import violations
from qtoolkit.export.verify import Runner

#: The newest that every parser of TensorRT 10 reads (onnx-tensorrt, docs/operators.md).
OPSET = 20


def _symmetric(program: QdqProgram) -> None:
    """Makes the codes of a program those of TensorRT, in place.

    Presets leave -128 out of symmetric codes. TensorRT saturates at -128: a clip that prevents it
    would stand between a layer and its QuantizeLinear, as a step of its own.

    Raises:
        UnsupportedError: codes are unsigned, or have a zero point; names their layer.
    """
    for node in program.graph.nodes:
        if node.target is not QUANTIZE:
            continue
        x, scale, zero_point, low, high, name = node.args
        constant = program.constant(zero_point)
        offset = 0 if constant is None else int(constant)
        if low >= 0 or offset != 0:
            raise UnsupportedError(
                f"{name} has {'uint8' if low >= 0 else 'int8'} codes with zero point {offset}, and "
                "TensorRT takes int8 codes with zero point 0 alone: prepare the model with "
                'qt.get_default_qconfig_mapping("tensorrt"), or '
                'qt.get_default_qat_qconfig_mapping("tensorrt")'
            )
        if (low, high) == (-127, 127):
            node.args = (x, scale, zero_point, -128, high, name)


@register_target("tensorrt")
class TensorRtTarget(OnnxTarget):
    """See ``tensorrt``."""

    preset = "tensorrt"
    # Q/DQ between a convolution and an addition would keep them from being one kernel.
    branches = False
    min_opset = 13

    def __init__(
        self,
        *,
        opset: int = OPSET,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(opset=opset, input_names=input_names, output_names=output_names)

    def lowering(self, model: Any) -> Lowering:
        return Lowering(model, biases="float32", clips="float", onnxruntime=False)

    def check(self, job: Job) -> None:
        _symmetric(job.program)
        super().check(job)

    def notes(self, path: Path) -> list[str]:
        import onnx

        found = violations(onnx.load(path))  # onnx.checker has seen it when it was written
        blocking = [str(violation) for violation in found if violation.blocks]
        if blocking:
            more = f" (and {len(blocking) - 1} more)" if len(blocking) > 1 else ""
            raise UnsupportedError(f"TensorRT would refuse the file: {blocking[0]}{more}")
        why = why_no_engine()
        engine = f"checked against TensorRT's rules, but no engine was built: {why}"
        return [*map(str, found), *([engine] if why else [])]

    def load(self, path: Path) -> Runner:
        return OnnxRuntime(path, optimize=False) if why_no_engine() else TensorRtEngine(path)

    def runners(self, path: Path) -> list[Runner]:
        literal = OnnxRuntime(path, optimize=False)
        return [literal] if why_no_engine() else [literal, TensorRtEngine(path)]


def tensorrt(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
    dynamic_batch: bool = True,
    opset: int = OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    min_sqnr: float = 10.0,
) -> ExportReport:
    """Writes a converted model as an ONNX file that TensorRT builds an int8 engine of.

    All codes are int8 with zero point 0. Weights are int8 initializers behind DequantizeLinear
    (TensorRT 10 and newer), biases float32. The inputs of quantized layers pass QuantizeLinear and
    DequantizeLinear, so do residuals; a convolution, the addition after it and ReLU follow each
    other, so that they are one kernel. Symmetric codes that end at -127 here end at -128 in the
    file, as in TensorRT.

    The file is checked against TensorRT's rules node by node, see ``check_tensorrt``.

    Args:
        model: the result of ``qt.convert`` with the preset ``"tensorrt"``; one that is only
            prepared is converted first. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails. Beyond 2 GB the weights are in a second file
            beside it, ``<path>.data``.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: run the file in ONNX Runtime without optimizations, which computes it literally,
            and compare it with the model, layer by layer; and where ``tensorrt`` is installed and
            there is a GPU, build an engine, run it and compare its outputs.
        dynamic_batch: the first dimension is free, under the name ``batch``; an engine needs an
            optimization profile for it then.
        opset: version of ONNX's operators; every TensorRT 10 reads 20.
        input_names: of the file's inputs; those of ``model.forward`` by default.
        output_names: of its outputs; the keys of a dict by default, else ``output``.
        min_sqnr: see ``registry.run_export``.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: the model has asymmetric or unsigned codes, an operator has no
            translation, TensorRT would refuse the file, or there is no such opset; nothing was
            written.
        ValueError: the model has no QDQ form, or the names do not fit it.
        MissingPackageError: a package is absent; the message gives the command.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        VerificationError: the file computes something else, or TensorRT cannot build an engine of
            it; nothing is left at ``path``.
    """
    target = TensorRtTarget(opset=opset, input_names=input_names, output_names=output_names)
    return run_export(
        target,
        model,
        path,
        example_inputs,
        verify=verify,
        dynamic_batch=dynamic_batch,
        min_sqnr=min_sqnr,
    )
