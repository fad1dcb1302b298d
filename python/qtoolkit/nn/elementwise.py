"""Layers that work on codes element by element: quantize, dequantize, add, mul, cat, ReLU,
batch norm."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.nn.base import QParams, QuantizedModule, code_format


class Quantize(QuantizedModule):
    """float32 to codes; see ``qtoolkit.ops.quantize_per_tensor``."""

    kernel = "quantize"

    def __init__(self, output: QParams) -> None:
        super().__init__()
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.quantize_per_tensor(
            x, self.output_scale, self.output_zero_point, self.quant_min, self.quant_max
        )

    def formats(self) -> str:
        return f"float32 -> {code_format(self.quant_min)}"


class Dequantize(QuantizedModule):
    """Codes to float32; see ``qtoolkit.ops.dequantize_per_tensor``."""

    kernel = "dequantize"

    def __init__(self, input: QParams) -> None:
        super().__init__()
        self.input_format = input.format
        self._register_qparams("input", input)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dequantize_per_tensor(x, self.input_scale, self.input_zero_point)

    def formats(self) -> str:
        return f"{self.input_format} -> float32"


class Add(QuantizedModule):
    """Sum of two tensors of codes, with ReLU fused where asked; shapes are broadcast."""

    kernel = "add"

    def __init__(
        self,
        a: QParams,
        b: QParams,
        *,
        output: QParams,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.relu = relu
        self._register_qparams("a", a)
        self._register_qparams("b", b)
        self._register_output(output, upper)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.add(
            a,
            self.a_scale,
            self.a_zero_point,
            b,
            self.b_scale,
            self.b_zero_point,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
        )

    def formats(self) -> str:
        return f"8-bit + 8-bit -> {code_format(self.quant_min)}"


class Mul(QuantizedModule):
    """Product of two tensors of codes, with ReLU fused where asked; shapes are broadcast."""

    kernel = "mul"

    def __init__(
        self,
        a: QParams,
        b: QParams,
        *,
        output: QParams,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.relu = relu
        self._register_qparams("a", a)
        self._register_qparams("b", b)
        self._register_output(output, upper)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.mul(
            a,
            self.a_scale,
            self.a_zero_point,
            b,
            self.b_scale,
            self.b_zero_point,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
        )

    def formats(self) -> str:
        return f"8-bit x 8-bit -> {code_format(self.quant_min)}"


class Cat(QuantizedModule):
    """Concatenation of codes, each input brought to the output's scale."""

    kernel = "requantize"

    def __init__(self, inputs: list[QParams], dim: int, *, output: QParams) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("input_scales", torch.stack([q.scale.reshape(()) for q in inputs]))
        self.register_buffer(
            "input_zero_points", torch.stack([q.zero_point.reshape(()) for q in inputs])
        )
        self._register_output(output)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return ops.cat(
            xs,
            list(torch.unbind(self.input_scales)),
            list(torch.unbind(self.input_zero_points)),
            self.dim,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def formats(self) -> str:
        return f"{len(self.input_scales)} x 8-bit -> {code_format(self.quant_min)}"


class ReLU(QuantizedModule):
    """ReLU (clipped at ``upper`` where given) with a change of scale."""

    kernel = "requantize"

    def __init__(self, input: QParams, *, output: QParams, upper: float | None = None) -> None:
        super().__init__()
        self._register_qparams("input", input)
        self._register_output(output, upper)

    def forward(self, x: Tensor) -> Tensor:
        return ops.requantize(
            x,
            self.input_scale,
            self.input_zero_point,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            True,
        )

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


class BatchNorm2d(QuantizedModule):
    """Batch norm in evaluation, an affine map per channel of ``[N, C, H, W]`` codes.

    ``weight`` and ``bias`` (float32 ``[C]``) are the map on real numbers: ``y = x * weight +
    bias``.
    """

    kernel = "requantize"

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        input: QParams,
        output: QParams,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.relu = relu
        self.register_buffer("weight", weight.detach().float().clone())
        self.register_buffer("bias", bias.detach().float().clone())
        self._register_qparams("input", input)
        self._register_output(output, upper)

    def forward(self, x: Tensor) -> Tensor:
        return ops.batch_norm(
            x,
            self.input_scale,
            self.input_zero_point,
            self.weight,
            self.bias,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
        )

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"
