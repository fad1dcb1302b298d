"""A format for each layer, so that the least is lost within a budget."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from qtoolkit.batches import gather_batches
from qtoolkit.layer_costs import UNITS, Costs, bit_operations, latencies, sizes
from qtoolkit.layer_formats import Formats, qconfigs_of
from qtoolkit.layer_simulation import SimulatedLayer, Simulation
from qtoolkit.qconfig import QConfig, QConfigMapping, get_default_qconfig_mapping
from qtoolkit.sensitivity import Metric, Sensitivity, sensitivity
from qtoolkit.text_table import text_table
from qtoolkit.workflow import prepare

_NAN = float("nan")
# A layer that ruins the output altogether counts as so many times the worst finite error.
_RUINED = 1e3


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for one layer.

    Attributes:
        name: dotted name of the layer.
        format: the chosen one.
        error: what it alone does to the output, see ``Sensitivity``.
        costs: of each kind that the budget names.
    """

    name: str
    format: str
    error: float
    costs: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class MixedPrecision(QConfigMapping):
    """A mapping for ``prepare`` and ``quantize``; ``print`` it for a table of what was chosen.

    Attributes:
        choices: of the layers with a weight, in the order of the network.
        budget: what was allowed, by kind.
        costs: what is spent, by kind, with what does not depend on the choice.
        unreached: layers that no data reached: they stay in float.
    """

    choices: tuple[LayerChoice, ...] = ()
    budget: tuple[tuple[str, float], ...] = ()
    costs: tuple[tuple[str, float], ...] = ()
    unreached: tuple[str, ...] = ()

    @property
    def formats(self) -> dict[str, str]:
        """The chosen format of each layer."""
        return {choice.name: choice.format for choice in self.choices}

    def __str__(self) -> str:
        kinds = [kind for kind, _ in self.budget]
        rows = [["layer", "format", "error", *kinds]]
        for choice in self.choices:
            costs = [f"{cost:,.6g}" for _, cost in choice.costs]
            rows.append([choice.name, choice.format, f"{choice.error:.3e}", *costs])
        rows += [[name, "float32", "not reached", *["" for _ in kinds]] for name in self.unreached]
        rows.append(["all", "", "", *(f"{cost:,.6g}" for _, cost in self.costs)])
        rows.append(["budget", "", "", *(f"{limit:,.6g}" for _, limit in self.budget)])
        return text_table(rows, right=range(2, len(rows[0])))


