"""ONNX files with QuantizeLinear and DequantizeLinear (QDQ)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.integrity import ONNX_SEAL
from qtoolkit.export.onnx_graph import Lowering, byte_count
from qtoolkit.export.onnx_names import name_interface
from qtoolkit.export.onnx_run import OnnxRuntime
from qtoolkit.export.onnx_translate import translate
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import Runner

#: The first that has 4-bit codes and 16-bit ones.
MIN_OPSET = 21
#: A graph of more bytes keeps its weights in a second file, as protobuf ends at 2 GB.
LARGEST_FILE = 2**31 - 2**24

#: Operators that ONNX Runtime computes on codes, where they lie between codes.
_INTEGER = frozenset(
    {
        "Conv",
        "Gemm",
        "MatMul",
        "Add",
        "Mul",
        "Concat",
        "MaxPool",
        "AveragePool",
        "GlobalAveragePool",
        "Sigmoid",
        "LeakyRelu",
        "Reshape",
        "Flatten",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Slice",
        "Split",
        "Gather",
        "Expand",
        "Tile",
        "ArgMax",
        "Where",
        "DepthToSpace",
        "SpaceToDepth",
        "Identity",
    }
)


def float_operators(model: Any) -> list[str]:
    """Kinds of operators between codes that ONNX Runtime computes in float."""
    kinds = set()
    for node in model.graph:
        # Resize is computed on codes where it only moves them.
        moves = node.op_type == "Resize" and node.attributes.get_string("mode") == "nearest"
        if node.op_type in _INTEGER or moves or node.domain:
            continue
        sources = [value.producer() for value in node.inputs if value is not None]
        # A softmax reads a Clip, see ``Lowering``.
        sources += [s.inputs[0].producer() for s in sources if s and s.op_type == "Clip"]
        reads = any(source and source.op_type == "DequantizeLinear" for source in sources)
        users = [user for value in node.outputs for user in value.consumers()]
        if reads and users and all(user.op_type == "QuantizeLinear" for user in users):
            kinds.add(node.op_type)
    return sorted(kinds)


@register_target("onnx")
class OnnxTarget(Target):
    """See ``onnx``."""

    suffix = ".onnx"
    packages = ("onnx", "onnxscript")
    runtime = ("onnxruntime",)
    extra = "onnx"
    integrity = ONNX_SEAL
    #: The oldest opset that it can be written in.
    min_opset: ClassVar[int] = MIN_OPSET

    def __init__(
        self,
        *,
        opset: int = MIN_OPSET,
        input_names: Sequence[str] | None = None,
        output_names: Sequence[str] | None = None,
        int4_weights: bool = False,
    ) -> None:
        self.opset = opset
        self.input_names, self.output_names = input_names, output_names
        self.int4_weights = int4_weights
        self.model: Any = None

    def lowering(self, model: Any) -> Lowering:
        """The passes that make this target's graph of a translated one."""
        return Lowering(model, int4=self.int4_weights)

    def check(self, job: Job) -> None:
        import onnx

        newest = onnx.defs.onnx_opset_version()
        if not self.min_opset <= self.opset <= newest:
            raise UnsupportedError(
                f"opset {self.opset}: the onnx package that is installed has {newest} at most, and "
                f"the file's codes need {self.min_opset}"
            )
        model = translate(job.program, self.opset)
        self.lowering(model).run()
        name_interface(model, job, self.input_names, self.output_names)
        self.model = model

    def write(self, job: Job, path: Path) -> list[str]:
        import onnx
        import onnx_ir

        warnings = []
        if byte_count(self.model) > LARGEST_FILE:
            onnx_ir.save(self.model, path, external_data=f"{path.name}.data")
            warnings.append(f"the weights are in {path.name}.data, which must stay beside the file")
        else:
            onnx_ir.save(self.model, path)
        onnx.checker.check_model(path, full_check=True)
        if job.program.fixed_batch is not None:
            warnings.append(
                f"the batch size is fixed to that of the example inputs: {job.program.fixed_batch}"
            )
        return warnings + self.notes(path) + job.float_layers()

    def notes(self, path: Path) -> list[str]:
        """What the runtime makes of the written file; raises UnsupportedError if nothing."""
        kinds = float_operators(self.model)
        return [f"ONNX Runtime has no integer kernel for {', '.join(kinds)}"] if kinds else []

    def load(self, path: Path) -> Runner:
        return OnnxRuntime(path)

    def runners(self, path: Path) -> list[Runner]:
        return [OnnxRuntime(path), OnnxRuntime(path, optimize=False)]


def onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
    dynamic_batch: bool = True,
    form: str = "qdq",
    opset: int = MIN_OPSET,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    int4_weights: bool = False,
    encodings_version: str = "1.0.0",
    min_sqnr: float = 10.0,
) -> ExportReport:
    """Writes a model as an ONNX file, in QDQ form or in float with encodings beside it.

    Weights are int8 initializers and biases int32 ones, each behind a DequantizeLinear and in the
    file once. Codes have the name of the layer that makes them. ONNX Runtime computes convolutions,
    linear layers, sums, products, concatenations and pools between codes on codes; the report names
    what it does not. A linear layer whose result is read in float, such as the last one, gives its
    integer sums as float32; a convolution there is computed in float.

    With ``form="encodings"`` the file is the float model, batch norms folded, for toolchains that
    quantize it themselves, such as Qualcomm's: ``<stem>.encodings`` beside it names tensors of the
    file with their scales and offsets, in AIMET's format. The file's outputs must be the float
    model's to 60 dB.

    Args:
        model: the result of ``qt.convert``; one that is only prepared (and calibrated or trained)
            is converted first, but for encodings, which are then those of its observers. Encodings
            of a converted model come with its weights as they were rounded. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails. Beyond 2 GB the weights are in a second file
            beside it, ``<path>.data``.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: run the file in ONNX Runtime, optimized and not, and compare it with the model.
        form: "qdq" or "encodings".
        dynamic_batch: the first dimension is free, under the name ``batch``. Where the model fixes
            it the report says why.
        opset: version of ONNX's operators, 21 or more.
        input_names: of the file's inputs; those of ``model.forward`` by default.
        output_names: of its outputs; the keys of a dict by default, else ``output``.
        int4_weights: store weights whose codes fit in 4 bits so, in "qdq" form. Runtimes that have
            no 4-bit kernel compute with them in float.
        encodings_version: "1.0.0" or "0.6.1", of the format of encodings.
        min_sqnr: see ``registry.run_export``.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: an operator has no translation, or there is no such opset; nothing was
            written.
        ValueError: the model has no QDQ form, the names do not fit it, or there is no such form.
        RuntimeError: the model is only prepared, and has seen no data.
        MissingPackageError: a package is absent; the message gives the command.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        VerificationError: the file computes something else; nothing is left at ``path``.
    """
    if form == "encodings":
        from qtoolkit.export.encodings import MIN_SQNR, EncodingsTarget

        target: OnnxTarget = EncodingsTarget(
            opset=opset,
            input_names=input_names,
            output_names=output_names,
            version=encodings_version,
        )
        min_sqnr = max(min_sqnr, MIN_SQNR)
    elif form == "qdq":
        target = OnnxTarget(
            opset=opset,
            input_names=input_names,
            output_names=output_names,
            int4_weights=int4_weights,
        )
    else:
        raise ValueError(f'export.onnx: form must be "qdq" or "encodings", got {form!r}')
    return run_export(
        target,
        model,
        path,
        example_inputs,
        verify=verify,
        dynamic_batch=dynamic_batch,
        min_sqnr=min_sqnr,
    )
