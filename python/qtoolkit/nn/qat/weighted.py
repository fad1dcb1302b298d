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
from qtoolkit.nn.weights import IntegerWeight, fold_scale, quantize_bias, swap_channels
from qtoolkit.qconfig import TensorSpec


class _FakeQuantizedWeight:
    """The weight's side of a QAT layer; mixed into the layers of ``torch.nn``.

    A batch norm that follows is folded into the weight when the model is converted, so the weight
    that will be quantized is ``weight * gamma / sqrt(running_var + eps)``. Symmetric quantization
    with one scale per output channel commutes with such a factor: quantizing the plain weight gives
    the same codes, and the batch norm stays an ordinary layer with true batch statistics. With one
    scale per tensor it does not; then the folded weight is quantized and the factor divided out
    again, from the weight, so that activations are never divided (Krishnamoorthi 2018, section
    3.2.2, scales them).
    """

    weight: Tensor
    bias: Any
    training: bool
    weight_fake_quant: FakeQuantize

    def _init_fake_quant(self, spec: TensorSpec, name: str, batch_norm: nn.Module | None) -> None:
        self.weight_fake_quant = make_fake_quantize(spec, f"{name}.weight", is_weight=True)
        # Where there is no integer kernel the batch norm is not folded at all.
        commutes = spec.granularity == "per_channel" or weight_without_kernel(spec) is not None
        self._commutes = commutes
        # In a tuple, so that it is not registered a second time as a child of this module.
        self._batch_norm = () if batch_norm is None else (batch_norm,)

    @property
    def folds_batch_norm(self) -> bool:
        """Whether ``convert`` folds a batch norm into this layer."""
        return bool(self._batch_norm)

    def _fold_factor(self) -> Tensor | None:
        if self._commutes or not self._batch_norm:
            return None
        factor = batch_norm_factor(self._batch_norm[0]).detach()
        return torch.where(factor == 0, torch.ones_like(factor), factor)

    def float_weight(self) -> Tensor:
        """The weight with output channels first, as it is quantized."""
        return self.weight

    def quantized_weight(self) -> Tensor:
        """The fake-quantized ``float_weight``, float32, that the layer computes with."""
        factor = self._fold_factor()
        weight = self.float_weight()
        if factor is None:
            return self.weight_fake_quant(weight)
        factor = factor.reshape(-1, *([1] * (weight.dim() - 1)))
        return self.weight_fake_quant(weight * factor) / factor

    def integer_weight(self, batch_norm: nn.Module | None) -> IntegerWeight:
        """Codes and scale of the weight with the batch norm folded in."""
        factor = self._fold_factor()
        weight = self.float_weight().detach()
        if factor is not None:
            weight = weight * factor.reshape(-1, *([1] * (weight.dim() - 1)))
        self.weight_fake_quant(weight)
        codes = IntegerWeight(*self.weight_fake_quant.integer_codes(weight))
        if batch_norm is None:
            return codes
        wanted = batch_norm_factor(batch_norm).detach()
        return fold_scale(codes, wanted if factor is None else wanted / factor)

    def _bias_for(self, x_scale: Tensor | None) -> Tensor | None:
        """The bias to compute with: in evaluation the one that gives, behind the batch norm, the
        integer bias of the converted layer.

        The steps of that bias are coarse at low bits, and a code that they change changes more
        codes in every layer that follows.

        Args:
            x_scale: of the input's codes, None where it has none.
        """
        if x_scale is None or not self._becomes_integer():
            return self.bias
        with torch.no_grad():
            change = self._bias_change(x_scale)
        return change if self.bias is None or change is None else self.bias + change

    def _becomes_integer(self) -> bool:
        """Whether evaluation stands for a layer that computes with codes."""
        return (
            not self.training
            and not any(norm.training for norm in self._batch_norm)
            and weight_without_kernel(self.weight_fake_quant.spec) is None
            and self.weight_fake_quant.ready
            and self.weight_fake_quant.fake_quantizing
            and not torch.compiler.is_compiling()
        )

    def _bias_change(self, x_scale: Tensor) -> Tensor | None:
        batch_norm = self._batch_norm[0] if self._batch_norm else None
        bias = self.bias if batch_norm is None else folded_bias(self.bias, batch_norm)
        if bias is None:
            return None
        weight, codes = quantize_bias(self.integer_weight(batch_norm), bias, x_scale)
        assert codes is not None
        change = codes * (x_scale.double() * weight.scale.double()) - bias.double()
        if batch_norm is not None:
            factor = batch_norm_factor(batch_norm).double()
            change = torch.where(factor == 0, 0.0, change / factor)
        return change.float()


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
        x_scale, x_zero_point, x_range = _code_format(input_fake_quant)
        bias = self._bias_for(x_scale)
        if not self._can_keep_codes(input):
            return self._conv_forward(input, weight, bias)
        folds = self._batch_norm and not self._commutes
        weight_fake_quant = None if folds else self.weight_fake_quant
        weight_scale, _, weight_range = _code_format(weight_fake_quant)
        return ops.conv2d_train(
            input,
            weight,
            bias,
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

    def forward(self, input: Tensor, input_fake_quant: FakeQuantize | None = None) -> Tensor:
        """The product; ``input_fake_quant`` is the module that fake-quantized the input."""
        weight = self.quantized_weight()
        return functional.linear(input, weight, self._bias_for(_code_format(input_fake_quant)[0]))


class Conv1d(_FakeQuantizedWeight, nn.Conv1d):
    """``nn.Conv1d`` with a fake-quantized weight; parameters keep their names."""

    def forward(self, input: Tensor, input_fake_quant: FakeQuantize | None = None) -> Tensor:
        """The convolution; ``input_fake_quant`` is the module that fake-quantized the input."""
        bias = self._bias_for(_code_format(input_fake_quant)[0])
        return self._conv_forward(input, self.quantized_weight(), bias)


class ConvTranspose2d(_FakeQuantizedWeight, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with a fake-quantized weight; parameters keep their names."""

    def float_weight(self) -> Tensor:
        return swap_channels(self.weight, self.groups)

    def forward(  # type: ignore[override]
        self, input: Tensor, input_fake_quant: FakeQuantize | None = None
    ) -> Tensor:
        """The convolution; ``input_fake_quant`` is the module that fake-quantized the input."""
        if input.device.type == "cpu" and input.dim() == 4:
            input = input.contiguous(memory_format=torch.channels_last)
        return functional.conv_transpose2d(
            input,
            swap_channels(self.quantized_weight(), self.groups),
            self._bias_for(_code_format(input_fake_quant)[0]),
            self.stride,
            self.padding,  # type: ignore[arg-type]
            self.output_padding,
            self.groups,
            self.dilation,
        )


#: The layers with a weight.
WEIGHTED = (Conv1d, Conv2d, ConvTranspose2d, Linear)


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


def make_conv1d(
    conv: nn.Conv1d, spec: TensorSpec, name: str, batch_norm: nn.Module | None
) -> Conv1d:
    """The QAT layer that shares the convolution's parameters."""
    result = Conv1d(
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


def make_conv_transpose2d(
    conv: nn.ConvTranspose2d, spec: TensorSpec, name: str, batch_norm: nn.Module | None
) -> ConvTranspose2d:
    """The QAT layer that shares the convolution's parameters."""
    result = ConvTranspose2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.output_padding,  # type: ignore[arg-type]
        conv.groups,
        conv.bias is not None,
        conv.dilation,  # type: ignore[arg-type]
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
    result.weight_fake_quant.allocate(result.float_weight())
    result.train(module.training)
    return result


def batch_norm_factor(batch_norm: Any) -> Tensor:
    """``gamma / sqrt(running_var + eps)``, float32 ``[channels]``."""
    factor = torch.rsqrt(batch_norm.running_var + batch_norm.eps)
    weight = _whole(batch_norm.weight)
    return factor if weight is None else factor * weight


def folded_bias(bias: Tensor | None, batch_norm: Any) -> Tensor:
    """The bias of a layer with its batch norm folded in, float32 ``[channels]``."""
    shifted = -batch_norm.running_mean if bias is None else bias - batch_norm.running_mean
    result = shifted * batch_norm_factor(batch_norm)
    shift = _whole(batch_norm.bias)
    return result if shift is None else result + shift


def _whole(parameter: Any) -> Tensor | None:
    """A parameter as a plain tensor, also where FSDP2 sharded it apart from the layer that asks."""
    return parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
