"""What ``prepare`` and ``convert`` decided, kept with the model for ``explain`` and ``compare``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn


@dataclass(frozen=True)
class FloatLayer:
    """A layer that stays in float.

    Attributes:
        name: dotted name.
        kind: its class, or the function's name.
        reason: why, with ``file:line`` where there is one.
    """

    name: str
    kind: str
    reason: str


@dataclass
class Report:
    """What stays in float.

    Attributes:
        inputs: how many inputs the model takes.
        uncaptured: modules whose ``forward`` could not be traced.
        floats: layers that stay in float though they could be seen.
        converted: whether ``convert`` made the model.
        recipe: the ``QConfigMapping`` of ``prepare``, as ``to_dict`` gives it.
    """

    inputs: int = 1
    uncaptured: list[FloatLayer] = field(default_factory=list)
    floats: list[FloatLayer] = field(default_factory=list)
    converted: bool = False
    recipe: dict[str, Any] | None = None


_ATTRIBUTE = "qtoolkit_report"


class _ReportHolder(nn.Module):
    """Holds a report as a child of a GraphModule, whose copies and pickles keep its children."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def set_report(model: nn.Module, report: Report) -> None:
    """Keeps a report with a model, through ``deepcopy`` and ``pickle`` in any order."""
    # A GraphModule's copies lose its attributes, and its pickles lose its meta. Other modules keep
    # attributes, and may call all children that they have.
    is_graph = isinstance(model, fx.GraphModule)
    setattr(model, _ATTRIBUTE, _ReportHolder(report) if is_graph else report)


def get_report(model: nn.Module) -> Report | None:
    """The report of a prepared or converted model, None for any other."""
    found = getattr(model, _ATTRIBUTE, None)
    return found.report if isinstance(found, _ReportHolder) else found


def is_report_holder(module: nn.Module | None) -> bool:
    """True for the child that keeps a report."""
    return isinstance(module, _ReportHolder)


def model_inputs(batch: Any, count: int) -> tuple[Any, ...]:
    """A model's inputs from a loader's batch: a tensor, or a tuple of inputs and what follows them.

    Raises:
        TypeError: the batch is neither, or too short.
    """
    if isinstance(batch, Tensor):
        batch = (batch,)
    if not isinstance(batch, tuple | list) or len(batch) < count:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"a batch must be a tensor or a tuple that begins with the model's {count} input(s), "
            f"such as (input, label); got {type(batch).__name__}{size}"
        )
    return tuple(batch[:count])
