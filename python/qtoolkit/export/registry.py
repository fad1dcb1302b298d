"""Export targets: what each is, and the way that all of them go."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from qtoolkit.export.errors import MissingPackageError
from qtoolkit.export.files import staged
from qtoolkit.export.integrity import Integrity
from qtoolkit.export.program import QdqProgram, tensors_of
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import Runner, verify_file
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report
from qtoolkit.saving import InvalidFileError
from qtoolkit.workflow import convert


@dataclass
class Job:
    """A model on its way into a file.

    Attributes:
        model: a copy of the converted model, in eval mode on the CPU.
        example_inputs: the arguments of its ``forward``.
        dynamic_batch: whether the file shall take other batch sizes.
        branches: see ``graph.qdq.to_qdq``.
    """

    model: nn.Module
    example_inputs: tuple[Any, ...]
    dynamic_batch: bool
    branches: bool = True

    @cached_property
    def program(self) -> QdqProgram:
        """The model in QDQ form.

        Raises:
            ValueError: it has none, see ``graph.qdq.to_qdq``.
        """
        return QdqProgram.trace(
            self.model,
            self.example_inputs,
            dynamic_batch=self.dynamic_batch,
            branches=self.branches,
        )

    @cached_property
    def expected(self) -> list[Tensor]:
        """The model's outputs on the example inputs."""
        with torch.no_grad():
            return tensors_of(self.model(*copy.deepcopy(self.example_inputs)))

    def float_layers(self) -> list[str]:
        """A warning for the layers that stayed in float, by reason."""
        report = get_report(self.model)
        layers = [] if report is None else report.floats + report.uncaptured
        reasons: dict[str, list[str]] = {}
        for layer in layers:
            reasons.setdefault(layer.reason, []).append(layer.name)
        return [
            f"in float ({reason}): {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            for reason, names in reasons.items()
        ]


class Target:
    """One runtime's file format. An instance holds the options of one export.

    A subclass registers with ``@register_target("name")``, and can be made without arguments.
    """

    #: Set by ``register_target``.
    name: ClassVar[str] = ""
    #: Of its file.
    suffix: ClassVar[str] = ""
    #: Packages that writing needs, and the name of the extra that brings them; pip's names.
    packages: ClassVar[Sequence[str]] = ()
    #: Packages that verifying needs beside them.
    runtime: ClassVar[Sequence[str]] = ()
    extra: ClassVar[str] = ""
    #: The target of ``get_default_qconfig_mapping`` that suits it.
    preset: ClassVar[str] = "x86"
    #: Whether the file must give the model's bits. ``check`` and ``write`` may still set it.
    exact: bool = False
    #: How its files show damage; None where the loader itself finds it.
    integrity: ClassVar[Integrity | None] = None
    #: Whether its runtime gives the codes of quantized layers, which are then compared one by one.
    gives_codes: ClassVar[bool] = True
    #: Whether a model that is only prepared is converted first.
    converts: ClassVar[bool] = True
    #: Whether a residual's other branch has codes before the addition, see ``graph.qdq.to_qdq``.
    branches: ClassVar[bool] = True
    #: Whether its runtime takes files of no other suffix.
    fixed_suffix: ClassVar[bool] = False

    def check(self, job: Job) -> None:
        """Raises UnsupportedError, naming operator and module, if the target cannot hold the
        model."""

    def write(self, job: Job, path: Path) -> list[str]:
        """Writes the file, and others beside it if it has some; gives warnings."""
        raise NotImplementedError

    def load(self, path: Path) -> Runner:
        """Loads the file in its runtime."""
        raise NotImplementedError

    def runners(self, path: Path) -> list[Runner]:
        """The file in each way that its runtime runs it, all of which are verified; the report
        tells of the first."""
        return [self.load(path)]


_TARGETS: dict[str, type[Target]] = {}
_T = TypeVar("_T", bound=type[Target])


def register_target(name: str) -> Any:
    """Class decorator that adds a target under a name."""

    def register(cls: _T) -> _T:
        cls.name = name
        _TARGETS[name] = cls
        return cls

    return register