def mixed_precision(
    model: nn.Module,
    loader: Iterable[Any],
    budget: Mapping[str, float],
    formats: Formats = ("int8", "int4", "fp16"),
    *,
    metric: str | Metric = "sqnr",
    sensitivities: Sensitivity | None = None,
    target: str = "x86",
    example_inputs: Any = None,
    max_batches: int | None = 8,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> MixedPrecision:
    """The format of each layer with a weight under which the sum of the layers' errors is least and
    the budget holds, as an integer linear program (SciPy's HiGHS).

    That errors add is an approximation: evaluate the quantized model. Layers without a weight are
    quantized as the target's default says.

    Args:
        model: the float model; it is not changed.
        loader: batches, as for ``sensitivity``.
        budget: limits by kind; several hold together. "size": bytes of the model, a weight of 4
            bits counting half a byte (in memory its codes take a byte). "bitops": products of one
            sample of the example inputs, each times the bits of its weight and its activation.
            "latency_ms": for the first batch, each layer by itself as measured here; formats
            without an integer kernel take the time of float.
        formats: what to choose from, as for ``sensitivity``.
        metric: what the error is, as for ``sensitivity``.
        sensitivities: what ``sensitivity`` found for these formats; measured if None.
        target: the runtime, see ``get_default_qconfig_mapping``.
        example_inputs: what ``model.forward`` takes, as a tuple; the first batch's inputs if None.
        max_batches: use so many batches at most.
        resume: a file for ``sensitivity``, from which an interrupted run goes on.
        progress: show progress bars.

    Raises:
        ImportError: SciPy is not installed.
        ValueError: a budget of another kind, or one that cannot be met: says what can be; or
            what ``sensitivity`` raises.
        RuntimeError: the solver found no solution.
    """
    _solver()
    limits = _checked(budget)
    qconfigs = qconfigs_of(formats, target)
    inputs, batches = gather_batches(
        loader, model, "mixed_precision", example_inputs, max_batches, progress=False
    )
    if sensitivities is None:
        sensitivities = sensitivity(
            model,
            batches,
            formats,
            metric,
            target=target,
            example_inputs=inputs,
            max_batches=None,
            resume=resume,
            progress=progress,
        )
    default = get_default_qconfig_mapping(target)
    simulation = Simulation(prepare(model, default, inputs))
    weighted = [layer for layer in simulation.layers if layer.weights]
    if not weighted:
        raise ValueError("mixed_precision: the model has no layer with a weight to quantize")
    errors = {
        (layer.name, name): _error(sensitivities, layer.name, name)
        for layer in weighted
        for name in qconfigs
    }
    unreached = {name for (name, _), error in errors.items() if math.isnan(error)}
    layers = [layer for layer in weighted if layer.name not in unreached]
    costs: dict[str, Costs] = {}
    for kind in limits:
        if kind == "size":
            costs[kind] = sizes(simulation, layers, qconfigs)
        elif kind == "bitops":
            costs[kind] = bit_operations(layers, qconfigs)
        else:
            costs[kind] = latencies(model, default, simulation, layers, qconfigs, batches)
    chosen = _solve(layers, list(qconfigs), errors, costs, limits)
    return _mapping(default, layers, chosen, qconfigs, errors, costs, limits, sorted(unreached))


def _solver() -> Any:
    try:
        from scipy import optimize
    except ImportError as error:
        raise ImportError(
            "mixed_precision needs SciPy: pip install 'qtoolkit[mixed-precision]'"
        ) from error
    return optimize


def _checked(budget: Any) -> dict[str, float]:
    example = 'such as {"size": 5_000_000}'
    if not isinstance(budget, Mapping) or not budget:
        raise ValueError(f"mixed_precision needs a budget, {example}; got {budget!r}")
    for kind, limit in budget.items():
        if kind not in UNITS:
            raise ValueError(f"unknown budget {kind!r}: use {', '.join(UNITS)}, {example}")
        number = isinstance(limit, int | float) and not isinstance(limit, bool)
        if not number or not math.isfinite(limit) or limit <= 0:
            raise ValueError(f"the budget {kind!r} must be a positive number, got {limit!r}")
    return {kind: float(limit) for kind, limit in budget.items()}


def _error(sensitivities: Sensitivity, layer: str, number_format: str) -> float:
    try:
        return sensitivities.error(layer, number_format)
    except KeyError as error:
        raise ValueError(
            f"the sensitivities are of other layers or formats: {error.args[0]}; they have "
            f"{', '.join(sensitivities.formats)}"
        ) from None


def _solve(
    layers: list[SimulatedLayer],
    formats: list[str],
    errors: dict[tuple[str, str], float],
    costs: dict[str, Costs],
    limits: dict[str, float],
) -> dict[str, str]:
    """The format of each layer."""
    pairs = [(layer.name, name) for layer in layers for name in formats]
    for kind, limit in limits.items():
        of = costs[kind].of
        least = costs[kind].fixed + sum(
            min(of[layer.name, name] for name in formats) for layer in layers
        )
        if least > limit:
            raise ValueError(
                f"the budget {kind} = {limit:,.6g} cannot be met: the least that "
                f"{', '.join(formats)} can reach is {least:,.6g} {UNITS[kind]}, of which "
                f"{costs[kind].fixed:,.6g} do not depend on the choice"
            )
    finite = [error for error in errors.values() if math.isfinite(error)]
    unit = max(finite, default=0.0) or 1.0
    values = [min(errors[pair] / unit, _RUINED) for pair in pairs]
    rows, low, high = [], [], []
    for layer in layers:
        rows.append([float(name == layer.name) for name, _ in pairs])
        low.append(1.0)
        high.append(1.0)
    for kind, limit in limits.items():
        rows.append([costs[kind].of[pair] / limit for pair in pairs])
        low.append(-math.inf)
        high.append(1 - costs[kind].fixed / limit)
    optimize = _solver()
    result = optimize.milp(
        values,
        integrality=[1] * len(pairs),
        bounds=optimize.Bounds(0, 1),
        constraints=optimize.LinearConstraint(rows, low, high),
        options={"mip_rel_gap": 1e-6, "time_limit": 60.0},
    )
    if result.x is None and result.status == 2:
        raise ValueError(
            f"no choice of {', '.join(formats)} meets all budgets together, though each alone can "
            f"be met: {limits}"
        )
    if result.x is None:
        raise RuntimeError(f"mixed_precision: the solver found no solution: {result.message}")
    return {name: key for (name, key), taken in zip(pairs, result.x) if taken > 0.5}


def _mapping(
    default: QConfigMapping,
    layers: list[SimulatedLayer],
    chosen: dict[str, str],
    qconfigs: dict[str, QConfig | None],
    errors: dict[tuple[str, str], float],
    costs: dict[str, Costs],
    limits: dict[str, float],
    unreached: list[str],
) -> MixedPrecision:
    mapping = default
    for name, key in chosen.items():
        if qconfigs[key] != default.global_qconfig:
            mapping = mapping.set_module_name(name, qconfigs[key])
    for name in unreached:
        mapping = mapping.set_module_name(name, None)
    choices = [
        LayerChoice(
            layer.name,
            chosen[layer.name],
            errors[layer.name, chosen[layer.name]],
            tuple((kind, cost.of[layer.name, chosen[layer.name]]) for kind, cost in costs.items()),
        )
        for layer in layers
    ]
    totals = {
        kind: cost.fixed + sum(cost.of[pair] for pair in chosen.items())
        for kind, cost in costs.items()
    }
    return MixedPrecision(
        mapping.global_qconfig,
        mapping.module_types,
        mapping.module_names,
        tuple(choices),
        tuple(limits.items()),
        tuple(totals.items()),
        tuple(unreached),
    )
