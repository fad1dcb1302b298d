"""Plan files, which run without PyTorch, as an export target."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qtoolkit._version import __version__
from qtoolkit.export.errors import UnsupportedError
from qtoolkit.export.registry import Job, Target, register_target, run_export
from qtoolkit.export.report import ExportReport
from qtoolkit.export.verify import Runner
from qtoolkit.nn.plan import Plan


class PlanRunner:
    """A plan file in the engine.

    Attributes:
        version: the engine's name and version.
    """

    def __init__(self, plan: Plan, used: Sequence[int] | None) -> None:
        self.plan = plan
        self.used = used
        self.version = f"qtoolkit {__version__}, plan"

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """See ``verify.Runner``; it gives no codes."""
        taken = inputs if self.used is None else [inputs[index] for index in self.used]
        with torch.no_grad():
            return self.plan(taken), {}


@register_target("plan")
class PlanTarget(Target):
    """See ``plan``."""

    suffix = ".qtplan"
    exact = True

    def __init__(self, *, tune: bool = True) -> None:
        self.tune = tune
        #: The tensors of the example inputs that the plan reads; None for all.
        self.used: list[int] | None = None

    def check(self, job: Job) -> None:
        from qtoolkit.compile import compile
        from qtoolkit.plan_file import whole_plan

        _ = job.expected  # of the model as it came, not of what is compiled here
        try:
            if not any(isinstance(module, Plan) for module in job.model.modules()):
                job.model = compile(job.model, job.example_inputs, tune=self.tune)
            _, arguments, _ = whole_plan(job.model)
        except ValueError as error:
            raise UnsupportedError(f"export.plan: {error}; nothing was written") from error
        # The plan's arguments are tensors; others come before them in forward.
        tensors = [i for i, value in enumerate(job.example_inputs) if isinstance(value, Tensor)]
        self.used = [tensors.index(argument) for argument in arguments]

    def write(self, job: Job, path: Path) -> list[str]:
        from qtoolkit.plan_file import save_plan

        save_plan(job.model, path)
        return []

    def load(self, path: Path) -> Runner:
        return PlanRunner(Plan.load(os.fspath(path)), self.used)


def plan(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: object,
    *,
    verify: bool = True,
    tune: bool = True,
) -> ExportReport:
    """Writes a network as a plan file, which runs without PyTorch: ``qt.save_plan`` as a target.

    C++ programs run it through ``qtoolkit/plan.h``, with a library of 2 MB; ``qt.load_plan`` or
    ``load("plan", path)`` in Python. It gives the model's bits on every CPU.

    Args:
        model: the result of ``qt.compile`` or of ``qt.convert``, which is compiled first; one that
            is only prepared is converted before. All of it must be one plan. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        example_inputs: what ``model.forward`` takes, as a tuple.
        verify: load the file again, run it on the example inputs and require the model's bits.
        tune: see ``qt.compile``, for a model that is compiled first.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` is no tuple or tensor.
        UnsupportedError: a part of the model is not in the plan; names the part. Nothing was
            written.
        ValueError: the model simulates a format in float, or cannot be converted.
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        VerificationError: the loaded file computes something else; nothing is left at ``path``.
    """
    return run_export(PlanTarget(tune=tune), model, path, example_inputs, verify=verify)
