"""TFLite files, computed on int8 codes."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtoolkit._version import __version__
from qtoolkit.export import (  # noqa: F401  they register
    tflite_layers,
    tflite_movers,
    tflite_operators,
    tflite_windows,
)
from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.integrity import TFLITE_SEAL
from qtoolkit.export.program import QdqProgram
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.tflite_flatbuffer import FlatbufferModel
from qtoolkit.export.tflite_graph import Lowering
from qtoolkit.export.tflite_program import FLOATS, INTEGERS, MOVERS, quantize_outputs
from qtoolkit.export.tflite_values import HIGHEST, LOWEST, NHWC, FixedBatchError
from qtoolkit.export.verify import Runner

#: Where the file says in which layout its inputs and outputs are.
_METADATA = "qtoolkit"
_LAYOUTS = ("nhwc", "nchw")
#: Operators that have a translation.
KNOWN = frozenset(FLOATS) | frozenset(INTEGERS) | frozenset(MOVERS)
#: A flatbuffer ends at 2 GB.
_LARGEST = 2**31 - 2**24


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(dim) for dim in range(len(order))]


class _LiteRt:
    """A file in LiteRT on the CPU.

    Attributes:
        version: name and version, and what computes.
        coarse: see ``verify.Runner``.
    """

    coarse: frozenset[str] = frozenset()

    def __init__(
        self,
        path: Path,
        orders: Mapping[str, tuple[int, ...]],
        unsigned: set[str],
        *,
        xnnpack: bool = True,
    ) -> None:
        import ai_edge_litert
        from ai_edge_litert.interpreter import OpResolverType

        kernels = "XNNPACK" if xnnpack else "its own kernels"
        self.version = f"LiteRT {ai_edge_litert.__version__} (CPU, {kernels})"
        self._content = path.read_bytes()
        self._orders, self._unsigned = orders, unsigned
        plain = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._resolver = OpResolverType.BUILTIN if xnnpack else plain
        self._nhwc = _layout(self._content) == "nhwc"
        self._interpreter = self._load()
        self._shapes: list[tuple[int, ...]] = []

    def _load(self, **options: Any) -> Any:
        from ai_edge_litert.interpreter import Interpreter

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that tensors are kept for inspection
            return Interpreter(
                model_content=self._content,
                experimental_op_resolver_type=self._resolver,
                num_threads=torch.get_num_threads(),
                **options,
            )

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """See ``verify.Runner``. Codes come from a run in which no operators are fused."""
        details = self._interpreter.get_input_details()
        arrays = [self._stored(tensor, d) for tensor, d in zip(inputs, details)]
        shapes = [array.shape for array in arrays]
        if shapes != self._shapes:
            self._allocate(self._interpreter, shapes)
            self._shapes = shapes
        outputs = self._invoke(self._interpreter, arrays)
        if not names:
            return outputs, {}
        interpreter = self._load(
            experimental_preserve_all_tensors=True, experimental_disable_delegate_node_fusion=True
        )
        self._allocate(interpreter, shapes)
        self._invoke(interpreter, arrays)
        places = {t["name"]: t["index"] for t in interpreter.get_tensor_details()}
        found = {}
        for name in names:
            if name in self._orders and name in places:
                codes = interpreter.get_tensor(places[name]).transpose(_inverse(self._orders[name]))
                tensor = torch.from_numpy(codes.copy())
                if name in self._unsigned:
                    tensor = (tensor.to(torch.int16) + 128).to(torch.uint8)
                found[name] = tensor
        return outputs, found

    def _stored(self, tensor: Tensor, details: Mapping[str, Any]) -> np.ndarray:
        array = tensor.detach().cpu().numpy()
        scale, zero_point = details["quantization"]
        if scale and array.dtype == np.float32:
            steps = np.rint(array * (np.float32(1) / np.float32(scale))) + zero_point
            array = np.clip(steps, LOWEST, HIGHEST).astype(np.int8)
        array = array.transpose(NHWC) if self._nhwc and array.ndim == 4 else array
        return np.ascontiguousarray(array)

    @staticmethod
    def _allocate(interpreter: Any, shapes: list[tuple[int, ...]]) -> None:
        for details, shape in zip(interpreter.get_input_details(), shapes):
            if tuple(details["shape"]) != shape:
                interpreter.resize_tensor_input(details["index"], shape, strict=True)
        interpreter.allocate_tensors()

    def _invoke(self, interpreter: Any, arrays: list[np.ndarray]) -> list[Tensor]:
        for details, array in zip(interpreter.get_input_details(), arrays):
            interpreter.set_tensor(details["index"], array)
        interpreter.invoke()
        results = []
        for details in interpreter.get_output_details():
            array = interpreter.get_tensor(details["index"])
            scale, zero_point = details["quantization"]
            if scale:
                array = (array.astype(np.float32) - zero_point) * np.float32(scale)
            if self._nhwc and array.ndim == 4:
                array = array.transpose(_inverse(NHWC))
            results.append(torch.from_numpy(np.ascontiguousarray(array)))
        return results


def _layout(content: bytes) -> str:
    """In which layout a file has its inputs and outputs."""
    import tflite

    model = tflite.Model.GetRootAs(content, 0)
    for index in range(model.MetadataLength()):
        entry = model.Metadata(index)
        if entry.Name() == _METADATA.encode():
            data = model.Buffers(entry.Buffer()).DataAsNumpy()
            return str(json.loads(bytes(data))["layout"])
    return "nhwc"


@register_target("tflite")
class TfliteTarget(Target):
    """See ``tflite``."""

    suffix = ".tflite"
    packages = ("tflite", "flatbuffers")
    runtime = ("ai-edge-litert",)
    extra = "tflite"
    integrity = TFLITE_SEAL
    preset = "tflite"

    def __init__(self, *, layout: str = "nhwc", integer: bool = False) -> None:
        if layout not in _LAYOUTS:
            raise ValueError(f"layout {layout!r}: use one of {', '.join(_LAYOUTS)}")
        self.layout, self.integer = layout, integer
        self.model = FlatbufferModel()
        self.orders: dict[str, tuple[int, ...]] = {}
        self.unsigned: set[str] = set()
        self.coarse: set[str] = set()
        self.fixed_batch: str | None = None

    def check(self, job: Job) -> None:
        self.fixed_batch = job.program.fixed_batch
        lowering = self._lower(job)
        if self.integer:
            quantize_outputs(lowering.program, job.expected)
            job.program = lowering.program
            lowering = self._lower(job)
        self.model, self.orders = lowering.model, lowering.orders
        self.unsigned, self.coarse = lowering.unsigned, lowering.coarse
        size = sum(t.data.nbytes for t in self.model.tensors if t.data is not None)
        if size > _LARGEST:
            raise UnsupportedError(f"{size / 1e9:.1f} GB of weights: a TFLite file ends at 2 GB")
        about = {"version": __version__, "pytorch": str(torch.__version__), "layout": self.layout}
        self.model.metadata[_METADATA] = json.dumps(about).encode()

    def _lower(self, job: Job) -> Lowering:
        fixed = not job.dynamic_batch or self.fixed_batch is not None
        try:
            return self._lowered(job.program, fixed)
        except UnsupportedError:
            simpler = job.program.decomposed(KNOWN)
            if simpler is job.program:
                raise
            return self._lowered(simpler, fixed)

    def _lowered(self, program: QdqProgram, fixed: bool) -> Lowering:
        options = {"nhwc": self.layout == "nhwc", "integer": self.integer}
        lowering = Lowering(program, fixed=fixed, **options)
        try:
            lowering.run()
        except FixedBatchError as error:
            self.fixed_batch = str(error)
            lowering = Lowering(program, fixed=True, **options)
            lowering.run()
        return lowering

    def write(self, job: Job, path: Path) -> list[str]:
        path.write_bytes(self.model.to_bytes())
        notes = job.float_layers()
        if self.fixed_batch is not None:
            why = f"the batch size is fixed to that of the example inputs: {self.fixed_batch}"
            notes.insert(0, why)
        return notes

    def load(self, path: Path) -> Runner:
        return _LiteRt(path, self.orders, self.unsigned)

    def runners(self, path: Path) -> list[Runner]:
        plain = _LiteRt(path, self.orders, self.unsigned, xnnpack=False)
        plain.coarse = frozenset(self.coarse)
        return [self.load(path), plain]


def tflite(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
    dynamic_batch: bool = True,
    layout: str = "nhwc",
    integer: bool = False,
    min_sqnr: float = 10.0,
) -> ExportReport:
    """Writes a converted model as a TFLite file that computes on int8 codes.

    Activations are int8 with one scale and a zero point (uint8 codes are written 128 lower),
    weights int8 with a scale for each output channel, biases int32. Codes have the name of the
    layer that makes them. Inputs and outputs are float32. A layer that stayed in float, or whose
    result is read in float such as the last one, is computed in float from the same codes.

    Args:
        model: the result of ``qt.convert``; one that is only prepared is converted first. It is not
            changed. The preset "tflite" suits it.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: run the file in LiteRT, with XNNPACK as it is by default and without, and compare it
            with the model.
        dynamic_batch: let ``resize_tensor_input`` give the inputs another batch than that of the
            example inputs, which the file has. Where the model or an operator fixes it the report
            says why.
        layout: of inputs and outputs of four dimensions: "nhwc", or "nchw" as in PyTorch, for which
            they are transposed in the file.
        integer: keep to integers, for devices without floats. Inputs and outputs are int8; layers
            whose result is read in float are computed on codes too, in the range that the model's
            outputs have on the example inputs, so give typical ones; functions such as SiLU are
            tables of codes. What has no integer form stays in float.
        min_sqnr: see ``registry.run_export``.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: an operator or a format has no form in TFLite; nothing was written.
        ValueError: the model has no QDQ form, or there is no such layout.
        MissingPackageError: a package is absent; the message gives the command.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        VerificationError: the file computes something else; nothing is left at ``path``.
    """
    return run_export(
        TfliteTarget(layout=layout, integer=integer),
        model,
        path,
        example_inputs,
        verify=verify,
        dynamic_batch=dynamic_batch,
        min_sqnr=min_sqnr,
    )
