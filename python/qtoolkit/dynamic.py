"""Dynamic quantization: int8 weights, and activations that are quantized as they come."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qtoolkit.graph.patterns.weighted import too_many_products
from qtoolkit.graph.plain import is_plain, not_plain
from qtoolkit.graph.report import FloatLayer, Report, get_report, set_report
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.embedding import Embedding, EmbeddingBag
from qtoolkit.nn.linear import DynamicLinear
from qtoolkit.nn.recurrent import (
    DynamicGRU,
    DynamicGRUCell,
    DynamicLSTM,
    DynamicLSTMCell,
    DynamicRNN,
    DynamicRNNCell,
)
from qtoolkit.qconfig import matches_name

# What takes the place of each kind of layer.
_KINDS: dict[type[nn.Module], Any] = {
    nn.Linear: DynamicLinear,
    nn.LSTM: DynamicLSTM,
    nn.GRU: DynamicGRU,
    nn.RNN: DynamicRNN,
    nn.LSTMCell: DynamicLSTMCell,
    nn.GRUCell: DynamicGRUCell,
    nn.RNNCell: DynamicRNNCell,
    nn.Embedding: Embedding,
    nn.EmbeddingBag: EmbeddingBag,
}
DYNAMIC_LAYERS = tuple(_KINDS)
"""The classes that ``quantize_dynamic`` can replace."""


def quantize_dynamic(
    model: nn.Module,
    *,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    types: Iterable[type[nn.Module]] = (nn.Linear,),
    fuse: bool = True,
    inplace: bool = False,
) -> nn.Module:
    """A copy of a float model whose linear layers have int8 weights and quantize each row of their
    input by its own range, as it comes. Needs no data and no tracing; for transformers and MLPs on
    CPU. The rows are as in Yao et al., "ZeroQuant" (2022). With ``types`` the same for recurrent
    layers and cells, whose states are quantized step by step, and tables of embeddings with 8-bit
    rows.

    The copy is in evaluation mode and has no gradients. The float weights of its layers are not
    copied. Layers that share a weight still do. A layer stays in float where its class does not say
    what it computes (an overridden forward, hooks, a parametrized weight), or where
    ``nn.MultiheadAttention`` reads its weight itself; ``qt.explain`` gives the reasons. Another
    module that reads the weight of a layer finds int8 codes there: exclude such a layer.

    Args:
        model: float32, float16 or bfloat16.
        include: patterns of names, as in ``QConfigMapping.set_module_name``; only layers that match
            one, or lie in a module that does, are quantized. None: all.
        exclude: patterns of the layers that stay in float.
        types: the classes to replace: ``nn.Linear``, ``nn.LSTM``, ``nn.GRU``, ``nn.RNN``, their
            cells, ``nn.Embedding``, ``nn.EmbeddingBag``, or subclasses.
        fuse: let a layer compute the ReLU, GELU or SiLU that follows it in an ``nn.Sequential``;
            ``nn.Identity`` takes its place. Turn it off where code calls the parts of a Sequential
            one by one.
        inplace: change the model itself and return it.

    Raises:
        TypeError: ``model`` is not a module, or ``types`` holds something else than module classes.
        ValueError: the model is quantized already; a type is none of those; a pattern matches
            no layer; no layer can be quantized; a weight holds NaN or infinity (names the layer).
        RuntimeError: the model cannot be copied.
    """
    patterns = {"include": _patterns("include", include), "exclude": _patterns("exclude", exclude)}
    classes = _classes(types)
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_dynamic needs a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("quantize_dynamic needs the Python module, not its TorchScript")
    if get_report(model) is not None:
        raise ValueError("quantize_dynamic: this model is prepared or converted already")
    if inplace and isinstance(model, classes):
        raise ValueError("quantize_dynamic cannot change a lone layer in place: use the result")

    layers = {n: m for n, m in model.named_modules() if isinstance(m, classes)}
    report = Report(converted=True)
    chosen: dict[str, nn.Module] = {}
    for name, layer in layers.items():
        reason = _reason_for_float(name, layer, model, patterns)
        if reason is None:
            chosen[name] = layer
        else:
            report.floats.append(FloatLayer(name, type(layer).__name__, reason))
    for option, given in patterns.items():
        for pattern in given or ():
            if not any(matches_name(pattern, name) for name in layers):
                raise ValueError(
                    f"quantize_dynamic: {option} pattern {pattern!r} matches none of the "
                    f"{len(layers)} {_names(classes)} layers"
                )
    if not chosen:
        reasons = "; ".join(f"{f.name}: {f.reason}" for f in report.floats[:3]) or "it has none"
        raise ValueError(
            f"quantize_dynamic: no {_names(classes)} layer can be quantized ({reasons})"
        )

    with torch.no_grad():
        replacements = _replacements(chosen)
    if inplace:
        result = model
        replace_modules(replacements, model)
    else:
        try:
            result = copy.deepcopy(model, dict(replacements))
        except Exception as error:
            raise RuntimeError(
                f"quantize_dynamic: this {type(model).__name__} cannot be copied ({error}); use "
                "inplace=True"
            ) from error
    if fuse:
        _fuse_activations(result)
    leave_fast_paths(result)
    set_report(result, report)
    for parameter in result.parameters():
        if not isinstance(parameter, nn.parameter.UninitializedParameter):
            parameter.requires_grad_(False)
    return result.eval()


def replace_layers(model: nn.Module, names: Iterable[str]) -> list[FloatLayer]:
    """Replaces the layers of those names in a model, which may be converted already, in place.

    Args:
        model: any.
        names: of layers of ``DYNAMIC_LAYERS``.

    Returns:
        Those that stay in float, with the reasons.

    Raises:
        ValueError: a weight holds NaN or infinity; names the layer.
    """
    chosen: dict[str, nn.Module] = {}
    floats = []
    for name in names:
        layer = model.get_submodule(name)
        reason = _reason_for_float(name, layer, model, {"include": None, "exclude": ()})
        if reason is None:
            chosen[name] = layer
        else:
            floats.append(FloatLayer(name, type(layer).__name__, reason))
    with torch.no_grad():
        replace_modules(_replacements(chosen), model)
    leave_fast_paths(model)
    return floats


def replace_modules(replacements: dict[int, nn.Module], model: nn.Module) -> None:
    """Puts modules in the place of others, by their ids, wherever these stand."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(id(child), child)


