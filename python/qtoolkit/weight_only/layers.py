"""Which layers can have weights of codes, and what takes their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.graph.plain import not_plain
from qtoolkit.nn.weight_only import (
    QuantizedWeight,
    QuantizedWeightConv2d,
    QuantizedWeightEmbedding,
    QuantizedWeightLinear,
)
from qtoolkit.weight_only.method import Result

#: Classes whose weight may become codes.
TYPES: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d, nn.Embedding)


def reason_for_float(name: str, layer: Any, model: nn.Module) -> str | None:
    """Why the weight of a layer cannot become codes, or None if it can."""
    weight = layer.weight
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight has no shape yet"
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its weight is {weight.dtype}"
    if weight.numel() == 0:
        return "its weight is empty"
    if "lora_" in name or ".adapter" in name:
        return "it is an adapter"
    parent = model.get_submodule(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads its weight itself"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.sparse):
        return "its table changes when it is read"
    return not_plain(layer)


def matrix_of(weight: Tensor) -> Tensor:
    """A weight as ``[N, K]``: outputs, or rows of a table, and all that each reads."""
    return weight.detach().reshape(weight.size(0), -1)


def check_finite(weight: Tensor, name: str) -> None:
    """Raises ValueError that names the layer where a weight is NaN or infinite."""
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise ValueError(
            f"quantize_weights: {name}.weight holds {bad} values that are NaN or Inf; check the "
            "model's checkpoint, or exclude the layer"
        )


def make_layer(
    layer: nn.Module, result: Result, dtype: torch.dtype, method: str, accumulate: str
) -> QuantizedWeight:
    """The layer with codes for a float one, whose bias it copies."""
    packed = result.coded.packed()
    if isinstance(layer, nn.Linear):
        return QuantizedWeightLinear(
            packed,
            layer.bias,
            dtype=dtype,
            method=method,
            accumulate=accumulate,
            input_factor=result.input_factor,
        )
    if isinstance(layer, nn.Conv2d):
        return QuantizedWeightConv2d(packed, layer, method=method)
    return QuantizedWeightEmbedding(packed, dtype=dtype, method=method)
