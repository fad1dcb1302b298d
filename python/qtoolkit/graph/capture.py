"""Graph capture: from a model to ``torch.fx`` graphs of as much of it as can be traced.

A module whose ``forward`` cannot be traced keeps it; capture goes on inside its children. Each
captured part is a ``GraphModule`` at the place of the module it came from.
"""

from __future__ import annotations

import contextlib
import copy
import io
import operator
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Optional

import torch
from torch import fx, nn

from qtoolkit.graph.inplace import AliasError, changes_input, remove_inplace
from qtoolkit.graph.modules import bound_arguments, graph_modules, is_kept_whole
from qtoolkit.graph.plain import is_plain
from qtoolkit.nn.stubs import Stub


@dataclass(frozen=True)
class Uncaptured:
    """A module whose ``forward`` stays as it is, in float.

    Attributes:
        name: its dotted name, empty for the model itself.
        kind: its class.
        reason: why it could not be traced.
        location: ``file:line`` of the statement that stopped the tracer, or empty.
    """

    name: str
    kind: str
    reason: str
    location: str


_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


def _location(error: BaseException) -> str:
    """Where in the user's code an error arose: the innermost frame outside PyTorch and this
    file."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if not frame.filename.startswith(_TORCH_FOLDER) and frame.filename != __file__:
            return f"{frame.filename}:{frame.lineno}"
    return ""


def _reason(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


class _Proxy(fx.Proxy):
    """Records ``x += y`` as it is; torch.fx takes it for ``x = x + y``, which other names of x do
    not see."""


def _record_inplace(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "imatmul"):
    setattr(_Proxy, f"__{_name}__", _record_inplace(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Traces into every module but torch.nn's own and those whose ``forward`` fails."""

    # A buffer that forward changes is then seen as such; else the change is made while tracing.
    proxy_buffer_attributes = True

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.prefix = prefix
        self.uncaptured: dict[str, Uncaptured] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.uncaptured or is_kept_whole(m):
            return True
        if isinstance(m, torch.jit.ScriptModule | Stub):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        last = next(iter(reversed(self.graph.nodes)), None)
        stack = self.module_stack.copy()
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            name = self.path_of_module(m)
            if self.is_leaf_module(m, name):
                raise
            # What the failed forward had recorded is taken back, and the module becomes one node.
            for node in reversed(self.graph.nodes):
                if node is last:
                    break
                self.graph.erase_node(node)
            self.module_stack = stack
            self.uncaptured[name] = Uncaptured(
                self.prefix + name, type(m).__qualname__, _reason(error), _location(error)
            )
            return super().call_module(m, forward, args, kwargs)


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _is_builtin(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


@dataclass
class _State:
    """What a capture has found, and the parts that it must leave alone, with the reasons."""

    uncaptured: list[Uncaptured]
    refused: dict[str, str]


def _capture_children(module: nn.Module, name: str, state: _State) -> None:
    for child_name, child in list(module.named_children()):
        captured = _capture(child, _join(name, child_name), state)
        if captured is not child:
            setattr(module, child_name, captured)


def _capture(module: nn.Module, name: str, state: _State) -> nn.Module:
    uncaptured = state.uncaptured
    if isinstance(module, torch.jit.ScriptModule):
        uncaptured.append(
            Uncaptured(name, "ScriptModule", "a TorchScript module has no Python code", "")
        )
        return module
    if is_kept_whole(module):
        uncaptured.append(Uncaptured(name, type(module).__qualname__, "it is kept whole", ""))
        return module
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        _capture_children(module, name, state)
        return module
    if is_plain(module, (nn.Conv2d, nn.Linear)):
        return _wrap(module)
    if name and _is_builtin(module):
        return module
    if name in state.refused:
        uncaptured.append(Uncaptured(name, type(module).__qualname__, state.refused[name], ""))
        _capture_children(module, name, state)
        return module
    tracer = _Tracer(name + "." if name else "")
    try:
        graph = tracer.trace(module)
    except Exception as error:
        uncaptured.append(
            Uncaptured(name, type(module).__qualname__, _reason(error), _location(error))
        )
        _capture_children(module, name, state)
        return module
    for node in graph.nodes:
        # A string (a postponed annotation) means nothing in generated code, and a result's type may
        # depend on a branch that was not taken; TorchScript would take either at its word.
        if isinstance(node.type, str) or node.op == "output":
            node.type = None
        if node.op == "placeholder" and node.args == (None,) and node.type is None:
            node.type = Optional[torch.Tensor]  # noqa: UP045  (TorchScript reads this form)
    result = fx.GraphModule(tracer.root, graph, type(module).__name__)
    result.train(module.training)
    try:
        remove_inplace(result)
    except AliasError as error:
        uncaptured.append(Uncaptured(name, type(module).__qualname__, str(error), ""))
        _capture_children(module, name, state)
        return module
    for leaf_name, entry in tracer.uncaptured.items():
        uncaptured.append(entry)
        _capture_children(result.get_submodule(leaf_name), entry.name, state)
    return result


def _wrap(module: nn.Module) -> nn.Module:
    """A graph that holds one call of a layer, for an uncaptured parent that calls it itself."""
    graph = fx.Graph()
    x = graph.placeholder("input")
    graph.output(graph.call_module("module", (x,)))
    root = nn.Module()
    root.add_module("module", module)
    result = fx.GraphModule(root, graph, type(module).__name__)
    result.train(module.training)
    return result


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Folding a batch norm rounds differently, by little of the tensor's size.
    size = float(b.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * size, equal_nan=True)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return _close(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if is_dataclass(a) and type(a) is type(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    if type(a) is type(b) and hasattr(a, "__dict__"):
        return _same(vars(a), vars(b))
    return a is b or bool(a == b)


def _run(model: nn.Module, example_inputs: tuple[Any, ...]) -> Any:
    """The model's outputs; random layers draw the same numbers every time."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return model(*copy.deepcopy(example_inputs))


class Capture:
    """A copy of a model in evaluation mode, captured as far as it can be traced.

    The result is run on the example inputs and compared with the model, because a tracer can follow
    the wrong branch without noticing; where they differ, less is captured. The model itself is not
    changed.

    Attributes:
        model: the captured copy.
        uncaptured: the modules whose ``forward`` could not be captured.

    Raises:
        RuntimeError: the model cannot be copied, or fails on the example inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: tuple[Any, ...]) -> None:
        self.example_inputs = example_inputs
        self.kind = type(model).__qualname__
        try:
            self.original = copy.deepcopy(model).eval()
        except Exception as error:
            raise RuntimeError(
                f"the model cannot be copied ({_reason(error)}); a weight_norm or another computed "
                "tensor attribute must be removed first"
            ) from error
        try:
            self.expected = _run(copy.deepcopy(self.original), example_inputs)
        except Exception as error:
            raise RuntimeError(
                f"the model failed on the example inputs ({_reason(error)}); example_inputs must "
                "be what the model's forward takes, as a tuple"
            ) from error
        self.refused: dict[str, str] = {}
        self._capture()
        failure = self.difference()
        if failure:
            # The trace of the whole is wrong: keep the model's own forward, try its children.
            self.refused[""] = f"the traced graph {failure}"
            self._capture()
            failure = self.difference()
        if failure:
            self.give_up(f"the traced graph of its children {failure}")

    def _capture(self) -> None:
        """Captures all that is not refused, and refuses what then changes tensors in place."""
        while True:
            state = _State([], self.refused)
            self.model = _capture(copy.deepcopy(self.original), "", state)
            self.uncaptured = state.uncaptured
            found = self._changed_in_place()
            if not found:
                return
            self.refused.update(found)

    def _changed_in_place(self) -> dict[str, str]:
        found: dict[str, str] = {}
        model = copy.deepcopy(self.model)

        def watch(name: str, part: fx.GraphModule, args: Any, kwargs: Any) -> None:
            reason = changes_input(part, copy.deepcopy(bound_arguments(part, args, kwargs)))
            if reason is not None:
                found[name] = reason

        for name, part in graph_modules(model):
            part.register_forward_pre_hook(
                lambda part, args, kwargs, name=name: watch(name, part, args, kwargs),
                with_kwargs=True,
            )
        # A model that fails here fails in difference too, which tells why.
        with contextlib.suppress(Exception), contextlib.redirect_stderr(io.StringIO()):
            _run(model, self.example_inputs)
        return {name: reason for name, reason in found.items() if name not in self.refused}

    def difference(self) -> str | None:
        """How the captured copy differs on the example inputs, None if it does not."""
        try:
            # torch.fx prints where a graph fails before it raises.
            with contextlib.redirect_stderr(io.StringIO()):
                model = copy.deepcopy(self.model)
                same = _same(_run(model, self.example_inputs), self.expected)
        except Exception as error:
            return f"fails on the example inputs ({_reason(error)})"
        return None if same else "computes something else on the example inputs"

    def give_up(self, reason: str) -> None:
        """Leaves the whole model uncaptured."""
        self.model = copy.deepcopy(self.original)
        self.uncaptured = [Uncaptured("", self.kind, reason, "")]
