"""From a converted model to plans."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.graph.compile import compile_graph, report_of
from qtoolkit.graph.modules import free_name, graph_modules
from qtoolkit.graph.report import get_report, set_report
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.plan import Plan, PlanReport, PlanReportHolder


def _first_calls(
    model: nn.Module, modules: list[Any], inputs: tuple[Any, ...]
) -> dict[nn.Module, tuple[Any, ...]]:
    """What each of the modules is called with first when the model runs."""
    calls: dict[nn.Module, tuple[Any, ...]] = {}

    def note(called: nn.Module, args: tuple[Any, ...]) -> None:
        calls.setdefault(called, args)

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _separate(model: nn.Module, shared: dict[int, Tensor]) -> None:
    """Gives quantized modules that stayed outside plans tensors of their own."""
    copies: dict[int, Tensor] = {}
    for module in model.modules():
        for name, tensor in module.named_buffers(recurse=False):
            if id(tensor) in shared:
                module._buffers[name] = copies.setdefault(id(tensor), tensor.clone())


def _merged(reports: list[PlanReport]) -> PlanReport:
    """The reports of plans that run one after the other as one."""
    return PlanReport(
        tuple(step for report in reports for step in report.steps),
        sum(report.arena_bytes for report in reports),
        sum(report.packed_bytes for report in reports),
    )


def compile(
    model: nn.Module, example_inputs: Any, *, tune: bool = True, profile: bool = False
) -> nn.Module:
    """The converted model with its quantized parts as plans: one operator for each, for a CPU.

    A network of quantized layers alone becomes one operator. Layers without a kernel stay as they
    are, between plans (``qt.explain`` lists them). The result gives the model's bits; any batch
    size and image size may follow, and sizes other than the example's are planned when they are
    met.

    Args:
        model: the result of ``qt.convert``, on the CPU. It is not changed; once the result is made
            it may be deleted, as the plans hold the weights in the layout of the kernels.
        example_inputs: what ``model.forward`` takes, as a tuple or one tensor.
        tune: measure the fastest way to run each step for the size of the example and the number
            of threads of now; kept with the model. Without, a good guess is taken.
        profile: measure each step, for ``print(result.plan)``.

    Returns:
        A module with the attribute ``plan``: a table of its steps (``print`` it). It can be
        scripted, copied and pickled, and many threads may call it at once.

    Raises:
        TypeError: ``model`` is not a module, or ``example_inputs`` no tensor or tuple.
        ValueError: the model is not converted, or not on the CPU.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"compile needs a torch.nn.Module, got {type(model).__name__}")
    report = get_report(model)
    if report is None or not report.converted:
        raise ValueError("compile needs the result of qt.convert")
    if any(isinstance(module, Plan) for module in model.modules()):
        raise ValueError("compile: this model is compiled already")
    tensors = itertools.chain(model.parameters(), model.buffers())
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    if device is not None:
        raise ValueError(f"compile: the model is on {device}; plans run on the CPU: model.cpu()")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not isinstance(example_inputs, tuple | list) or not example_inputs:
        raise TypeError(
            "example_inputs must be a tensor or a non-empty tuple of what the model's forward "
            f"takes, got {type(example_inputs).__name__}"
        )
    example_inputs = tuple(example_inputs)
    # Quantized layers only give their tensors away; what stays is a copy.
    shared = {
        id(tensor): tensor
        for module in model.modules()
        if isinstance(module, QuantizedModule)
        for tensor in module.buffers()
    }
    compiled = copy.deepcopy(model, shared).eval()
    graphs = dict(graph_modules(compiled))
    calls = _first_calls(compiled, list(graphs.values()), example_inputs)
    for graph in graphs.values():
        if graph in calls:
            compile_graph(graph, calls[graph])
    set_report(compiled, copy.deepcopy(report))  # a graph's clean-up drops what no node calls
    _separate(compiled, shared)
    plans = [module for module in compiled.modules() if isinstance(module, Plan)]
    calls = _first_calls(compiled, plans, example_inputs)
    reports = []
    for plan in plans:
        if plan not in calls:
            continue
        (inputs,) = calls[plan]
        if tune:
            plan.plan.tune(inputs)
        reports.append(report_of(plan, inputs, profile))
    # A layer of the user's that has the name keeps it.
    compiled.add_module(free_name(compiled, "plan"), PlanReportHolder(_merged(reports)))
    return compiled
