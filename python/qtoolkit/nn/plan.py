"""A compiled part of a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit import ops
from qtoolkit.text_table import text_table


@dataclass(frozen=True)
class PlanLayer:
    """One step of a plan, for reports.

    Attributes:
        source: dotted name of the float layer it stands for.
        kind: class of the quantized layer.
        format: what it reads and writes.
        kernel: name of its kernel.
    """

    source: str
    kind: str
    format: str
    kernel: str


class Plan(nn.Module):
    """A part of a network as one operator; made by ``qt.compile``.

    It holds its weights in the layout of the kernels alone. Copies, pickles and files hold the
    canonical ones, once each, and pack them again where they are loaded.
    """

    def __init__(self, state: tuple[Any, ...], layers: list[PlanLayer]) -> None:
        super().__init__()
        self.plan = ops.make_plan(state)
        self.layers = layers

    @classmethod
    def load(cls, path: str) -> Plan:
        """A plan from a file; it has no ``layers``. Errors as ``ops.load_plan``."""
        loaded = cls.__new__(cls)
        nn.Module.__init__(loaded)
        loaded.plan = ops.load_plan(path)
        loaded.layers = []
        return loaded

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        return torch.ops.qtoolkit.run_plan(self.plan, inputs)

    def get_extra_state(self) -> Any:
        return self.plan.state()

    def set_extra_state(self, state: Any) -> None:
        self.plan = ops.make_plan(state)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plan": self.plan.state()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.plan = ops.make_plan(state["plan"])

    def extra_repr(self) -> str:
        return f"{len(self.layers)} steps" if self.layers else "from a file"


@dataclass(frozen=True)
class StepReport:
    """One step of a compiled model, as it ran on the example inputs.

    Attributes:
        name: dotted name of the layer in the float model.
        step: what it does.
        kernel: the kernel and its instruction-set path.
        shape: of the output (of the images that run at once).
        bytes: of the output and of packed weights.
        multiplications: multiply-adds.
        ms: least milliseconds; None if not measured.
    """

    name: str
    step: str
    kernel: str
    shape: tuple[int, ...]
    bytes: int
    multiplications: int
    ms: float | None


@dataclass(frozen=True)
class PlanReport:
    """The steps of a compiled model; ``print`` it for a table.

    Attributes:
        steps: in the order of execution, of all plans.
        arena_bytes: memory for activations that one run uses.
        packed_bytes: memory for weights.
    """

    steps: tuple[StepReport, ...]
    arena_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        rows = [("step", "layer", "kernel", "output", "KB", "MMAC", "ms", "GMAC/s")]
        for s in self.steps:
            speed = f"{s.multiplications / s.ms / 1e6:.0f}" if s.ms and s.multiplications else ""
            rows.append(
                (
                    s.step,
                    s.name,
                    s.kernel,
                    "x".join(map(str, s.shape)),
                    f"{s.bytes / 1024:.1f}",
                    f"{s.multiplications / 1e6:.2f}" if s.multiplications else "",
                    "" if s.ms is None else f"{s.ms:.4f}",
                    speed,
                )
            )
        lines = [text_table(rows, right=range(4, len(rows[0])))]
        total = sum(s.ms or 0.0 for s in self.steps)
        lines.append(
            f"{len(self.steps)} steps, {self.packed_bytes / 1e6:.2f} MB of weights, "
            f"{self.arena_bytes / 1e6:.2f} MB for activations"
            + (f", {total:.3f} ms" if total else "")
        )
        return "\n".join(lines)


class PlanReportHolder(nn.Module):
    """Holds a report as a child of a compiled model, whose copies and pickles keep its children."""

    __jit_unused_properties__ = ("steps", "arena_bytes", "packed_bytes")

    def __init__(self, report: PlanReport) -> None:
        super().__init__()
        self.report = report

    def __str__(self) -> str:
        return str(self.report)

    @property
    def steps(self) -> tuple[StepReport, ...]:
        """The steps, see ``PlanReport``."""
        return self.report.steps

    @property
    def arena_bytes(self) -> int:
        """Memory for activations that one run uses."""
        return self.report.arena_bytes

    @property
    def packed_bytes(self) -> int:
        """Memory for weights."""
        return self.report.packed_bytes
