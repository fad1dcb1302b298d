"""Factors of a layer's input that move into the norm that makes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qtoolkit.distributed import true_on_all_ranks
from qtoolkit.nn.weight_only import QuantizedWeightLinear
from qtoolkit.weight_only.calibration import Calibrator, tensors_of

# Of outputs before and after, as a share of their mean square.
_TOLERANCE = 1e-4


def fold_factor(model: nn.Module, names: list[str], calibrator: Calibrator) -> bool:
    """Multiplies the weight and bias of the norm before layers by the factor that they share.

    It is tried, and taken back where the block's output on the data changes: something else reads
    the norm too, or its weight is no factor of its output. The norm gets parameters of its own.

    Returns whether it was folded.
    """
    layers: list[Any] = [model.get_submodule(name) for name in names]
    producer = calibrator.producers.get(names[0])
    if producer is None or not all(isinstance(layer, QuantizedWeightLinear) for layer in layers):
        return False
    factor = layers[0].input_factor
    norm: Any = model.get_submodule(producer)
    if factor is None or norm.weight.shape != factor.shape:
        return False
    before = next(tensors_of(calibrator.replay(names[0], 0)), None)
    kept = dict(norm._parameters)
    for key in ("weight", "bias"):
        old = kept.get(key)
        if old is not None:
            scaled = (old.detach().float() * factor).to(old.dtype)
            norm._parameters[key] = nn.Parameter(scaled, requires_grad=old.requires_grad)
    for layer in layers:
        layer.input_factor = None
    after = next(tensors_of(calibrator.replay(names[0], 0)), None)
    unchanged = False
    if before is not None and after is not None:
        limit = _TOLERANCE if before.dtype == torch.float32 else 10 * _TOLERANCE
        change = (after.float() - before.float()).square().mean()
        unchanged = bool(change <= limit**2 * before.float().square().mean())
    if true_on_all_ranks(unchanged):
        return True
    norm._parameters.update(kept)
    for layer in layers:
        layer.input_factor = factor
    return False
