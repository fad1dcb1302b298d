"""Brings a captured graph into the form that the patterns read."""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from qtoolkit.graph import same_values
from qtoolkit.graph.patterns import AsModule, called_module, pattern_of, patterns
from qtoolkit.graph.patterns.fusing import only_user
from qtoolkit.graph.patterns.weighted import set_submodule


def free_name(module: nn.Module, name: str) -> str:
    """A name for a new child: the wanted one, or with a number if that is taken."""
    if not hasattr(module, name):
        return name
    number = 1
    while hasattr(module, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"


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
            parent.add_module(new_leaf, _shallow_copy(called))
            node.target = f"{parent_name}.{new_leaf}" if parent_name else new_leaf
        seen.add(str(node.target))
    module.recompile()


def _shallow_copy(layer: nn.Module) -> nn.Module:
    copy = layer.__class__.__new__(layer.__class__)
    copy.__dict__ = dict(layer.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        copy.__dict__[table] = dict(layer.__dict__[table])
    return copy


def fold_batch_norms(module: fx.GraphModule) -> None:
    """Folds every batch norm that follows a convolution or linear layer into its weight and
    bias."""
    for node in list(module.graph.nodes):
        layer = called_module(node, module)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear):
            continue
        user = only_user(node)
        batch_norm = called_module(user, module)
        if user is None or not isinstance(batch_norm, nn.modules.batchnorm._BatchNorm):
            continue
        if not batch_norm.track_running_stats or (
            isinstance(layer, nn.Linear) and not isinstance(batch_norm, nn.BatchNorm1d)
        ):
            continue
        folded: nn.Module
        if isinstance(layer, nn.Linear):
            folded = fuse_linear_bn_eval(layer, batch_norm)
        else:
            folded = fuse_conv_bn_eval(layer, batch_norm)
        set_submodule(module, str(node.target), folded)
        node.meta[FLOAT_NODE] = float_node(user)
        user.replace_all_uses_with(node)
        module.graph.erase_node(user)
    module.delete_all_unused_submodules()
    module.recompile()
