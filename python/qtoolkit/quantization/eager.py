"""Eager mode: a module becomes a captured graph and stays the object that the user holds.

torch.ao's ``prepare`` needs no example inputs, so the model is captured when it is first called.
The graph's layers are put at their places in the user's module, and its ``forward`` runs the graph.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from qtoolkit.distributed import install_synchronizer, remove_synchronizer
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.graph.modules import graph_modules
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import get_report, set_report
from qtoolkit.nn.stubs import Stub
from qtoolkit.observers import Observer
from qtoolkit.qconfig import QConfigMapping
from qtoolkit.quantization.dynamic import replace_dynamic
from qtoolkit.workflow import convert, prepare, prepare_qat

# What convert fuses or drops leaves this behind, as in torch.ao.
_VANISHING = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.dropout._DropoutNd,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    Stub,
)


_DYNAMIC = "qtoolkit_dynamic"


class GraphForward:
    """The ``forward`` of a module that runs a captured graph.

    Attributes:
        owner: the module, which holds the layers.
        graph_module: the graph with the same layers.
        added: names of the children of the module that the graph brought.
    """

    def __init__(self, owner: nn.Module, graph_module: fx.GraphModule, added: set[str]) -> None:
        self.owner = owner
        self.graph_module = graph_module
        self.added = added

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # With the owner's layers and tensors: .to() gives it new buffers.
        return type(self.graph_module).forward(self.owner, *args, **kwargs)

    def graph(self) -> fx.GraphModule:
        """The graph with the layers that the module has now."""
        result = fx.GraphModule(
            self.owner, self.graph_module.graph, type(self.graph_module).__name__
        )
        result.train(self.owner.training)
        report = get_report(self.owner)
        if report is not None:
            set_report(result, report)
        return result


class WaitingForward:
    """The ``forward`` of a module that is prepared when it is first called.

    Attributes:
        owner: the module.
        mapping: how it is quantized.
        dynamic: names of the layers that will quantize their inputs as they come.
        qat: whether for training.
        pending: functions that ``apply`` called before there was anything to apply them to.
        converts: whether the model is converted at once, see ``convert_later``.
        state: the arguments of ``load_state_dict`` that came before the first call.
    """

    def __init__(
        self, owner: nn.Module, mapping: QConfigMapping, dynamic: list[str], *, qat: bool
    ) -> None:
        self.owner = owner
        self.mapping = mapping
        self.qat = qat
        self.dynamic = dynamic
        self.pending: list[Callable[[nn.Module], None]] = []
        self.converts = False
        self.state: tuple[Any, bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(type(self.owner).forward).bind(self.owner, *args, **kwargs)
        if bound.kwargs:
            raise TypeError(
                f"the first call of a prepared {type(self.owner).__name__} needs its inputs by "
                f"position, got {sorted(bound.kwargs)} by name alone"
            )
        self.prepare(bound.args[1:])
        return self.owner.forward(*bound.args[1:])

    def prepare(self, example_inputs: tuple[Any, ...]) -> None:
        """Prepares the owner in place."""
        owner = self.owner
        training = owner.training
        del owner.__dict__["forward"]
        try:
            # Observers change their buffers later, which those made in inference mode forbid.
            with warnings.catch_warnings(), torch.inference_mode(False):
                # A qconfig may be set on what is not quantized.
                warnings.filterwarnings("ignore", message="set_module_name")
                step = prepare_qat if self.qat else prepare
                captured = step(owner, self.mapping, example_inputs)
        except BaseException:
            owner.forward = self
            raise
        if self.qat:
            _keep_parameters(owner, captured)
        graft(owner, captured)
        owner.__dict__[_DYNAMIC] = self.dynamic
        if self.qat and not isinstance(captured, fx.GraphModule):
            install_synchronizer(owner)
        owner.train(training if self.qat else False)
        for function in self.pending:
            owner.apply(function)
        if self.converts:
            owner.__dict__.pop("load_state_dict")
            fill_uncalibrated(owner, warn=self.state is None)
            convert_in_place(owner)
            if self.state is not None:
                state, strict = self.state
                owner.load_state_dict(state, strict)

    def convert_later(self) -> None:
        """Converts the model at its first call; a state dict that is loaded before waits for it."""
        self.converts = True
        self.owner.__dict__["load_state_dict"] = self.load_state_dict

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Keeps a state dict for the first call."""
        self.state = (dict(state_dict), strict)
        return torch.nn.modules.module._IncompatibleKeys([], [])


def later(module: nn.Module, function: Callable[[nn.Module], None]) -> None:
    """Remembers a function for ``apply`` if the module waits for its first call."""
    waiting = module.__dict__.get("forward")
    if isinstance(waiting, WaitingForward):
        waiting.pending.append(function)


