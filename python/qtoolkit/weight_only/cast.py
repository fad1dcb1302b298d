"""Casting to 16-bit floats, but for layers that lose by it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from qtoolkit.graph.report import FloatLayer, Report, set_report
from qtoolkit.nn.weight_only import Float32Layer, QuantizedWeight


def cast_model(model: nn.Module, dtype: torch.dtype, chosen: set[str]) -> nn.Module:
    """A copy in which the layers of those names have tensors of the dtype; norms stay float32.

    A norm divides by a deviation of many values, which 16 bits do not hold: it gets its input as
    float32, and its output has the input's dtype. A float model's inputs must have the new dtype.

    Raises:
        ValueError: a float32 weight does not fit in the dtype; names it.
    """
    cast: dict[int, Tensor] = {}
    report = Report(converted=True)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            continue  # scales stay float32; what it computes in is set below
        own = (*module._parameters.items(), *module._buffers.items())
        tensors = {key: t for key, t in own if t is not None and t.is_floating_point()}
        if "norm" in type(module).__name__.lower() and tensors:
            for key, tensor in tensors.items():
                if tensor.dtype != torch.float32:
                    cast[id(tensor)] = _cast(tensor, torch.float32, f"{name}.{key}")
            reason = "norms are computed in float32"
            report.floats.append(FloatLayer(name, type(module).__name__, reason))
        elif tensors and name not in chosen:
            reason = "it is excluded, or not included"
            report.floats.append(FloatLayer(name, type(module).__name__, reason))
        else:
            for key, tensor in tensors.items():
                if id(tensor) not in cast:
                    cast[id(tensor)] = _cast(tensor, dtype, f"{name}.{key}")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    new = copy.deepcopy(model, {**shared, **cast})
    for module in new.modules():
        if isinstance(module, QuantizedWeight):
            module.dtype = str(dtype).removeprefix("torch.")
    for parent in list(new.modules()):
        for key, child in parent._modules.items():
            if child is not None and "norm" in type(child).__name__.lower() and _has_floats(child):
                parent._modules[key] = Float32Layer(child)
    set_report(new, report)
    return new.eval()


def _has_floats(module: nn.Module) -> bool:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return any(t is not None and t.is_floating_point() for t in tensors)


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    cast = tensor.detach().to(dtype)
    if bool(torch.isinf(cast).any()) and not bool(torch.isinf(tensor).any()):
        raise ValueError(
            f"quantize_weights: {name} has values that {dtype} cannot hold, such as "
            f"{float(tensor.detach().abs().max()):g}; use bf16, or exclude the layer"
        )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(cast, requires_grad=tensor.requires_grad)
    return cast
