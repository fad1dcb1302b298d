"""What an export tells of the file it wrote."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class OutputReport:
    """One output of the file, beside the model's, on the example inputs.

    Attributes:
        sqnr: of the file's output to the model's in dB; infinite where they are equal.
        max_difference: largest absolute difference.
        max_steps: the same in steps of the output's quantization; None for an output in float.
        top1_agreement: share of samples with the same highest class; None where the output is not
            of shape ``[N, classes]``.
    """

    sqnr: float
    max_difference: float
    max_steps: float | None
    top1_agreement: float | None


@dataclass(frozen=True)
class LayersReport:
    """The file's quantized layers, each computed in PyTorch from the runtime's own input codes.

    Attributes:
        compared: how many were.
        max_steps: largest difference of a code.
        differing: share of all codes that differ, without those of values so near the middle
            between two codes that either is right.
        worst: the name of a layer with the largest difference; None where no code differs.
    """

    compared: int
    max_steps: int
    differing: float
    worst: str | None


@dataclass(frozen=True)
class ExportReport:
    """An exported file, and how it compares with the model it came from; ``print`` it.

    Attributes:
        path: the file.
        size: bytes, with those of files that belong to it.
        verified: True if the file was loaded again and run on the example inputs.
        max_difference: largest absolute difference between the file's and the model's outputs; None
            if not verified.
        warnings: what the user should know, such as which layers stayed float and why.
        target: the name of the target.
        runtime: what verified it, with its version; "" if not verified.
        outputs: each output beside the model's; empty if not verified.
        layers: layer by layer; None if the target is not compared so.
        latency_ms: median time of a run on the example inputs in that runtime; None if not
            verified.
    """

    path: Path
    size: int
    verified: bool
    max_difference: float | None
    warnings: list[str] = field(default_factory=list)
    target: str = ""
    runtime: str = ""
    outputs: list[OutputReport] = field(default_factory=list)
    layers: LayersReport | None = None
    latency_ms: float | None = None

    def __str__(self) -> str:
        lines = [f"{self.path} ({self.target}, {self.size / 1e6:.2f} MB)"]
        if self.verified:
            time = "" if self.latency_ms is None else f", {self.latency_ms:.2f} ms a run"
            lines.append(f"  verified in {self.runtime}{time}")
        else:
            lines.append("  not verified")
        for index, output in enumerate(self.outputs):
            steps = "" if output.max_steps is None else f" ({output.max_steps:.2f} steps)"
            top1 = (
                ""
                if output.top1_agreement is None
                else f", top-1 {output.top1_agreement:.1%} equal"
            )
            lines.append(
                f"  output {index}: SQNR to the model {output.sqnr:.1f} dB, largest difference "
                f"{output.max_difference:.3g}{steps}{top1}"
            )
        if self.layers is not None:
            lines.append(
                f"  {self.layers.compared} layers, each from its own inputs: "
                f"{self.layers.differing:.3%} of the codes differ, by up to "
                f"{self.layers.max_steps}"
            )
        return "\n".join([*lines, *(f"  note: {warning}" for warning in self.warnings)])