def _keep_parameters(owner: nn.Module, captured: nn.Module) -> None:
    """Gives the captured copy the parameters that the user's optimizer may hold."""
    own = dict(owner.named_parameters(remove_duplicate=False))
    replaced = {}
    for name, parameter in captured.named_parameters(remove_duplicate=False):
        # The graph of a single layer holds it as its child "module".
        known = own.get(name, own.get(re.sub(r"(^|\.)module\.(?=\w+$)", r"\1", name)))
        if known is not None and known.shape == parameter.shape:
            replaced[id(parameter)] = known
    for module in captured.modules():
        for name, value in module._parameters.items():
            module._parameters[name] = replaced.get(id(value), value)


def graft(owner: nn.Module, captured: nn.Module) -> None:
    """Makes a module compute what a captured copy of it does."""
    report = get_report(captured)
    assert report is not None
    placed: list[str] = []
    for name, graph_module in list(graph_modules(captured)):
        if any(not outer or name.startswith(f"{outer}.") for outer in placed):
            continue  # part of one that is placed
        placed.append(name)
        target = owner.get_submodule(name)
        # A single layer has no forward that could run a graph.
        if name and (isinstance(target, fx.GraphModule) or not list(target.children())):
            owner.set_submodule(name, graph_module)
        else:
            _graft_graph(target, graph_module)
    set_report(owner, report)


def _graft_graph(target: nn.Module, graph_module: fx.GraphModule) -> None:
    known = target.__dict__.get("forward")
    added: set[str] = known.added if isinstance(known, GraphForward) else set()
    for name in added:
        parent, _, leaf = name.rpartition(".")
        target.get_submodule(parent)._modules.pop(leaf, None)
    if not list(target.children()):
        target._parameters.clear()  # a single layer; the graph's child holds them
    originals = {name for name, _ in target.named_modules()}
    added = set()
    used: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op not in ("call_module", "get_attr"):
            continue
        path = str(node.target)
        parent, _, leaf = path.rpartition(".")
        value = graph_module.get_submodule(parent)
        value = getattr(value, leaf)
        holder = target.get_submodule(parent)
        if isinstance(value, nn.Module):
            used.add(path)
            if path not in originals:
                added.add(path)
            holder._modules[leaf] = value
        elif not hasattr(holder, leaf):
            setattr(holder, leaf, value)
    for name, module in list(target.named_modules()):
        parts = name.split(".")
        whole = any(".".join(parts[: length + 1]) in used for length in range(len(parts)))
        if isinstance(module, _VANISHING) and not whole:
            target.set_submodule(name, nn.Identity())
    target.forward = forward = GraphForward(target, graph_module, added)
    # torch.jit.script calls this; it cannot read the classes of the user's containers.
    target.__dict__["__prepare_scriptable__"] = forward.graph


def captured_copy(owner: nn.Module) -> nn.Module:
    """The model of qtoolkit's workflow that a prepared or converted module stands for."""
    forward = owner.__dict__.get("forward")
    if isinstance(forward, GraphForward):
        return forward.graph()
    result = copy.deepcopy(owner)
    for name, module in list(result.named_modules()):
        forward = module.__dict__.get("forward")
        if isinstance(forward, GraphForward):
            result.set_submodule(name, forward.graph())
    return result


def is_prepared(model: nn.Module) -> bool:
    """True for the result of the drop-in's ``prepare``, called or not."""
    forward = model.__dict__.get("forward")
    report = get_report(model)
    return isinstance(forward, WaitingForward) or (report is not None and not report.converted)


def convert_in_place(owner: nn.Module) -> None:
    """Converts a prepared module."""
    quantized = convert(captured_copy(owner))
    remove_synchronizer(owner)
    replace_dynamic(quantized, owner.__dict__.pop(_DYNAMIC, []))
    graft(owner, quantized)
    owner.eval()
    for parameter in owner.parameters():
        if parameter.is_leaf:
            parameter.requires_grad_(False)


def fill_uncalibrated(model: nn.Module, *, warn: bool = True) -> None:
    """Gives observers that saw no data scale 1 and zero point 0, with a warning, as torch.ao does.

    A state dict may follow.
    """
    inner = {m.observer for m in model.modules() if isinstance(m, FakeQuantize)}
    names = []
    for module in model.modules():
        if not is_observer(module) or module in inner:
            continue
        if isinstance(module, Observer) and not module.calibrated():
            module.unfreeze()
        elif isinstance(module, FakeQuantize) and not module.ready:
            module.unfreeze()
            module.train()
        else:
            continue
        device = next((b.device for b in module.buffers()), None)
        module(torch.tensor([0.0, 255.0], device=device))
        names.append(str(module.name))
    if names and warn:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        warnings.warn(
            f"convert: no data has reached {shown}; scale 1 and zero point 0 are used. Run the "
            "prepared model on calibration data, or load a state dict now",
            stacklevel=3,
        )