def _version(package: str) -> str | None:
    """The version of an installed package, "" for a variant under another name, such as
    onnxruntime-gpu; None if it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None if importlib.util.find_spec(package.replace("-", "_")) is None else ""


@dataclass(frozen=True)
class TargetInfo:
    """What a target needs.

    Attributes:
        name: of the target and of its function in ``qtoolkit.export``.
        suffix: of its file.
        preset: the target of ``qt.get_default_qconfig_mapping`` that suits it.
        packages: packages it needs to write and to verify, with the installed versions; None for
            one that is absent.
        install: the command that installs what is absent; "" if nothing is.
    """

    name: str
    suffix: str
    preset: str
    packages: Mapping[str, str | None]
    install: str

    @property
    def available(self) -> bool:
        """Whether all packages are installed."""
        return None not in self.packages.values()


def targets() -> dict[str, TargetInfo]:
    """All targets by name, with what each needs installed."""
    result = {}
    for name, cls in _TARGETS.items():
        packages = {p: _version(p) for p in (*cls.packages, *cls.runtime)}
        missing = None in packages.values()
        install = f"pip install 'qtoolkit[{cls.extra}]'" if missing else ""
        result[name] = TargetInfo(name, cls.suffix, cls.preset, packages, install)
    return result


def _require(target: Target, packages: Sequence[str], purpose: str) -> None:
    missing = [package for package in packages if _version(package) is None]
    if missing:
        raise MissingPackageError(
            f"{purpose} needs {', '.join(missing)}, not installed: pip install "
            f"'qtoolkit[{target.extra}]' (or pip install {' '.join(missing)})"
        )


class LoadedModel:
    """An exported file in its runtime, called like the model: tensors in, tensors out.

    Attributes:
        version: the runtime's name and version.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.version = runner.version

    def __call__(self, *inputs: Tensor) -> Any:
        """The output, or a tuple where there are several.

        Raises:
            TypeError: an input is no tensor.
        """
        for number, x in enumerate(inputs):
            if not isinstance(x, Tensor):
                raise TypeError(f"input {number} must be a tensor, got {type(x).__name__}")
        outputs, _ = self._runner.run(list(inputs), ())
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def load(target: str, path: str | os.PathLike[str]) -> LoadedModel:
    """Loads an exported file in the runtime it is for, to evaluate it: ``qt.evaluate(qt.export.load
    ("onnx", "m.onnx"), loader)``.

    Args:
        target: its name, see ``targets``.
        path: the file.

    Raises:
        ValueError: there is no such target.
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a folder.
        InvalidFileError: it is damaged, or no file of that target. A damaged one is found before
            its runtime reads it; see ``integrity``.
        MissingPackageError: a package is absent; the message gives the command.
    """
    if target not in _TARGETS:
        raise ValueError(f"unknown target {target!r}: use one of {', '.join(_TARGETS)}")
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)!r} is a folder; give the file in it")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}")
    instance = _TARGETS[target]()
    _require(instance, (*instance.packages, *instance.runtime), f"export.load({target!r})")
    if instance.integrity is not None:
        instance.integrity.check(Path(path))
    try:
        runner = instance.load(Path(path))
    except (ImportError, OSError, MemoryError, InvalidFileError):
        raise
    except Exception as error:  # each runtime has its own
        reason = str(error).strip() or type(error).__name__
        raise InvalidFileError(
            f"{path} cannot be loaded by export.load({target!r}): {reason}"
        ) from error
    return LoadedModel(runner)


def _inputs(example_inputs: Any, target: str) -> tuple[Any, ...]:
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise TypeError(
            f"export.{target}: example_inputs must be a non-empty tuple of what the model's "
            f"forward takes; got {type(example_inputs).__name__}"
        )
    return copy.deepcopy(tuple(example_inputs))


def _check_inputs(model: nn.Module, inputs: tuple[Any, ...], target: str) -> None:
    """Raises ValueError if nothing could be verified with the inputs, or the model cannot compute
    them, which each exporter would say in words of its own."""
    for x in tensors_of(inputs):
        if x.numel() == 0:
            raise ValueError(
                f"export.{target}: example_inputs hold an empty tensor of shape {list(x.shape)}, "
                "with which nothing can be verified"
            )
        if x.is_floating_point() and not bool(x.isfinite().all()):
            raise ValueError(f"export.{target}: example_inputs hold NaN or Inf")
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        given = ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors_of(inputs))
        raise ValueError(
            f"export.{target}: the model cannot compute example_inputs ({given}): {error}"
        ) from error


