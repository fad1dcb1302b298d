"""The value before a fused addition (the branch, as the other summand is the residual).

The quantized layer computes it in int32 and never rounds it. A runtime without such a fusion has it
as 8-bit codes, so an export must say how these are scaled.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from qtoolkit.graph.modules import called_module
from qtoolkit.graph.patterns.registry import Match
from qtoolkit.nn.base import QParams, code_format
from qtoolkit.observers import Observer
from qtoolkit.observers.base import range_to_qparams
from qtoolkit.qconfig import QConfig, TensorSpec

# Standard deviations to either side of a channel's mean.
_DEVIATIONS = 4.0


def branch_spec(activation: TensorSpec) -> TensorSpec:
    """How it is observed: as the layer's activations, with all 8 bits of their storage."""
    return replace(activation, format=code_format(activation.quant_min))


def branch_qparams(
    match: Match,
    module: fx.GraphModule,
    qconfig: QConfig,
    inputs: list[QParams],
    output: QParams | None,
) -> QParams | None:
    """How it is quantized; None without a fused addition.

    Calibration has observed it, before a ReLU only as far down as changes the result: the codes are
    finer then. Training has not observed it, as nothing computes it there, and nor has the
    calibration of a checkpoint that does not know its observer. Then its range follows from others:

    - Beyond ``_saturating_range`` the output is its least or greatest code whatever is added.
    - Behind a batch norm a channel is expected in beta +- 4 |gamma| (Nagel et al. 2019, "Data-free
      quantization through weight equalization and bias correction", section 5). That holds for
      normally distributed values; others lie farther out, and clipping them costs far more than a
      wider step. So at least half of the saturating range is kept.

    Args:
        inputs, output: as ``Pattern.lower`` gets them.
    """
    if match.branch is None or output is None:
        return None
    observer = called_module(match.branch, module)
    if isinstance(observer, Observer) and observer.calibrated():
        spec = observer.spec
        return QParams(*observer.calculate_qparams(), spec.quant_min, spec.quant_max)
    low, high = _saturating_range(match, inputs[-1], output)
    if match.batch_norm is not None:
        least, greatest = _normal_range(match.batch_norm)
        low = torch.maximum(low, torch.minimum(low / 2, least))
        high = torch.minimum(high, torch.maximum(high / 2, greatest))
    assert qconfig.activation is not None
    storage = code_format(qconfig.activation.quant_min)
    spec = TensorSpec(storage, symmetric=qconfig.activation.symmetric)
    return QParams(*range_to_qparams(low, high, spec), spec.quant_min, spec.quant_max)


def _real_range(qparams: QParams) -> tuple[Tensor, Tensor]:
    """The least and greatest real number that has a code."""
    low, high = qparams.quant_min - qparams.zero_point, qparams.quant_max - qparams.zero_point
    return low * qparams.scale, high * qparams.scale


def _saturating_range(match: Match, residual: QParams, output: QParams) -> tuple[Tensor, Tensor]:
    """Beyond it the output is its least or greatest code, whatever the residual is."""
    low, high = _real_range(output)
    if match.relu:
        low = low.clamp(min=0.0)
    if match.upper is not None:
        high = high.clamp(max=match.upper)
    least, greatest = _real_range(residual)
    return low - greatest, high - least


def _normal_range(batch_norm: Any) -> tuple[Tensor, Tensor]:
    """Of what a batch norm gives, all channels together."""
    factor = torch.ones_like(batch_norm.running_var)
    shift = torch.zeros_like(factor)
    if batch_norm.weight is not None:
        factor, shift = batch_norm.weight.detach(), batch_norm.bias.detach()
    spread = _DEVIATIONS * factor.abs()
    return (shift - spread).min(), (shift + spread).max()
