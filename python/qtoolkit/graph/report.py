"""What ``prepare`` and ``convert`` decided, kept with the model for ``explain`` and ``compare``."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn


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
        uncaptured: modules whose ``forward`` could not be traced.
        floats: layers that stay in float though they could be seen.
    """

    uncaptured: list[FloatLayer] = field(default_factory=list)
    floats: list[FloatLayer] = field(default_factory=list)


_ATTRIBUTE = "qtoolkit_report"


def set_report(model: nn.Module, report: Report) -> None:
    """Keeps a report with a model, through ``deepcopy`` or ``pickle``."""
    # A GraphModule's copies keep its meta and lose its attributes; its pickles do the opposite.
    if isinstance(model, fx.GraphModule):
        model.meta[_ATTRIBUTE] = report
    setattr(model, _ATTRIBUTE, report)


def get_report(model: nn.Module) -> Report | None:
    """The report of a prepared or converted model, None for any other."""
    if isinstance(model, fx.GraphModule) and _ATTRIBUTE in model.meta:
        return model.meta[_ATTRIBUTE]
    return getattr(model, _ATTRIBUTE, None)