def _is_float(model: nn.Module) -> bool:
    """Whether nothing in it is quantized."""
    return not any(type(module).__module__.startswith("qtoolkit.nn.") for module in model.modules())


def _copied(model: Any, target: str, converts: bool) -> nn.Module:
    """A copy of the model in eval mode on the CPU, converted if it is only prepared."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"export.{target} needs a torch.nn.Module, got {type(model).__name__}")
    report = get_report(model)
    if report is not None and not report.converted:
        return convert(model).eval().cpu() if converts else copy.deepcopy(model).eval().cpu()
    if any(is_observer(module) for module in model.modules()):
        raise ValueError(
            f"export.{target}: this model simulates formats that have no integer kernel (see "
            "qt.explain), which a file cannot hold: prepare it with integer formats of up to 8 bits"
        )
    return copy.deepcopy(model).eval().cpu()


def _latency(runner: Runner, inputs: list[Tensor]) -> float:
    """Median milliseconds of a run: of up to 20, or of what fits in half a second."""
    times: list[float] = []
    while len(times) < 20 and sum(times) < 500:
        start = time.perf_counter()
        runner.run(inputs, ())
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def run_export(
    target: Target,
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    verify: bool = True,
    dynamic_batch: bool = True,
    min_sqnr: float = 10.0,
) -> ExportReport:
    """Checks, writes, verifies and moves a file to its place; the part that all targets share.

    Args:
        target: with the options of this export.
        model: the result of ``qt.convert``, or of ``qt.prepare`` or ``qt.prepare_qat``, which is
            converted first; it is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: load the file in its runtime, run it on the example inputs and compare.
        dynamic_batch: let the file take other batch sizes, where the target can.
        min_sqnr: dB that each output must reach beside the model's. Deep networks of random weights
            amplify single roundings; so layers are compared one by one as well, each from the
            runtime's own inputs.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: the target cannot hold the model; nothing was written.
        ValueError: the model has no QDQ form, see ``graph.qdq.to_qdq``; it cannot compute the
            example inputs, or these are empty or hold NaN or Inf; or the path's suffix is none that
            the runtime takes.
        MissingPackageError: a package is absent; the message gives the command.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: the file cannot be written.
        VerificationError: the file computes something else; nothing is left at ``path``.
    """
    _require(target, target.packages, f"export.{target.name}")
    if verify:
        _require(target, target.runtime, f"verifying a file of export.{target.name}")
    inputs = _inputs(example_inputs, target.name)
    copied = _copied(model, target.name, target.converts)
    if target.fixed_suffix and os.fspath(path) and Path(path).suffix != target.suffix:
        raise ValueError(
            f"export.{target.name}: the path must end in {target.suffix}, got {os.fspath(path)!r}"
        )
    if target.converts:  # else its observers would see the inputs
        _check_inputs(copied, inputs, target.name)
    job = Job(copied, inputs, dynamic_batch, target.branches)
    with staged(path) as temporary:
        target.check(job)
        warnings = target.write(job, temporary)
        if target.converts and _is_float(copied):
            warnings.append("no layer is quantized: this is a float model, see qt.convert")
        if target.integrity is not None:
            target.integrity.seal(temporary)
        size = sum(file.stat().st_size for file in temporary.parent.iterdir())
        verified = None
        if verify:
            runner, *others = target.runners(temporary)
            layers = target.gives_codes and not target.exact
            verified = verify_file(
                target.name, runner, job, min_sqnr, exact=target.exact, layers=layers
            )
            for other in others:
                verify_file(target.name, other, job, min_sqnr, exact=target.exact, layers=layers)
            runtime = " and ".join(each.version for each in (runner, *others))
            latency = _latency(runner, tensors_of(job.example_inputs))
    final = Path(os.path.realpath(path))
    if verified is None:
        return ExportReport(final, size, False, None, warnings, target.name)
    return ExportReport(
        final,
        size,
        True,
        max((o.max_difference for o in verified.outputs), default=0.0),
        warnings,
        target.name,
        runtime,
        verified.outputs,
        verified.layers,
        latency,
    )
