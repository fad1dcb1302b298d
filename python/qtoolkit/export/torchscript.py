"""TorchScript: one file that Python and C++ programs load."""

from __future__ import annotations

import os
import warnings as python_warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.files import write_buffered
from qtoolkit.export.integrity import ZipChecksums
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import ModuleRunner, Runner


def _script(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """Scripts a model; traces it on the example inputs where it cannot be scripted."""
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        try:
            return torch.jit.script(model), []
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
        try:
            traced = torch.jit.trace(model, example_inputs)
        except Exception as error:
            raise UnsupportedError(
                f"export.torchscript: the model can be neither scripted ({reason}) nor traced "
                f"({str(error).strip().splitlines()[0]}); nothing was written"
            ) from error
    return traced, [
        f"the model could not be scripted ({reason}); it was traced on the example inputs, so its "
        "control flow is fixed as it ran on them"
    ]


@register_target("torchscript")
class TorchScriptTarget(Target):
    """See ``torchscript``."""

    suffix = ".pt"
    integrity = ZipChecksums()
    exact = True

    def __init__(self) -> None:
        self.example_inputs: tuple[Any, ...] | None = None

    def write(self, job: Job, path: Path) -> list[str]:
        self.example_inputs = job.example_inputs
        with torch.no_grad():
            scripted, warnings = _script(job.model, job.example_inputs)
        write_buffered(lambda file: torch.jit.save(scripted, file), path)
        return warnings + job.float_layers()

    def load(self, path: Path) -> Runner:
        version = f"TorchScript of PyTorch {torch.__version__}"
        return ModuleRunner(torch.jit.load(path), version, self.example_inputs)


def torchscript(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
) -> ExportReport:
    """Writes a converted or compiled model as a TorchScript file.

    The file holds every weight once, as codes. To load it a program needs the operators: ``import
    qtoolkit`` in Python, ``libqtoolkit_ops.so`` (and LibTorch alone) in C++.

    Args:
        model: the result of ``qt.convert`` or ``qt.compile`` (any scriptable module works); one
            that is only prepared is converted first. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: load the file again, run it on the example inputs and require the model's bits.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: the model can be neither scripted nor traced; nothing was written.
        ValueError: the model simulates a format in float, or cannot be converted.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written.
        VerificationError: the loaded file computes something else; nothing is left at ``path``.
    """
    return run_export(TorchScriptTarget(), model, path, example_inputs, verify=verify)
