"""Captured graphs as lists of nodes.

``torch.fx`` makes source text of a graph and runs it, so every name, target and argument of a node
from a file is checked before it becomes part of a graph.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from qtoolkit.saving import allowed
from qtoolkit.saving.container import require
from qtoolkit.saving.names import check_identifier, check_path
from qtoolkit.saving.values import decode, decode_type, encode, encode_type

_KEYS = {"op", "name", "target", "args", "kwargs", "type"}


def encode_graph(module: fx.GraphModule) -> list[dict[str, Any]]:
    """The nodes of a graph as JSON.

    Raises:
        TypeError: a call or an argument has no place in a file; the message says which.
    """
    if type(module.graph._codegen) is not fx.graph.CodeGen:
        raise TypeError("a graph with inputs or outputs of its own kind (pytrees)")
    result = []
    for node in module.graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = allowed.name_of(node.target)
            if target is None:
                name = getattr(node.target, "__qualname__", node.target)
                raise TypeError(f"a call of {getattr(node.target, '__module__', '')}.{name}")
        if node.op == "get_attr" and not isinstance(_registered(module, target), Tensor):
            raise TypeError(f"a graph that reads {target}, which is no parameter or buffer")
        if node.op == "call_method" and target not in allowed.METHODS:
            raise TypeError(f"a call of the method {target}")
        entry = {
            "op": node.op,
            "name": node.name,
            "target": target,
            "args": [encode(argument) for argument in node.args],
            "kwargs": {key: encode(value) for key, value in node.kwargs.items()},
            "type": encode_type(node.type),
        }
        result.append({key: value for key, value in entry.items() if value or key == "target"})
    return result


def find(module: nn.Module, path: str) -> Any:
    """The layer, parameter or buffer of a dotted name; None if there is none.

    Looks at nothing but what is registered, unlike ``getattr``.
    """
    check_path(path, "a layer")
    return _registered(module, path)


def _registered(module: nn.Module, path: str) -> Any:
    *parents, leaf = path.split(".")
    for name in parents:
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    for table in (module._modules, module._parameters, module._buffers):
        if leaf in table:
            return table[leaf]
    return None


class _Decoder:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.inputs: set[str] = set()

    def add(self, entry: Any) -> None:
        require(isinstance(entry, dict) and entry.keys() <= _KEYS, "a node is no object of a node")
        require("op" in entry and "target" in entry, "a node must have op and target")
        name = check_identifier(entry.get("name"), "a node")
        require(name not in self.nodes, f"there are two nodes {name!r}")
        args, kwargs = entry.get("args", []), entry.get("kwargs", {})
        require(isinstance(args, list), f"the arguments of node {name} must be a list")
        require(isinstance(kwargs, dict), f"the named arguments of node {name} must be an object")
        args = tuple(decode(argument, self.nodes) for argument in args)
        kwargs = {
            check_identifier(key, "an argument"): decode(value, self.nodes)
            for key, value in kwargs.items()
        }
        op, target = entry["op"], entry["target"]
        require(isinstance(target, str), f"the target of node {name} must be text")
        makers = {
            "placeholder": self._input,
            "get_attr": self._tensor,
            "call_module": self._layer,
            "call_function": self._function,
            "call_method": self._method,
            "output": self._output,
        }
        require(isinstance(op, str) and op in makers, f"node {name} has the unknown op {op!r}")
        target = makers[op](name, target, args, kwargs)
        annotation = decode_type(entry.get("type"))
        self.nodes[name] = self.graph.create_node(op, target, args, kwargs, name, annotation)

    def _input(self, name: str, target: str, args: Any, kwargs: Any) -> str:
        bare = target.removeprefix("*").removeprefix("*")
        check_identifier(bare, "an input")
        require(bare not in self.inputs, f"there are two inputs {bare!r}")
        self.inputs.add(bare)
        require(len(args) <= 1 and not kwargs, f"input {bare} may have one default")
        nodes: list[fx.Node] = []
        fx.map_arg(args, nodes.append)
        require(not nodes, f"the default of input {bare} must be a value")
        return target

    def _tensor(self, name: str, target: str, args: Any, kwargs: Any) -> str:
        require(not args and not kwargs, f"node {name} takes no arguments")
        require(isinstance(find(self.module, target), Tensor), f"there is no tensor {target!r}")
        return target

    def _layer(self, name: str, target: str, args: Any, kwargs: Any) -> str:
        require(isinstance(find(self.module, target), nn.Module), f"there is no layer {target!r}")
        return target

    def _function(self, name: str, target: str, args: Any, kwargs: Any) -> Any:
        function = allowed.function_of(target)
        require(function is not None, f"node {name} calls {target[:80]!r}, which files may not")
        if function is getattr:
            good = len(args) == 2 and not kwargs and isinstance(args[0], fx.Node)
            good = good and isinstance(args[1], str) and args[1] in allowed.ATTRIBUTES
            require(good, f"node {name} reads an attribute that files may not read")
        return function

    def _method(self, name: str, target: str, args: Any, kwargs: Any) -> str:
        require(
            target in allowed.METHODS,
            f"node {name} calls the method {target[:80]!r}, which files may not",
        )
        good = bool(args) and isinstance(args[0], fx.Node)
        require(good, f"node {name} must call the method of a value of the graph")
        return target

    def _output(self, name: str, target: str, args: Any, kwargs: Any) -> str:
        good = target == "output" and len(args) == 1 and not kwargs
        require(good, f"node {name} must be an output of one value")
        return target


def decode_graph(nodes: Any, module: nn.Module) -> fx.Graph:
    """The graph that ``encode_graph`` wrote.

    Args:
        module: holds the layers and tensors that it names.

    Raises:
        InvalidFileError: anything else.
    """
    require(isinstance(nodes, list) and bool(nodes), "a graph must be a list of nodes")
    decoder = _Decoder(module)
    for entry in nodes:
        decoder.add(entry)
    outputs = [index for index, node in enumerate(decoder.graph.nodes) if node.op == "output"]
    require(outputs == [len(nodes) - 1], "a graph must end in its only output")
    return decoder.graph
