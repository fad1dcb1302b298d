"""What the patterns of layers with a weight share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit.graph.notes import note_of, set_note
from qtoolkit.graph.patterns.registry import Match
from qtoolkit.nn.qat.weighted import WEIGHTED, folded_bias
from qtoolkit.nn.weights import IntegerWeight, pinned_weight, quantize_weight, swap_channels
from qtoolkit.qconfig import QConfig

# More products of 8-bit codes than this could overflow an int32 sum: 255 * 128 each.
_MOST_PRODUCTS = (2**31 - 1) // (255 * 128)


def too_many_products(weight: Tensor) -> str | None:
    """Why a layer with this weight cannot be computed in integers, or None if it can."""
    products = weight[0].numel()
    if products <= _MOST_PRODUCTS:
        return None
    return f"its sums of {products} products could overflow int32 (at most {_MOST_PRODUCTS})"


def set_submodule(module: fx.GraphModule, name: str, child: nn.Module) -> None:
    """Puts a module at a dotted name; keeps what ``prepare`` noted on the old one."""
    parent_name, _, leaf = name.rpartition(".")
    parent = module.get_submodule(parent_name)
    old = getattr(parent, leaf, None)
    note = note_of(old)
    if note is not None:
        set_note(child, note)
    setattr(parent, leaf, child)


def float_weight(layer: Any) -> Tensor:
    """A layer's weight with output channels first."""
    if isinstance(layer, nn.ConvTranspose2d):
        return swap_channels(layer.weight, layer.groups)
    return layer.weight


def integer_weight_and_bias(
    layer: Any, match: Match, qconfig: QConfig
) -> tuple[IntegerWeight, Tensor | None]:
    """A layer's weight as codes, and its float bias, batch norm folded in."""
    for name, tensor in (("bias", layer.bias), ("weight", layer.weight)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"{match.anchor.target}.{name} holds NaN or Inf; check the model's checkpoint"
            )
    if isinstance(layer, WEIGHTED):
        weight = layer.integer_weight(match.batch_norm)
        if match.batch_norm is None:
            return weight, layer.bias
        return weight, folded_bias(layer.bias, match.batch_norm)
    assert qconfig.weight is not None
    assert match.batch_norm is None
    pinned = pinned_weight(layer)
    if pinned is not None:
        return pinned, layer.bias
    name = str(match.anchor.target)
    return quantize_weight(float_weight(layer), qconfig.weight, name), layer.bias
