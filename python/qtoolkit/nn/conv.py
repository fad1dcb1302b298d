"""INT8 convolutions."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved
from qtoolkit.nn.weights import (
    IntegerWeight,
    add_bias_scale,
    float_bias,
    float_weight,
    quantize_bias,
    swap_channels,
)

# What the engine takes for a transposed convolution.
_LARGEST_STRIDE = 64
# What all of them are made of, for ``saved``.
_CONV: dict[str, Any] = {
    "stride": list[int],
    "padding": list[int],
    "dilation": list[int],
    "groups": int,
    "relu": bool,
    "input_format": Literal["int8", "uint8"],
    "weight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.int32,
    "input": QParams,
    "output": QParams,
}


def _plan_step(module: Any, kind: str, dtype: torch.dtype, **more: list[int]) -> PlanStep:
    """The step of a convolution whose input has that dtype."""
    step = PlanStep(
        kind,
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=module.groups,
        relu=module.relu,
        **more,
    )
    step.constant("weight", module.weight)
    step.constant("weight_scale", module.weight_scale.reshape(-1))
    step.constant("bias", module.bias)
    step.input("input", module.input_scale, module.input_zero_point, dtype)
    step.output(module)
    return step


@saved(**_CONV, residual=QParams, branch=QParams)
class Conv2d(QuantizedModule):
    """2-D convolution on codes, with ReLU and the addition of a second input fused where asked.

    ``y = requantize(sum(w * (x - x_zero_point)) + bias + residual)``; see ``qtoolkit.ops.conv2d``.
    Input ``[N, C, H, W]`` codes; output codes, or float32 where ``output`` is None.

    Attributes:
        branch_scale, branch_zero_point: the quantization that fits the result before the addition,
            in 8-bit codes (int8 where the output's are, else uint8). It changes nothing here, where
            that value is never rounded: it is for exports to runtimes that add in a layer of its
            own. None without an addition, and in models that were saved before there was one.
    """

    kernel = "conv2d"
    newer_buffers = ("branch_scale", "branch_zero_point")

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None,
        *,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        input: QParams,
        output: QParams | None,
        residual: QParams | None = None,
        branch: QParams | None = None,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.stride = list(stride)
        self.padding = list(padding)
        self.dilation = list(dilation)
        self.groups = groups
        self.relu = relu
        weight, bias = quantize_bias(weight, bias, input.scale)
        self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.input_format = input.format
        self._register_qparams("input", input)
        self._register_qparams("residual", residual)
        self._register_qparams("branch", branch)
        self._register_output(output, upper)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv2d(
            x,
            self.input_scale,
            self.input_zero_point,
            self.weight,
            self.weight_scale,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
            residual,
            self.residual_scale,
            self.residual_zero_point,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = _plan_step(self, "conv2d", dtypes[0])
        step.input("residual", self.residual_scale, self.residual_zero_point, dtypes[-1])
        return step

    def prepare_float(self) -> None:
        add_bias_scale(self)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(
            x,
            float_weight(self),
            float_bias(self),
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{self.input_format} x int8 -> {output}"

    def extra_repr(self) -> str:
        out_channels, in_channels, height, width = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size=({height}, {width}), "
            f"stride={self.stride}, padding={self.padding}, dilation={self.dilation}, "
            f"groups={self.groups}, relu={self.relu}, "
            f"residual={self.residual_scale is not None}, {self.formats()}"
        )


def is_depthwise(weight: Tensor, groups: int) -> bool:
    """True if each group has one input and one output channel."""
    return groups == weight.shape[0] and weight.shape[1] == 1 and groups > 1


@saved(**_CONV, residual=QParams, branch=QParams)
class DepthwiseConv2d(Conv2d):
    """``Conv2d`` with one input and one output channel in each group."""

    kernel = "conv2d_depthwise"


def make_conv2d(
    weight: IntegerWeight, bias: Tensor | None, groups: int, **options: object
) -> Conv2d:
    """A ``DepthwiseConv2d`` where the weight is one, else a ``Conv2d``."""
    kind = DepthwiseConv2d if is_depthwise(weight.codes, groups) else Conv2d
    return kind(weight, bias, groups=groups, **options)  # type: ignore[arg-type]


@saved(**_CONV, residual=QParams, branch=QParams, kernel=Literal["conv2d", "conv2d_depthwise"])
class Conv1d(QuantizedModule):
    """1-D convolution on codes ``[N, C, L]``, seen as images of one row; the rest as ``Conv2d``."""

    kernel = "conv2d"
    newer_buffers = Conv2d.newer_buffers

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None,
        *,
        stride: int,
        padding: int,
        dilation: int,
        groups: int,
        input: QParams,
        output: QParams | None,
        residual: QParams | None = None,
        branch: QParams | None = None,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.stride = [1, stride]
        self.padding = [0, padding]
        self.dilation = [1, dilation]
        self.groups = groups
        self.relu = relu
        if is_depthwise(weight.codes, groups):
            self.kernel = "conv2d_depthwise"
        weight, bias = quantize_bias(weight, bias, input.scale)
        self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.input_format = input.format
        self._register_qparams("input", input)
        self._register_qparams("residual", residual)
        self._register_qparams("branch", branch)
        self._register_output(output, upper)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.conv2d(
            x.unsqueeze(2),
            self.input_scale,
            self.input_zero_point,
            self.weight.unsqueeze(2),
            self.weight_scale,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
            None if residual is None else residual.unsqueeze(2),
            self.residual_scale,
            self.residual_zero_point,
        ).squeeze(2)

    def prepare_float(self) -> None:
        add_bias_scale(self)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.conv1d(
            x,
            float_weight(self),
            float_bias(self),
            self.stride[1:],
            self.padding[1:],
            self.dilation[1:],
            self.groups,
        )

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{self.input_format} x int8 -> {output}"

    def extra_repr(self) -> str:
        out_channels, in_channels, width = self.weight.shape
        return (
            f"{in_channels * self.groups}, {out_channels}, kernel_size={width}, "
            f"stride={self.stride[1]}, padding={self.padding[1]}, dilation={self.dilation[1]}, "
            f"groups={self.groups}, relu={self.relu}, "
            f"residual={self.residual_scale is not None}, {self.formats()}"
        )


@saved(**_CONV, output_padding=list[int], kernel=Literal["conv2d", "conv2d_depthwise"])
class ConvTranspose2d(QuantizedModule):
    """2-D transposed convolution on codes, with ReLU fused where asked; see
    ``qtoolkit.ops.conv_transpose2d``.

    Args:
        weight: output channels first; the buffer has them second, as torch's layer.
    """

    kernel = "conv2d"

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None,
        *,
        stride: tuple[int, int],
        padding: tuple[int, int],
        output_padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        input: QParams,
        output: QParams | None,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.stride = list(stride)
        self.padding = list(padding)
        self.output_padding = list(output_padding)
        self.dilation = list(dilation)
        self.groups = groups
        self.relu = relu
        if is_depthwise(weight.codes, groups):
            self.kernel = "conv2d_depthwise"
        weight, bias = quantize_bias(weight, bias, input.scale)
        self.register_buffer("weight", swap_channels(weight.codes, groups).contiguous())
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.input_format = input.format
        self._register_qparams("input", input)
        self._register_output(output, upper)

    def forward(self, x: Tensor) -> Tensor:
        return ops.conv_transpose2d(
            x,
            self.input_scale,
            self.input_zero_point,
            self.weight,
            self.weight_scale,
            self.bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.dilation,
            self.groups,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        if max(self.stride) > _LARGEST_STRIDE:
            return None
        return _plan_step(self, "conv_transpose2d", dtypes[0], output_padding=self.output_padding)

    def prepare_float(self) -> None:
        add_bias_scale(self)
        if self.groups > 1:  # the weight's channels along one axis, as dequantize has them
            rows = self.weight.shape[0] // self.groups
            scale = self.weight_scale.reshape(self.groups, 1, -1, 1, 1)
            scale = scale.expand(-1, rows, -1, -1, -1).flatten(0, 1)
            self.register_buffer("float_scale", scale.contiguous())

    def float_forward(self, x: Tensor) -> Tensor:
        if self.groups > 1:
            weight = ops.qdq_dequantize(self.weight, self.float_scale, None)
        else:
            weight = float_weight(self, axis=1)
        return functional.conv_transpose2d(
            x,
            weight,
            float_bias(self),
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{self.input_format} x int8 -> {output}"

    def extra_repr(self) -> str:
        in_channels, out_channels, height, width = self.weight.shape
        return (
            f"{in_channels}, {out_channels * self.groups}, kernel_size=({height}, {width}), "
            f"stride={self.stride}, padding={self.padding}, "
            f"output_padding={self.output_padding}, dilation={self.dilation}, "
            f"groups={self.groups}, relu={self.relu}, {self.formats()}"
        )


__all__ = ["Conv1d", "Conv2d", "ConvTranspose2d", "DepthwiseConv2d", "make_conv2d"]
