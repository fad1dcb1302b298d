"""Whether a file computes what the model does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from qtoolkit.export.errors import VerificationError
from qtoolkit.export.program import DEQUANTIZE, QdqProgram, map_tensors, tensors_of
from qtoolkit.export.report import LayersReport, OutputReport

if TYPE_CHECKING:
    from qtoolkit.export.registry import Job


class Runner(Protocol):
    """A file that is loaded in its runtime.

    One may have an attribute ``coarse``: names of layers that the runtime is known to round twice.
    Any share of their codes may differ, by as many steps as those of others.
    """

    @property
    def version(self) -> str:
        """The runtime's name and version."""

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """The outputs in the order of the model's, and the codes of those of the named values that
        the runtime can give, in the model's dtypes and layout."""


class ModuleRunner:
    """A file that is a PyTorch module when it is loaded.

    Attributes:
        module: takes what the model does.
        version: the runtime's name and version.
        example_inputs: what the model was exported with, which may hold other values than tensors;
            None where all inputs are tensors.
    """

    def __init__(self, module: Any, version: str, example_inputs: tuple[Any, ...] | None) -> None:
        self.module, self.version, self.example_inputs = module, version, example_inputs

    def run(
        self, inputs: list[Tensor], names: Sequence[str]
    ) -> tuple[list[Tensor], Mapping[str, Tensor]]:
        """See ``Runner``; it gives no codes."""
        arguments: Any = inputs
        if self.example_inputs is not None:
            remaining = iter(inputs)
            arguments = map_tensors(self.example_inputs, lambda _: next(remaining))
        with torch.no_grad():
            return tensors_of(self.module(*arguments)), {}


@dataclass(frozen=True)
class Verification:
    """What was found; see ``ExportReport``."""

    outputs: list[OutputReport]
    layers: LayersReport | None


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB; infinite for equal tensors."""
    expected, actual = expected.double(), actual.double()
    noise = float((expected - actual).square().sum())
    signal = float(expected.square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf


def compare_output(expected: Tensor, actual: Tensor, step: float | None) -> OutputReport:
    """One output beside the model's; of another shape it differs infinitely.

    Args:
        expected: the model's.
        actual: the file's.
        step: the real size of a step of its codes; None in float.
    """
    if expected.shape != actual.shape:
        return OutputReport(-math.inf, math.inf, None, None)
    if torch.equal(expected, actual):
        difference = 0.0
    else:
        error = (expected.double() - actual.double()).abs()
        # Equal infinities and NaN at the same place are no difference; a single NaN is.
        same = (expected == actual) | (expected.isnan() & actual.isnan())
        difference = float(error.masked_fill(same, 0.0).nan_to_num(nan=math.inf).max())
    top1 = None
    if expected.dim() == 2 and expected.shape[0] > 0 and expected.shape[1] > 1:
        top1 = float((expected.argmax(1) == actual.argmax(1)).double().mean())
    ratio = math.inf if difference == 0 else sqnr(expected, actual)
    return OutputReport(ratio, difference, difference / step if step else None, top1)


def compare_layers(
    program: QdqProgram, inputs: list[Tensor], codes: Mapping[str, Tensor]
) -> tuple[LayersReport, list[tuple[str, int, float]]]:
    """The runtime's layers one by one, each from the runtime's own inputs.

    Returns:
        The report, and for each layer its name, largest difference in steps and share of codes that
        differ, in the order of the graph.
    """
    _, computed = program.run(inputs, codes)
    layers = []
    differing = total = 0
    for name, expected in computed.items():
        actual = codes.get(name)
        if actual is None:
            continue
        if actual.shape != expected.shape:
            raise VerificationError(
                f"{name} has shape {tuple(actual.shape)} in the file, {tuple(expected.shape)} in "
                "the model; nothing was written"
            )
        error = (actual.int() - expected.int()).abs()
        count = int((error > 0).sum())
        layers.append(
            (name, int(error.max()) if error.numel() else 0, count / max(error.numel(), 1))
        )
        differing += count
        total += error.numel()
    most = max((steps for _, steps, _ in layers), default=0)
    worst = next((name for name, steps, _ in layers if steps == most and most > 0), None)
    return LayersReport(len(layers), most, differing / max(total, 1), worst), layers


def _steps_of_outputs(program: QdqProgram) -> list[float | None]:
    """The step of each output that is dequantized codes."""
    steps: list[float | None] = []
    for node in program.outputs:
        scale = program.constant(node.args[1]) if node.target is DEQUANTIZE else None
        steps.append(None if scale is None else float(scale))
    return steps


#: A layer whose codes differ by more steps than that, or in a larger share than that, departs.
#: Runtimes round products in float32 or in fixed point.
MAX_STEPS = 1
MAX_SHARE = 0.05


def verify_file(
    target: str, runner: Runner, job: Job, min_sqnr: float, *, exact: bool, layers: bool
) -> Verification:
    """Runs a file on the example inputs and compares it with the model.

    Args:
        target: its name, for messages.
        runner: the file.
        job: the model and the example inputs.
        min_sqnr: dB that each output must reach beside the model's.
        exact: require equal bits.
        layers: compare the quantized layers too, one by one.

    Raises:
        VerificationError: the file departs from the model; names the first layer that does.
    """
    inputs = tensors_of(job.example_inputs)
    expected = job.expected
    names: list[str] = job.program.names() if layers else []
    outputs, codes = runner.run(inputs, names)
    if len(outputs) != len(expected):
        raise VerificationError(
            f"the {target} file gives {len(outputs)} outputs, the model {len(expected)}; nothing "
            "was written"
        )
    steps = _steps_of_outputs(job.program) if layers else [None] * len(expected)
    reports = [compare_output(e, a, s) for e, a, s in zip(expected, outputs, steps)]
    if exact:
        worst = max((r.max_difference for r in reports), default=0.0)
        if worst != 0.0:
            raise VerificationError(
                f"the {target} file of this model differs from it by up to {worst:g} on the "
                "example inputs; nothing was written"
            )
        return Verification(reports, None)
    summary, although = None, ""
    if layers:
        summary, compared = compare_layers(job.program, inputs, codes)
        coarse: frozenset[str] = getattr(runner, "coarse", frozenset())
        for name, most, share in compared:
            if most > MAX_STEPS or (share > MAX_SHARE and name not in coarse):
                raise VerificationError(
                    f"the {target} file departs from the model first in {name}: from equal inputs "
                    f"{share:.1%} of its codes differ, by up to {most} steps (allowed: "
                    f"{MAX_SHARE:.0%}, {MAX_STEPS}); nothing was written"
                )
        although = ", though no quantized layer departs from the codes that it is given"
    for index, report in enumerate(reports):
        if report.sqnr < min_sqnr:
            raise VerificationError(
                f"output {index} of the {target} file is {report.sqnr:.1f} dB from the model's "
                f"(min_sqnr={min_sqnr:g}){although}; nothing was written. A float layer may "
                "differ, or single roundings are amplified: compare both with the float model, or "
                "lower min_sqnr"
            )
    return Verification(reports, summary)
