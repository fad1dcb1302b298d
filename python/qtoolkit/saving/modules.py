"""Modules as JSON and tensors, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.plain import not_plain
from qtoolkit.graph.report import is_report_holder
from qtoolkit.nn import QuantizedModule
from qtoolkit.nn.plan import Plan, PlanLayer, PlanReport, PlanReportHolder, StepReport
from qtoolkit.nn.sharing import first_call, mark_further_call
from qtoolkit.saving import allowed, layers
from qtoolkit.saving.composites import (
    COMPOSITE_NAMES,
    COMPOSITES,
    composite_options,
    make_composite,
)
from qtoolkit.saving.container import Container, InvalidFileError, require
from qtoolkit.saving.graphs import decode_graph, encode_graph
from qtoolkit.saving.names import check_identifier, check_name, is_name
from qtoolkit.saving.values import decode, encode


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _describe(path: str, module: nn.Module) -> str:
    return f"{path or 'the model itself'} ({type(module).__module__}.{type(module).__qualname__})"


class Writer:
    """Collects modules for a file.

    Attributes:
        tensors: by name.
        channels_last: names of the tensors that lie so in memory.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.channels_last: list[str] = []
        self._names: dict[Any, str] = {}
        self._paths: dict[nn.Module, str] = {}

    def module(self, module: nn.Module, path: str = "") -> dict[str, Any]:
        """A module as JSON; its tensors are collected.

        Raises:
            ValueError: it, or one in it, has no place in a file; the message names it.
        """
        if module in self._paths:
            return {"kind": "same", "path": self._paths[module]}
        self._paths[module] = path
        try:
            if module._forward_hooks or module._forward_pre_hooks:
                raise TypeError("a module with forward hooks")
            if not isinstance(module, fx.GraphModule | QuantizedModule | Plan | PlanReportHolder):
                reason = None if type(module) in allowed.CONTAINER_NAMES else not_plain(module)
                if reason is not None:
                    raise TypeError(f"a layer of which it is not known what it computes: {reason}")
            result = self._kind(module, path)
        except TypeError as error:
            raise ValueError(
                f"cannot save {_describe(path, module)}: a file holds no Python code, and this is "
                f"{error} (qt.explain says which modules could not be captured, and why)"
            ) from error
        first = first_call(module)
        if first in self._paths:
            result["further_call_of"] = self._paths[first]
        return result

    def _kind(self, module: nn.Module, path: str) -> dict[str, Any]:
        if isinstance(module, QuantizedModule):
            return {
                "kind": "quantized",
                "type": type(module).__name__,
                "options": layers.quantized_options(module),
                "buffers": self._tensors(module._buffers, path),
            }
        if isinstance(module, Plan):
            return self._plan(module, path)
        if isinstance(module, PlanReportHolder):
            return {"kind": "plan_report", "report": dataclasses.asdict(module.report)}
        result: dict[str, Any]
        if isinstance(module, fx.GraphModule):
            result = {"kind": "graph", "name": type(module).__name__}
            result["nodes"] = encode_graph(module)
        elif type(module) in allowed.CONTAINER_NAMES:
            result = {"kind": "container", "type": allowed.CONTAINER_NAMES[type(module)]}
        elif type(module) in allowed.LAYER_NAMES:
            result = {"kind": "float", "type": allowed.LAYER_NAMES[type(module)]}
            result["options"] = layers.float_options(module)
        elif type(module) in COMPOSITE_NAMES:
            result = {"kind": "composite", "type": COMPOSITE_NAMES[type(module)]}
            result["options"] = composite_options(module)
        else:
            raise TypeError("a class of which files know nothing")
        result["parameters"] = self._tensors(module._parameters, path)
        result["buffers"] = self._tensors(module._buffers, path)
        result["not_persistent"] = sorted(module._non_persistent_buffers_set)
        result["children"] = {
            name: None if child is None else self.module(child, _join(path, name))
            for name, child in module._modules.items()
            if not is_report_holder(child)
        }
        for name in (*result["parameters"], *result["buffers"], *result["children"]):
            if not is_name(name):
                raise TypeError(f"a module with the name {name!r}")
        return {key: value for key, value in result.items() if value}

    def _tensors(self, tensors: dict[str, Any], path: str) -> dict[str, str | None]:
        return {
            name: None if tensor is None else self._tensor(tensor, _join(path, name))
            for name, tensor in tensors.items()
        }

    def _tensor(self, tensor: Tensor, name: str) -> str:
        """The name under which a tensor is kept; one that several modules hold is kept once."""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError(f"a tensor without plain data ({name.rpartition('.')[2]})")
        if type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(f"a tensor of the class {type(tensor).__qualname__}")
        key: Any = id(tensor)
        if tensor.numel():
            key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if key not in self._names:
            self._names[key] = name
            self.tensors[name] = tensor
            is_image = not tensor.is_contiguous() and tensor.dim() == 4
            if is_image and tensor.is_contiguous(memory_format=torch.channels_last):
                self.channels_last.append(name)
        return self._names[key]

    def _plan(self, plan: Plan, path: str) -> dict[str, Any]:
        head, (texts, integers, constants), tail = plan.plan.state()
        own = [
            {key: self._tensor(t, f"{path}.{i}.{key}") for key, t in sorted(step.items())}
            for i, step in enumerate(constants)
        ]
        return {
            "kind": "plan",
            "layers": [dataclasses.asdict(layer) for layer in plan.layers],
            "head": encode(head),
            "texts": encode(texts),
            "integers": [dict(sorted(step.items())) for step in integers],
            "constants": own,
            "tail": encode(tail),
        }


