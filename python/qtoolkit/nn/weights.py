"""Weights and biases as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtoolkit import ops
from qtoolkit.fake_quantize import make_fake_quantize
from qtoolkit.qconfig import TensorSpec


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as codes.

    Attributes:
        codes: int8, shaped like the weight.
        scale: float32 ``[output channels]``.
    """

    codes: Tensor
    scale: Tensor


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """A transposed convolution's weight ``[in, out / groups, ...]`` as a convolution's ``[out, in /
    groups, ...]``, and the other way round."""
    first, second = weight.shape[0] // groups, weight.shape[1]
    grouped = weight.reshape(groups, first, second, *weight.shape[2:])
    return grouped.transpose(1, 2).reshape(groups * second, first, *weight.shape[2:])


def quantize_weight(weight: Tensor, spec: TensorSpec, name: str) -> IntegerWeight:
    """Codes of a weight whose output channels are its first dimension, in the range of the
    specification's observer.

    Args:
        weight: float32.
        spec: how it is quantized.
        name: the layer, for error messages.

    Raises:
        ValueError: the weight has NaN or infinite values, or its codes need a zero point.
    """
    fake_quantize = make_fake_quantize(spec, f"{name}.weight", is_weight=True).to(weight.device)
    fake_quantize.allocate(weight)
    return IntegerWeight(*fake_quantize.integer_codes(weight))


_PINNED = "qtoolkit_weight"


def pin_weight(module: nn.Module, weight: IntegerWeight) -> None:
    """Decides the codes that a float layer's weight will have when it is converted.

    The float weight becomes the same values. Without it ``convert`` rounds the weight to the
    nearest codes.
    """
    setattr(module, _PINNED, weight)
    with torch.no_grad():
        module.weight.copy_(dequantized(weight, module))  # type: ignore[operator]


def pinned_weight(module: nn.Module) -> IntegerWeight | None:
    """What ``pin_weight`` decided, or None."""
    return getattr(module, _PINNED, None)


def dequantized(weight: IntegerWeight, module: nn.Module) -> Tensor:
    """An integer weight as float32 in the layout of its float layer."""
    shape = (-1, *([1] * (weight.codes.dim() - 1)))
    real = weight.codes.float() * weight.scale.reshape(shape)
    return swap_channels(real, module.groups) if isinstance(module, nn.ConvTranspose2d) else real


def fold_scale(weight: IntegerWeight, factor: Tensor) -> IntegerWeight:
    """The weight times a factor per output channel, exactly: only signs of codes change.

    Valid where the negated codes fit in int8; a factor of zero gives codes of zero at the old
    scale.
    """
    sign = torch.sign(factor).to(torch.int8)
    codes = weight.codes * sign.reshape(-1, *([1] * (weight.codes.dim() - 1)))
    scale = torch.where(factor == 0, weight.scale, weight.scale * factor.abs())
    return IntegerWeight(codes, scale)


# A bias in units of x_scale * weight_scale stays below this, so that bias and products fit in
# int32.
_LARGEST_BIAS = 2.0**30


def _refine(weight: IntegerWeight, bias: Tensor, x_scale: Tensor) -> IntegerWeight:
    """The same weight in finer steps, so that the bias is rounded less.

    The codes of a weight of fewer than 8 bits are multiplied, channel by channel, by the factor
    that fits in int8 and under which the bias comes nearest to a whole number of steps.

    Args:
        bias: float64 ``[output channels]``.
        x_scale: float64, 0-dim.
    """
    if weight.codes.numel() == 0:
        return weight
    largest = weight.codes.flatten(1).abs().amax(1, keepdim=True).clamp(min=1)
    factors = torch.arange(1, 127 // int(largest.min()) + 1, device=bias.device)
    steps = (x_scale * weight.scale.double()).unsqueeze(1) / factors
    wanted = bias.unsqueeze(1) / steps
    error = (wanted - wanted.round()).abs() * steps
    error = error.masked_fill(factors * largest > 127, float("inf"))
    factor = factors[error.argmin(dim=1)]
    shape = (-1, *([1] * (weight.codes.dim() - 1)))
    codes = (weight.codes * factor.reshape(shape)).to(torch.int8)
    return IntegerWeight(codes, (weight.scale.double() / factor).float())


def quantize_bias(
    weight: IntegerWeight, bias: Tensor | None, x_scale: Tensor
) -> tuple[IntegerWeight, Tensor | None]:
    """The bias as int32 at scale ``x_scale * weight.scale``.

    The steps of a weight of few bits are too coarse for a bias: with 4 bits its rounding changed
    2 % of a layer's output codes. So the weight's steps are divided where int8 leaves room for it.

    A channel whose weights are so small that its bias would not fit gets a larger weight scale (its
    codes are rounded again), so the weight is returned too.
    """
    if bias is None:
        return weight, None
    bias = bias.detach().double()
    x = x_scale.double().reshape(())
    weight = _refine(weight, bias, x)
    smallest = (bias.abs() / (x * _LARGEST_BIAS)).to(torch.float32)
    scale = torch.maximum(weight.scale, smallest)
    if not torch.equal(scale, weight.scale):
        shape = (-1, *([1] * (weight.codes.dim() - 1)))
        ratio = (weight.scale.double() / scale.double()).reshape(shape)
        weight = IntegerWeight(torch.round(weight.codes.double() * ratio).to(torch.int8), scale)
    return weight, torch.round(bias / (x * weight.scale.double())).to(torch.int32)


def add_bias_scale(module: nn.Module) -> None:
    """Adds buffer ``bias_scale``, the scale of a layer's int32 bias, one for each channel."""
    scale = module.input_scale.double() * module.weight_scale.double()  # type: ignore[operator]
    module.register_buffer("bias_scale", scale.reshape(-1).float())


def float_bias(module: nn.Module) -> Tensor | None:
    """A layer's int32 bias as dequantized float32; None without. Needs ``add_bias_scale``."""
    if module.bias is None:
        return None
    return ops.qdq_dequantize(module.bias, module.bias_scale, None, 0)  # type: ignore[arg-type]


def float_weight(module: nn.Module, axis: int = 0) -> Tensor:
    """A layer's int8 weight as dequantized float32, channels along ``axis``."""
    return ops.qdq_dequantize(module.weight, module.weight_scale, None, axis)  # type: ignore
