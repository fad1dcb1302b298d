"""Brings a captured graph into the form that the patterns read."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from qtoolkit.graph import same_values
from qtoolkit.graph.modules import called_module, free_name
from qtoolkit.graph.patterns import AsModule, pattern_of, patterns
from qtoolkit.graph.patterns.fusing import is_foldable, only_user
from qtoolkit.graph.patterns.weighted import set_submodule
from qtoolkit.graph.plain import is_plain
from qtoolkit.graph.shapes import float_shape
from qtoolkit.nn.qat.weighted import batch_norm_factor, folded_bias
from qtoolkit.nn.sharing import further_call
from qtoolkit.nn.weights import swap_channels


def _as_module(node: fx.Node, module: fx.GraphModule) -> AsModule | None:
    found = same_values.as_module(node)
    for pattern in patterns():
        found = found or pattern.as_module(node, module)
    return found


def functions_to_modules(module: fx.GraphModule) -> None:
    """Replaces calls of functions that can be quantized by calls of modules, named like the
    node."""
    for node in list(module.graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        found = _as_module(node, module)
        if found is None:
            continue
        name = free_name(module, node.name)
        module.add_submodule(name, found.module.train(module.training))
        with module.graph.inserting_after(node):
            call = module.graph.call_module(name, found.args)
        call.meta = dict(node.meta)
        call.meta[FLOAT_NODE] = node.name
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.recompile()


#: Key of a node's meta: the name of the node in the graph as captured.
FLOAT_NODE = "qtoolkit_float_node"


def float_node(node: fx.Node) -> str:
    """The name that a node had in the graph as captured."""
    return node.meta.get(FLOAT_NODE, node.name)


def separate_shared_layers(module: fx.GraphModule) -> None:
    """Gives every call of a layer its own module, sharing the parameters.

    The first call keeps the name. Folding and quantizing one call then leaves the others alone.
    """
    seen: set[str] = set()
    for node in module.graph.nodes:
        called = called_module(node, module)
        if called is None or pattern_of(node, module) is None:
            continue
        name = str(node.target)
        if name in seen:
            parent_name, _, leaf = name.rpartition(".")
            parent = module.get_submodule(parent_name)
            new_leaf = free_name(parent, f"{leaf}_1")
            parent.add_module(new_leaf, further_call(called))
            node.target = f"{parent_name}.{new_leaf}" if parent_name else new_leaf
        seen.add(str(node.target))
    module.recompile()


def read_directly(name: str, module: fx.GraphModule) -> bool:
    """True if the graph reads a parameter or buffer of the module, besides calling it."""
    return any(
        node.op == "get_attr" and str(node.target).rpartition(".")[0] == name
        for node in module.graph.nodes
    )


def _use_constant(node: fx.Node, value: Any) -> None:
    """Puts a constant in the place of a node and erases the node."""

    def replace(argument: Any) -> Any:
        return value if argument is node else argument

    for user in list(node.users):
        user.args = map_aggregate(user.args, replace)
        user.kwargs = map_aggregate(user.kwargs, replace)
    node.graph.erase_node(node)


def _is_layer(node: fx.Node, module: fx.GraphModule) -> bool:
    """True for a call of one of torch.nn's modules, which take their input first."""
    called = called_module(node, module)
    return called is not None and type(called).__module__.startswith("torch.nn.")


def settle_calls(module: fx.GraphModule) -> None:
    """Brings calls into one form: layers' inputs by position, no views, no facts of weights."""
    for node in list(module.graph.nodes):
        if _is_layer(node, module) and not node.args and len(node.kwargs) == 1:
            node.args, node.kwargs = tuple(node.kwargs.values()), {}
        elif node.op == "call_method" and node.target == "view":
            # Converted layers give channels-last tensors, where a view may be impossible.
            if not any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
                node.target = "reshape"
        elif node.op == "call_function" and node.target is getattr and node.args[1] == "dtype":
            source = node.args[0]
            if isinstance(source, fx.Node) and source.op == "get_attr":
                dtype = operator.attrgetter(str(source.target))(module).dtype
                _use_constant(node, dtype)
                if not source.users:
                    module.graph.erase_node(source)
    module.recompile()


def remove_identities(module: fx.GraphModule, *, training: bool = False) -> None:
    """Removes dropout and the like, which would stand between layers that can be fused.

    In training only ``nn.Identity`` does nothing, and unused modules stay, as they may be trained.
    """
    kinds = (nn.Identity,) if training else same_values.IDENTITIES
    for node in list(module.graph.nodes):
        if is_plain(called_module(node, module), kinds) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    if not training:
        module.delete_all_unused_submodules()
    module.recompile()


_FOLDING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)


def _fold_transposed(layer: nn.ConvTranspose2d, batch_norm: nn.Module) -> nn.ConvTranspose2d:
    """The layer with its batch norm folded in; torch's function knows no groups here."""
    folded = copy.deepcopy(layer)
    with torch.no_grad():
        factor = batch_norm_factor(batch_norm).reshape(-1, 1, 1, 1)
        weight = swap_channels(layer.weight, layer.groups) * factor
        folded.weight.copy_(swap_channels(weight, layer.groups))
        folded.bias = nn.Parameter(folded_bias(layer.bias, batch_norm))
    return folded


_STATISTICS = "qtoolkit_statistics"


def set_folded_statistics(layer: nn.Module, mean: Tensor, deviation: Tensor) -> None:
    """Notes mean and standard deviation of each output channel of a layer."""
    setattr(layer, _STATISTICS, (mean, deviation))


def folded_statistics(layer: nn.Module | None) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each output channel, as the batch norm that was folded in
    makes them; None without one."""
    return getattr(layer, _STATISTICS, None)


def fold_batch_norms(module: fx.GraphModule) -> None:
    """Folds every batch norm that follows a convolution or linear layer into its weight and
    bias."""
    for node in list(module.graph.nodes):
        layer = called_module(node, module)
        if not is_plain(layer, _FOLDING):
            continue
        user = only_user(node)
        batch_norm = called_module(user, module)
        if user is None or not is_foldable(batch_norm):
            continue
        assert isinstance(batch_norm, nn.modules.batchnorm._BatchNorm)
        assert layer is not None
        shape = float_shape(node)
        if isinstance(layer, nn.Linear) and (shape is None or len(shape) != 2):
            continue  # over [N, L, C] a batch norm is not per output feature
        if read_directly(str(node.target), module) or read_directly(str(user.target), module):
            continue
        folded: nn.Module
        if isinstance(layer, nn.Linear):
            folded = fuse_linear_bn_eval(layer, batch_norm)
        elif isinstance(layer, nn.ConvTranspose2d):
            folded = _fold_transposed(layer, batch_norm)
        else:
            folded = fuse_conv_bn_eval(layer, batch_norm)  # type: ignore[type-var]
        assert batch_norm.running_var is not None
        mean = torch.zeros_like(batch_norm.running_var)
        deviation = torch.ones_like(mean)
        if batch_norm.weight is not None:
            mean, deviation = batch_norm.bias.detach(), batch_norm.weight.detach().abs()
        set_folded_statistics(folded, mean, deviation)
        set_submodule(module, str(node.target), folded)
        node.meta[FLOAT_NODE] = float_node(user)
        user.replace_all_uses_with(node)
        module.graph.erase_node(user)
    module.delete_all_unused_submodules()
    module.recompile()
