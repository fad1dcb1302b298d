"""Layers that users write in several operators, and operators that are several layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from qtoolkit.graph.modules import called_module, free_name, pair
from qtoolkit.graph.patterns.conv import symmetric_padding
from qtoolkit.graph.patterns.fusing import only_user
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.shapes import bind_any, float_shape
from qtoolkit.nn import functional

_RESHAPES = {"reshape", "view", torch.reshape}
_TRANSPOSES = {"transpose", "swapaxes", torch.transpose, torch.swapaxes}
_PERMUTES = {"permute", torch.permute}


def _calls(node: fx.Node | None, targets: set[Any]) -> bool:
    return (
        node is not None and node.op in ("call_function", "call_method") and node.target in targets
    )


def _input(node: fx.Node | None) -> fx.Node | None:
    """The first argument of a call, if it is a value of the graph."""
    source = node.args[0] if node is not None and node.args else None
    return source if isinstance(source, fx.Node) else None


def _own_input(node: fx.Node | None) -> fx.Node | None:
    """The same, if nothing else uses it."""
    source = _input(node)
    return source if source is not None and only_user(source) is node else None


def _swaps_groups(node: fx.Node | None) -> bool:
    """True for dimensions 1 and 2 of five exchanged."""
    if node is None:
        return False
    if _calls(node, _TRANSPOSES):
        return {*node.args[1:]} in ({1, 2}, {-4, 2}, {1, -3}, {-4, -3})
    order: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    return _calls(node, _PERMUTES) and list(order) == [0, 2, 1, 3, 4]


def _channel_groups(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The input and the number of groups if a node ends ``x.view(n, groups, channels // groups, h,
    w).transpose(1, 2).contiguous().view(n, channels, h, w)``."""
    swap = _own_input(node)
    if _calls(swap, {"contiguous"}):
        swap = _own_input(swap)
    split = _own_input(swap)
    source = _input(split)
    if not (_calls(node, _RESHAPES) and _swaps_groups(swap) and _calls(split, _RESHAPES)):
        return None
    before, between, after = float_shape(source), float_shape(split), float_shape(node)
    if source is None or before is None or between is None or before != after:
        return None
    if len(before) != 4 or (before[0], *before[2:]) != (between[0], *between[3:]):
        return None
    return source, between[1]


def find_channel_shuffles(module: fx.GraphModule) -> None:
    """Puts ``nn.ChannelShuffle`` where one is written as reshape, transpose and reshape."""
    for node in list(module.graph.nodes):
        found = _channel_groups(node)
        if found is None:
            continue
        source, groups = found
        name = free_name(module, f"{node.name}_shuffle")
        module.add_submodule(name, nn.ChannelShuffle(groups))
        with module.graph.inserting_after(node):
            call = module.graph.call_module(name, (source,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        while node is not source:
            previous = _input(node)
            assert previous is not None
            module.graph.erase_node(node)
            node = previous
    module.recompile()


def split_padding(module: fx.GraphModule) -> None:
    """Takes the padding out of convolutions that pad with other than zeros, or more on one side.

    Every call must have a module of its own.
    """
    for node in list(module.graph.nodes):
        conv = called_module(node, module)
        if not is_plain(conv, nn.Conv2d) or len(node.args) != 1:
            continue
        assert isinstance(conv, nn.Conv2d)
        source = _input(node)
        shape = float_shape(source)
        if source is None or shape is None or len(shape) != 4:
            continue
        if conv.padding_mode == "zeros" and symmetric_padding(conv) is not None:
            continue
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        name = free_name(module, f"{node.name}_pad")
        module.add_submodule(name, functional.Pad(mode).train(module.training))
        with module.graph.inserting_before(node):
            pad = module.graph.call_module(name, (source, _pad_of(conv)))
        pad.meta = dict(source.meta)
        node.args = (pad,)
        conv.padding, conv.padding_mode = (0, 0), "zeros"
    module.recompile()


def _pad_of(conv: nn.Conv2d) -> list[int]:
    """The padding as ``F.pad`` has it: width first."""
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(pair(conv.dilation), pair(conv.kernel_size))]
        return [total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2]
    height, width = (0, 0) if conv.padding == "valid" else pair(conv.padding)
    return [width, width, height, height]


def _layer_norm(
    x: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: Any = 1e-5
) -> None:
    """The parameters of ``F.layer_norm``."""


def _holder(node: Any, module: fx.GraphModule) -> str:
    """The name of the module of which a node reads a parameter; empty if it does not."""
    is_read = isinstance(node, fx.Node) and node.op == "get_attr"
    return str(node.target).rpartition(".")[0] if is_read else ""


def _is_called(name: str, module: fx.GraphModule) -> bool:
    return any(n.op == "call_module" and n.target == name for n in module.graph.nodes)


def _is_norm(holder: nn.Module, shape: tuple[int, ...], eps: float) -> bool:
    """True for a layer norm of that shape and epsilon."""
    if not is_plain(holder, nn.LayerNorm):
        return False
    assert isinstance(holder, nn.LayerNorm)
    return holder.normalized_shape == shape and holder.eps == eps


def find_layer_norms(module: fx.GraphModule) -> None:
    """Puts ``nn.LayerNorm`` where ``F.layer_norm`` is called with the parameters of a module that
    has no others, such as a subclass that turns images over; they keep their names."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target is not torch.nn.functional.layer_norm:
            continue
        arguments = bind_any(_layer_norm, node)
        if arguments is None or float_shape(_input(node)) is None:
            continue
        weight, bias = arguments["weight"], arguments["bias"]
        name = _holder(weight, module)
        if not name or (bias is not None and _holder(bias, module) != name):
            continue
        holder: Any = module.get_submodule(name)
        parameters = {key for key, _ in holder.named_parameters()}
        named = {str(n.target).rpartition(".")[2] for n in (weight, bias) if n is not None}
        if "weight" not in named or not named <= {"weight", "bias"} or parameters != named:
            continue
        shape, eps = tuple(holder.weight.shape), arguments["eps"]
        if isinstance(eps, fx.Node) or list(holder.named_buffers()):
            continue
        if _is_called(name, module) and not _is_norm(holder, shape, eps):
            continue
        norm = nn.LayerNorm(list(shape), eps, bias=bias is not None, device="meta")
        norm.weight = holder.weight
        norm.bias = holder.bias if bias is not None else None  # type: ignore[assignment]
        module.set_submodule(name, norm.train(holder.training))
        with module.graph.inserting_after(node):
            call = module.graph.call_module(name, (_input(node),))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        for old in (node, weight, bias):
            if isinstance(old, fx.Node) and not old.users:
                module.graph.erase_node(old)
    module.recompile()