def _names(classes: Iterable[type[nn.Module]]) -> str:
    return " or ".join("linear" if cls is nn.Linear else cls.__name__ for cls in classes)


def _patterns(option: str, given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"quantize_dynamic: {option} must be patterns of names, got {given!r}")
    return patterns


def _classes(types: Iterable[type[nn.Module]]) -> tuple[type[nn.Module], ...]:
    if isinstance(types, type):
        raise TypeError("quantize_dynamic: types must be a collection, such as {nn.Linear}")
    classes = tuple(types)
    for cls in classes:
        if not isinstance(cls, type):
            raise TypeError(f"quantize_dynamic: types must hold classes, got {cls!r}")
        if not issubclass(cls, DYNAMIC_LAYERS):
            raise ValueError(
                f"quantize_dynamic: only {_names(DYNAMIC_LAYERS)} can be quantized dynamically, "
                f"not {cls.__name__}"
            )
    return classes


def _reason_for_float(
    name: str, layer: nn.Module, model: nn.Module, patterns: dict[str, tuple[str, ...] | None]
) -> str | None:
    """Why a layer stays in float, or None if it does not."""
    include, exclude = patterns["include"], patterns["exclude"]
    if include is not None and not any(matches_name(pattern, name) for pattern in include):
        return "it is not included"
    if any(matches_name(pattern, name) for pattern in exclude or ()):
        return "it is excluded"
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin) and layer.has_uninitialized_params():
        return "its weight has no shape yet"
    if isinstance(layer, nn.Embedding | nn.EmbeddingBag):
        if layer.max_norm is not None:
            return "max_norm changes its rows as they are read"
        if isinstance(layer, nn.EmbeddingBag) and layer.padding_idx is not None:
            return "padding_idx leaves rows out"
        return not_plain(layer)
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight itself"
    if not isinstance(layer, nn.Linear):
        # Weight dropout and the like take parameters away and compute the weight at each call.
        if any(
            not isinstance(layer._parameters.get(n), nn.Parameter) for n in _weight_names(layer)
        ):
            return "its weights are computed"
        weights = [getattr(layer, n) for n in _weight_names(layer)]
    else:
        weights = [layer.weight]
    reasons = (too_many_products(weight) for weight in weights)
    return not_plain(layer) or next((reason for reason in reasons if reason), None)


def _weight_names(layer: nn.Module) -> list[str]:
    """The weights of a recurrent layer or cell."""
    if isinstance(layer, nn.RNNBase):
        return [name for name in layer._flat_weights_names if name.startswith("weight")]
    return ["weight_ih", "weight_hh"]


def _replacements(layers: dict[str, nn.Module]) -> dict[int, nn.Module]:
    """What takes the place of each layer, by the layer's id. Shared weights stay shared."""
    replacements: dict[int, nn.Module] = {}
    codes: dict[int, DynamicLinear] = {}
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear):
            kind = next(kind for cls, kind in _KINDS.items() if isinstance(layer, cls))
            new_layer = kind.from_float(layer, name=name or type(layer).__name__)
            replacements[id(layer)] = new_layer.train(layer.training)
            continue
        new = DynamicLinear.from_float(layer, name=name or type(layer).__name__)
        first = codes.setdefault(id(layer.weight), new)
        new.weight, new.weight_scale = first.weight, first.weight_scale
        new.source = name
        replacements[id(layer)] = new
    return replacements


def _activation(module: nn.Module) -> str | None:
    """The name of an activation that the kernel can compute."""
    if is_plain(module, nn.GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    for cls, name in ((nn.ReLU, "relu"), (nn.SiLU, "silu")):
        if is_plain(module, cls):
            return name
    return None


def _fuse_activations(model: nn.Module) -> None:
    """Moves activations into the layers before them, in each nn.Sequential."""
    holders = [child for module in model.modules() for child in module._modules.values()]
    for module in model.modules():
        if type(module) is not nn.Sequential:
            continue
        for i in range(len(module) - 1):
            layer, activation = module[i], _activation(module[i + 1])
            # A layer that is held twice may be called where no activation follows.
            alone = sum(holder is layer for holder in holders) == 1
            if isinstance(layer, DynamicLinear) and activation is not None and alone:
                layer.activation = activation
                module[i + 1] = nn.Identity()


def leave_fast_paths(model: nn.Module) -> None:
    """Keeps nn.TransformerEncoder from handing its layers' weights to a fused float function."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(layer, QuantizedModule) for layer in (module.linear1, module.linear2)
        ):
            module.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(
            isinstance(layer, nn.TransformerEncoderLayer) and layer.activation_relu_or_gelu == 0
            for layer in module.layers
        ):
            module.use_nested_tensor = False
