"""Convolution and linear layers that fake-quantize their weight while they train."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.fake_quantize import FakeQuantize, make_fake_quantize
from qtoolkit.nn.kernels import weight_without_kernel
from qtoolkit.nn.sharing import keep_mark
from qtoolkit.nn.weights import IntegerWeight, fold_scale
from qtoolkit.qconfig import TensorSpec


class _FakeQuantizedWeight:
    """The weight's side of a QAT layer; mixed into ``nn.Conv2d`` and ``nn.Linear``.

    A batch norm that follows is folded into the weight when the model is converted, so the weight
    that will be quantized is ``weight * gamma / sqrt(running_var + eps)``. Symmetric quantization
    with one scale per output channel commutes with such a factor: quantizing the plain weight gives
    the same codes, and the batch norm stays an ordinary layer with true batch statistics. With one
    scale per tensor it does not; then the folded weight is quantized and the factor divided out
    again, from the weight, so that activations are never divided (Krishnamoorthi 2018, section
    3.2.2, scales them).
    """

    weight: Tensor
    weight_fake_quant: FakeQuantize

    def _init_fake_quant(self, spec: TensorSpec, name: str, batch_norm: nn.Module | None) -> None:
        self.weight_fake_quant = make_fake_quantize(spec, f"{name}.weight", is_weight=True)
        # Where there is no integer kernel the batch norm is not folded at all.
        commutes = spec.granularity == "per_channel" or weight_without_kernel(spec) is not None
        # In a tuple, so that it is not registered a second time as a child of this module.
        self._folded = () if batch_norm is None or commutes else (batch_norm,)
        self.folds_batch_norm = batch_norm is not None

    def _fold_factor(self) -> Tensor | None:
        if not self._folded:
            return None
        factor = batch_norm_factor(self._folded[0]).detach()
        return torch.where(factor == 0, torch.ones_like(factor), factor)

    def quantized_weight(self) -> Tensor:
        """The fake-quantized weight, float32, that the layer computes with."""
        factor = self._fold_factor()
        if factor is None:
            return self.weight_fake_quant(self.weight)
        factor = factor.reshape(-1, *([1] * (self.weight.dim() - 1)))
        return self.weight_fake_quant(self.weight * factor) / factor

    def integer_weight(self, batch_norm: nn.Module | None) -> IntegerWeight:
        """Codes and scale of the weight with the batch norm folded in."""
        factor = self._fold_factor()
        weight = self.weight.detach()
        if factor is not None:
            weight = weight * factor.reshape(-1, *([1] * (weight.dim() - 1)))
        self.weight_fake_quant(weight)
        codes = IntegerWeight(*self.weight_fake_quant.integer_codes(weight))
        if batch_norm is None:
            return codes
        wanted = batch_norm_factor(batch_norm).detach()
        return fold_scale(codes, wanted if factor is None else wanted / factor)


class Conv2d(_FakeQuantizedWeight, nn.Conv2d):
    """``nn.Conv2d`` with a fake-quantized weight; parameters keep their names.

    On CPU it computes in channels_last, and keeps the codes of its input and weight for the
    backward instead of floats, a quarter of the memory, with the same gradients bit for bit.

    Attributes:
        keep_codes: False keeps floats, as second derivatives need.
    """

    keep_codes = True

    def forward(self, input: Tensor, input_fake_quant: FakeQuantize | None = None) -> Tensor:
        """The convolution; ``input_fake_quant`` is the module that fake-quantized the input."""
        weight = self.quantized_weight()
        if input.device.type == "cpu" and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        if not self._can_keep_codes(input):
            return self._conv_forward(input, weight, self.bias)
        x_scale, x_zero_point, x_range = _code_format(input_fake_quant)
        weight_fake_quant = None if self._folded else self.weight_fake_quant
        weight_scale, _, weight_range = _code_format(weight_fake_quant)
        return ops.conv2d_train(
            input,
            weight,
            self.bias,
            list(self.stride),
            list(self.padding),  # type: ignore[arg-type]
            list(self.dilation),
            self.groups,
            x_scale,
            x_zero_point,
            *x_range,
            weight_scale,
            min(max(-weight_range[0], weight_range[1]), 127),
        )

    def _can_keep_codes(self, input: Tensor) -> bool:
        return (
            self.keep_codes
            and torch.is_grad_enabled()
            and input.device.type == "cpu"
            and input.dtype == self.weight.dtype == torch.float32
            and input.dim() == 4
            and self.padding_mode == "zeros"
            and not isinstance(self.padding, str)
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        )


class Linear(_FakeQuantizedWeight, nn.Linear):
    """``nn.Linear`` with a fake-quantized weight; parameters keep their names."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.quantized_weight(), self.bias)


def _code_format(
    fake_quant: FakeQuantize | None,
) -> tuple[Tensor | None, Tensor | None, tuple[int, int]]:
    """Scale, zero point and range of the codes of what a module fake-quantized; None if there are
    none."""
    code_format = None if fake_quant is None else fake_quant.code_format()
    return (None, None, (0, 255)) if code_format is None else code_format


def make_conv2d(
    conv: nn.Conv2d, spec: TensorSpec, name: str, batch_norm: nn.Module | None
) -> Conv2d:
    """The QAT layer that shares the convolution's parameters."""
    result = Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    return _adopt(result, conv, spec, name, batch_norm)


def make_linear(
    linear: nn.Linear, spec: TensorSpec, name: str, batch_norm: nn.Module | None
) -> Linear:
    """The QAT layer that shares the linear layer's parameters."""
    result = Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    return _adopt(result, linear, spec, name, batch_norm)


def _adopt(
    result: Any, module: nn.Module, spec: TensorSpec, name: str, batch_norm: nn.Module | None
) -> Any:
    result.weight = module.weight
    result.bias = module.bias
    keep_mark(module, result)
    result._init_fake_quant(spec, name, batch_norm)
    result.weight_fake_quant.to(module.weight.device)
    result.weight_fake_quant.allocate(module.weight)
    result.train(module.training)
    return result


def batch_norm_factor(batch_norm: Any) -> Tensor:
    """``gamma / sqrt(running_var + eps)``, float32 ``[channels]``."""
    factor = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    weight = batch_norm.weight
    if hasattr(weight, "full_tensor"):  # sharded by FSDP2 apart from the layer that asks
        weight = weight.full_tensor()
    return factor if weight is None else factor * weight


def folded_bias(bias: Tensor | None, batch_norm: Any) -> Tensor:
    """The bias of a layer with its batch norm folded in, float32 ``[channels]``."""
    shifted = -batch_norm.running_mean if bias is None else bias - batch_norm.running_mean
    result = shifted * batch_norm_factor(batch_norm)
    return result if batch_norm.bias is None else result + batch_norm.bias
