"""Fuses the layers of a graph that trains, and takes them apart again for ``convert``."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.fusing import only_user, relu_bound
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.same_values import origin
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn import functional
from qtoolkit.nn.qat import fused
from qtoolkit.nn.qat.batch_norm import is_freezable
from qtoolkit.nn.qat.weighted import WEIGHTED


def fuse_qat(module: fx.GraphModule) -> None:
    """Rewrites a prepared graph in place; every module keeps its name."""
    for node in list(module.graph.nodes):
        called = called_module(node, module)
        if isinstance(called, FakeQuantize):
            node.meta.update(node.args[0].meta)
        elif isinstance(called, WEIGHTED):
            _tell_input_format(node, module)
    for node in list(module.graph.nodes):
        called = called_module(node, module)
        if is_plain(called, nn.MaxPool2d) and len(node.args) == 1 and not node.kwargs:
            _replace([node], fused.max_pool2d, node.args, [str(node.target)], module)
        elif (
            node.op == "call_method"
            and node.target == "view"
            and not node.kwargs  # view(dtype=...) is another operator
            and not any(isinstance(arg, torch.dtype) for arg in node.args)
        ):
            # Images are channels_last here, where a view may be impossible.
            node.target = "reshape"
    for node in list(module.graph.nodes):
        called = called_module(node, module)
        if called is not None and is_freezable(called) and len(node.args) == 1 and not node.kwargs:
            _fuse_batch_norm(node, module)
    _keep_layout_of_strangers(module)
    module.graph.lint()
    module.recompile()


def unfuse_qat(module: fx.GraphModule) -> None:
    """The graph as it was before ``fuse_qat``, but for views that are reshapes now."""
    graph = module.graph
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is fused.batch_norm_act:
                x, residual, batch_norm, add, relu, fake_quant = node.args
                y = graph.call_module(batch_norm.target, (x,))
                if add is not None:
                    y = graph.call_module(add.target, (y, residual))
                for part in (relu, fake_quant):
                    y = y if part is None else graph.call_module(part.target, (y,))
            elif node.target is fused.max_pool2d:
                y = graph.call_module(node.args[1].target, node.args[:1])
            elif node.target is fused.contiguous:
                y = node.args[0]
            elif isinstance(called_module(node, module), WEIGHTED):
                node.args = node.args[:1]
                continue
            else:
                continue
        if y is not node.args[0]:
            y.meta = dict(node.meta)
        node.replace_all_uses_with(y)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    graph.lint()
    module.recompile()


def _replace(
    nodes: list[fx.Node],
    function: Any,
    inputs: tuple[Any, ...],
    names: list[str | None],
    module: fx.GraphModule,
) -> None:
    """Puts one call of ``function(*inputs, *modules)`` in place of nodes of which each reads the
    one before."""
    last = nodes[-1]
    with module.graph.inserting_after(last):
        new = module.graph.call_function(function, inputs)
    with module.graph.inserting_before(new):
        modules = [None if name is None else module.graph.get_attr(name) for name in names]
    new.args = (*inputs, *modules)
    new.meta = dict(last.meta)
    last.replace_all_uses_with(new)
    for node in reversed(nodes):
        module.graph.erase_node(node)


def _fuse_batch_norm(node: fx.Node, module: fx.GraphModule) -> None:
    nodes = [node]
    names: list[str | None] = [str(node.target), None, None, None]
    residual = None

    def take(place: int, kind: Any) -> fx.Node | None:
        user = only_user(nodes[-1])
        if user is None or not kind(called_module(user, module)):
            return None
        names[place] = str(user.target)
        nodes.append(user)
        return user

    user = only_user(node)
    if user is not None and len(set(user.args)) == 2:
        add = take(1, lambda called: is_plain(called, functional.Add) and not called.broadcast)
        if add is not None:
            residual = next(arg for arg in add.args if arg is not node)
    take(2, lambda called: relu_bound(called)[0])
    take(3, lambda called: isinstance(called, FakeQuantize))
    if len(nodes) > 1:
        _replace(nodes, fused.batch_norm_act, (node.args[0], residual), names, module)


def _tell_input_format(node: fx.Node, module: fx.GraphModule) -> None:
    """Passes the fake-quantize module of its input to a layer with a weight."""
    source = origin(node.args[0], module) if isinstance(node.args[0], fx.Node) else None
    if source is not None and isinstance(called_module(source, module), FakeQuantize):
        with module.graph.inserting_before(node):
            node.args = (node.args[0], module.graph.get_attr(str(source.target)))


def _keep_layout_of_strangers(module: fx.GraphModule) -> None:
    """Undoes channels_last for the user's code: outputs, and modules that are not torch's."""
    for node in list(module.graph.nodes):
        called = called_module(node, module)
        known = called is None or type(called).__module__.startswith(("torch.nn.", "qtoolkit."))
        if known and node.op != "output":
            continue
        for value in node.all_input_nodes:
            shape = float_shape(value)
            if value.op != "placeholder" and shape is not None and len(shape) > 3:
                with module.graph.inserting_before(node):
                    call = module.graph.call_function(fused.contiguous, (value,))
                node.replace_input_with(value, call)
