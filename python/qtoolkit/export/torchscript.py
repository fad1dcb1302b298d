"""TorchScript: one file that Python and C++ programs load."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings as python_warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.export.report import ExportReport
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _difference(a: Any, b: Any) -> float:
    """Largest absolute difference; infinite where structure or shapes differ."""
    first, second = _tensors(a), _tensors(b)
    if len(first) != len(second) or any(x.shape != y.shape for x, y in zip(first, second)):
        return float("inf")
    differences = [
        (x.double() - y.double()).abs().nan_to_num(nan=0.0).max().item()
        for x, y in zip(first, second)
        if x.numel() and not torch.equal(x, y)
    ]
    return max(differences, default=0.0)


def _script(model: nn.Module, example_inputs: tuple[Any, ...]) -> tuple[Any, list[str]]:
    """Scripts a model; traces it on the example inputs where it cannot be scripted."""
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore")
        try:
            return torch.jit.script(model), []
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
        traced = torch.jit.trace(model, example_inputs)
    return traced, [
        f"the model could not be scripted ({reason}); it was traced on the example inputs, so its "
        "control flow is fixed as it ran on them"
    ]


def torchscript(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
) -> ExportReport:
    """Writes a converted model as a TorchScript file.

    The file holds every weight once, as codes. To load it a program needs the operators: ``import
    qtoolkit`` in Python, ``libqtoolkit_ops.so`` (and LibTorch alone) in C++.

    Args:
        model: the result of ``qt.convert`` (any scriptable module works); it is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: load the file again, run it on the example inputs and require the model's bits.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        ValueError: the model is prepared, not converted, or simulates a format in float.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        RuntimeError: the loaded file computes something else; nothing is left at ``path``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"torchscript needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise TypeError(
            "example_inputs must be a non-empty tuple of what the model's forward takes; got "
            f"{type(example_inputs).__name__}"
        )
    if any(is_observer(module) for module in model.modules()):
        report = get_report(model)
        if report is not None and report.converted:
            raise ValueError(
                "this model simulates formats that have no integer kernel (see qt.explain), which "
                "TorchScript cannot hold: prepare it with integer formats of up to 8 bits"
            )
        raise ValueError("this model is prepared, not quantized: export the result of qt.convert")
    target = Path(os.path.realpath(path))  # a link's target is replaced, not the link
    if not os.fspath(path) or target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)!r}: the path must name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    example_inputs = tuple(example_inputs)
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        expected = model(*copy.deepcopy(example_inputs))
    scripted, warnings = _script(model, example_inputs)

    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    temporary = Path(name)
    difference = None
    try:
        torch.jit.save(scripted, temporary)
        if verify:
            loaded = torch.jit.load(temporary)
            with torch.no_grad():
                difference = _difference(expected, loaded(*copy.deepcopy(example_inputs)))
            if difference != 0.0:
                raise RuntimeError(
                    f"the TorchScript of this model differs from it by up to {difference:g} on the "
                    "example inputs; nothing was written"
                )
        temporary.chmod(0o644)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return ExportReport(target, target.stat().st_size, verify, difference, warnings)
