"""The files of torch.export and of AOTInductor."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from qtoolkit.export.errors import MissingPackageError, UnsupportedError
from qtoolkit.export.files import write_buffered
from qtoolkit.export.integrity import ZipChecksums
from qtoolkit.export.program import trace
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import ModuleRunner, Runner


def _said(error: Exception) -> str:
    """The first line of an error of torch.export, and the line of the model that it is about."""
    what, _, place = str(error).strip().partition("The following call raised this error:")
    return " ".join([*what.splitlines()[:1], *map(str.strip, place.strip().splitlines()[:2])])


def _is_aot_inductor(path: Path) -> bool:
    """Whether a file is a package of AOTInductor, not a program."""
    with zipfile.ZipFile(path) as archive:
        return any("/data/aotinductor/" in name for name in archive.namelist())


def _computes_in_float(program: ExportedProgram) -> bool:
    """Whether anything but qtoolkit's operators gives floats: Inductor compiles such layers, and
    may add in another order."""
    for node in program.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        result = node.meta.get("val")
        is_float = isinstance(result, Tensor) and result.is_floating_point()
        if is_float and node.target.namespace != "qtoolkit" and not node.target.is_view:
            return True
    return False


@register_target("pt2")
class Pt2Target(Target):
    """See ``pt2``."""

    suffix = ".pt2"
    integrity = ZipChecksums()
    gives_codes = False

    def __init__(self, *, aot_inductor: bool = False) -> None:
        self.aot_inductor = aot_inductor
        self.example_inputs: tuple[Any, ...] | None = None

    def check(self, job: Job) -> None:
        if self.aot_inductor:
            from torch._inductor.cpp_builder import get_cpp_compiler
            from torch._inductor.exc import InvalidCxxCompiler

            try:
                get_cpp_compiler()
            except InvalidCxxCompiler as error:
                raise MissingPackageError(
                    "export.pt2 with aot_inductor=True needs a C++ compiler, and none was found: "
                    "install g++ or clang++, or name one in the environment variable CXX"
                ) from error

    def write(self, job: Job, path: Path) -> list[str]:
        self.example_inputs = job.example_inputs
        try:
            program, fixed = trace(job.model, job.example_inputs, dynamic_batch=job.dynamic_batch)
        except Exception as error:
            raise UnsupportedError(
                f"export.pt2: torch.export cannot trace this model; nothing was written. It says: "
                f"{_said(error)}"
            ) from error
        self.exact = not (self.aot_inductor and _computes_in_float(program))
        if self.aot_inductor:
            torch._inductor.aoti_compile_and_package(program, package_path=os.fspath(path))
        else:
            # A batch of one is traced as two, which the file need not know.
            program.example_inputs = (job.example_inputs, {})
            write_buffered(lambda file: torch.export.save(program, file), path)
        warnings = job.float_layers()
        if not self.exact:
            warnings.append("Inductor compiled what is in float, which may round differently")
        if fixed is not None:
            warnings.insert(0, f"the file takes the batch of the example inputs alone: {fixed}")
        return warnings

    def load(self, path: Path) -> Runner:
        if _is_aot_inductor(path):
            name = "AOTInductor"
            module: Any = torch._inductor.aoti_load_package(os.fspath(path))
        else:
            name, module = "torch.export", torch.export.load(path).module()
        version = f"{name} of PyTorch {torch.__version__}"
        return ModuleRunner(module, version, self.example_inputs)


def pt2(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic_batch: bool = True,
    verify: bool = True,
    aot_inductor: bool = False,
    min_sqnr: float = 40.0,
) -> ExportReport:
    """Writes a converted or compiled model as a program of ``torch.export``, or compiled by
    AOTInductor.

    The file holds the integer model itself, operators of ``torch.ops.qtoolkit`` and every weight as
    codes, and gives the model's bits. To load it a program needs these operators: ``import
    qtoolkit`` in Python, ``libqtoolkit_ops.so`` in C++.

    A model compiled with ``qt.compile`` runs as the plan that it is, for images of the size of the
    example; a converted one is a graph that ``torch.compile`` and other tools can go on with.

    Args:
        model: the result of ``qt.convert`` or ``qt.compile``; one that is only prepared is
            converted first. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        dynamic_batch: let the file take other batch sizes. Where the model has but one, a warning
            of the report says why.
        verify: load the file again, run it on the example inputs and require the model's bits.
        aot_inductor: compile the program with a C++ compiler into a package for
            ``torch._inductor.aoti_load_package`` and for C++, instead of one for
            ``torch.export.load``. Layers that stayed float are compiled too and may round
            differently; without such layers the bits are the model's.
        min_sqnr: dB that each output must reach beside the model's where bits may differ.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: ``torch.export`` cannot trace the model; nothing was written.
        ValueError: the model simulates a format in float, or cannot be converted.
        RuntimeError: the model is only prepared, and has seen no data.
        MissingPackageError: ``aot_inductor`` without a C++ compiler.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written.
        VerificationError: the loaded file computes something else; nothing is left at ``path``.
    """
    return run_export(
        Pt2Target(aot_inductor=aot_inductor),
        model,
        path,
        example_inputs,
        dynamic_batch=dynamic_batch,
        verify=verify,
        min_sqnr=min_sqnr,
    )