_GRAPH_KEYS = {"name", "nodes"}
_HOLDER_KEYS = {"parameters", "buffers", "not_persistent", "children"}
_KINDS: dict[str, tuple[set[str], set[str]]] = {
    # Keys that must be there, and keys that may.
    "same": ({"path"}, set()),
    "quantized": ({"type", "options", "buffers"}, set()),
    "plan": ({"layers", "head", "texts", "integers", "constants", "tail"}, set()),
    "plan_report": ({"report"}, set()),
    "graph": (_GRAPH_KEYS, _HOLDER_KEYS),
    "container": ({"type"}, _HOLDER_KEYS),
    "composite": ({"type", "options"}, {"children"}),
    "float": ({"type"}, {"options", *_HOLDER_KEYS}),
}


class _NamedError(InvalidFileError):
    """The message begins with the name of the innermost module that is wrong."""


class Reader:
    """Makes modules from a file."""

    def __init__(self, container: Container, channels_last: Any) -> None:
        names = channels_last if isinstance(channels_last, list) else [None]
        good = all(isinstance(name, str) for name in names)
        require(good, "channels_last must be a list of names")
        self._container = container
        self._channels_last = set(names)
        self._tensors: dict[str, Tensor] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._modules: dict[str, nn.Module] = {}
        self._depth = 0

    def module(self, data: Any, path: str = "") -> nn.Module:
        """The module that ``Writer.module`` wrote, in evaluation mode.

        Raises:
            InvalidFileError: it is none; the message names the module.
        """
        try:
            self._depth += 1
            require(self._depth <= 100, "modules are nested too deeply")
            result = self._checked(data, path)
        except (_NamedError, ImportError, MemoryError):
            raise
        except Exception as error:
            # Constructors of PyTorch raise all sorts for options that make no sense.
            raise _NamedError(f"{path or 'the model'}: {error}") from error
        finally:
            self._depth -= 1
        self._modules.setdefault(path, result)
        return result

    def tensor(self, name: Any) -> Tensor:
        """A tensor of the file; the same object for the same name."""
        require(isinstance(name, str), f"{str(name)[:80]} is no name of a tensor")
        if name not in self._tensors:
            tensor = self._container.tensor(name)
            if name in self._channels_last:
                require(tensor.dim() == 4, f"tensor {name!r} cannot be channels_last")
                tensor = tensor.contiguous(memory_format=torch.channels_last)
            self._tensors[name] = tensor
        return self._tensors[name]

    def unused(self) -> set[str]:
        """The tensors that no module has taken."""
        return self._container.entries.keys() - self._tensors.keys()

    def _checked(self, data: Any, path: str) -> nn.Module:
        require(isinstance(data, dict) and "kind" in data, "it is no module")
        kind = data["kind"]
        known = isinstance(kind, str) and kind in _KINDS
        require(known, f"unknown kind {str(kind)[:80]!r}")
        needed, optional = _KINDS[kind]
        keys = data.keys() - {"kind", "further_call_of"}
        require(needed <= keys <= needed | optional, f"it has other keys than a {kind}")
        makers: dict[str, Callable[[Any, str], nn.Module]] = {
            "same": self._same,
            "quantized": self._quantized,
            "plan": self._plan,
            "plan_report": self._plan_report,
            "graph": self._graph,
            "container": self._container_of,
            "composite": self._composite,
            "float": self._float,
        }
        module = makers[kind](data, path)
        if "further_call_of" in data:
            mark_further_call(module, self._known(data["further_call_of"]))
        return module

    def _known(self, path: Any) -> nn.Module:
        require(isinstance(path, str) and path in self._modules, f"no module {str(path)[:80]!r}")
        return self._modules[path]

    def _same(self, data: Any, path: str) -> nn.Module:
        return self._known(data["path"])

    def _named(self, data: Any, key: str) -> dict[str, Tensor | None]:
        names = data.get(key, {})
        require(isinstance(names, dict), f"{key} must be an object")
        return {
            check_name(name, "a tensor"): None if value is None else self.tensor(value)
            for name, value in names.items()
        }

    def _quantized(self, data: Any, path: str) -> nn.Module:
        require(isinstance(data["type"], str), "its type must be text")
        buffers = self._named(data, "buffers")
        return layers.make_quantized(data["type"], data["options"], buffers).eval()

    def _parameter(self, name: str, tensor: Tensor) -> nn.Parameter:
        if name not in self._parameters:
            self._parameters[name] = nn.Parameter(tensor, requires_grad=False)
        return self._parameters[name]

    def _children(self, data: Any, path: str) -> dict[str, nn.Module | None]:
        children = data.get("children", {})
        require(isinstance(children, dict), "children must be an object")
        return {
            check_name(name, "a layer"): None
            if child is None
            else self.module(child, _join(path, name))
            for name, child in children.items()
        }

    def _fill(self, module: nn.Module, data: Any, path: str) -> None:
        """Registers tensors and children."""
        kept_out = data.get("not_persistent", [])
        require(isinstance(kept_out, list), "not_persistent must be a list")
        parameters = self._named(data, "parameters")
        for name, tensor in parameters.items():
            key = data["parameters"][name]
            parameter = None if tensor is None else self._parameter(key, tensor)
            module.register_parameter(name, parameter)
        for name, tensor in self._named(data, "buffers").items():
            module.register_buffer(name, tensor, persistent=name not in kept_out)
        for name, child in self._children(data, path).items():
            module.add_module(name, child)

    def _graph(self, data: Any, path: str) -> nn.Module:
        name = check_identifier(data["name"], "a graph's class")
        module = fx.GraphModule(nn.Module(), fx.Graph(), name)
        self._fill(module, data, path)
        module.graph = decode_graph(data["nodes"], module)
        module.graph.lint()
        return module.eval()

    def _container_of(self, data: Any, path: str) -> nn.Module:
        kind = data["type"]
        good = isinstance(kind, str) and kind in allowed.CONTAINERS
        require(good, f"unknown type {str(kind)[:80]!r}")
        module = allowed.CONTAINERS[kind]()
        self._fill(module, data, path)
        return module.eval()

    def _composite(self, data: Any, path: str) -> nn.Module:
        kind = data["type"]
        good = isinstance(kind, str) and kind in COMPOSITES
        require(good, f"unknown type {str(kind)[:80]!r}")
        return make_composite(kind, data["options"], self._children(data, path)).eval()

    def _float(self, data: Any, path: str) -> nn.Module:
        kind = data["type"]
        good = isinstance(kind, str) and kind in allowed.LAYERS
        require(good, f"unknown type {str(kind)[:80]!r}")
        parameters, buffers = self._named(data, "parameters"), self._named(data, "buffers")
        count = len(parameters)
        module = layers.make_float(allowed.LAYERS[kind], data.get("options", {}), count)
        for own, tensors in ((module._parameters, parameters), (module._buffers, buffers)):
            require(own.keys() == tensors.keys(), f"its tensors must be {sorted(own)}")
            for name, tensor in tensors.items():
                expected = own[name]
                good = (tensor is None) == (expected is None)
                if tensor is not None and expected is not None:
                    good = tensor.shape == expected.shape
                require(good, f"its {name} has not the shape that it needs")
        for name, tensor in parameters.items():
            if tensor is not None:
                setattr(module, name, self._parameter(data["parameters"][name], tensor))
        for name, tensor in buffers.items():
            setattr(module, name, tensor)
        children = self._children(data, path)
        require(children.keys() == module._modules.keys(), "its layers are not those of its type")
        for name, child in children.items():
            setattr(module, name, child)
        return module.eval()

    def _plan(self, data: Any, path: str) -> nn.Module:
        constants = data["constants"]
        good = isinstance(constants, list) and all(isinstance(step, dict) for step in constants)
        require(good, "constants must be a list of objects")
        tensors = [{key: self.tensor(name) for key, name in step.items()} for step in constants]
        plan_layers = [_record(PlanLayer, layer) for layer in _list(data["layers"])]
        head, texts, tail = (decode(data[key]) for key in ("head", "texts", "tail"))
        return Plan((head, (texts, data["integers"], tensors), tail), plan_layers).eval()

    def _plan_report(self, data: Any, path: str) -> nn.Module:
        report = data["report"]
        require(isinstance(report, dict) and "steps" in report, "a report must have steps")
        steps = []
        for step in _list(report["steps"]):
            if isinstance(step, dict) and isinstance(step.get("shape"), list):
                step = {**step, "shape": tuple(step["shape"])}
            steps.append(_record(StepReport, step))
        return PlanReportHolder(_record(PlanReport, {**report, "steps": tuple(steps)})).eval()


def _list(value: Any) -> list[Any]:
    require(isinstance(value, list), f"{str(value)[:80]} must be a list")
    return value


def _record(kind: type[Any], value: Any) -> Any:
    """A dataclass of texts and numbers."""
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    good = isinstance(value, dict) and value.keys() == types.keys()
    require(good, f"{str(value)[:80]} is no {kind.__name__}")
    for name, annotation in types.items():
        allowed_types = {
            "str": (str,),
            "int": (int,),
            "float | None": (float, int, type(None)),
            "tuple[int, ...]": (tuple,),
            "tuple[StepReport, ...]": (tuple,),
        }[annotation]
        good = isinstance(value[name], allowed_types)
        if annotation == "tuple[int, ...]":
            good = good and all(isinstance(item, int) for item in value[name])
        require(good, f"the {name} of a {kind.__name__} is {str(value[name])[:80]}")
    return kind(**value)
