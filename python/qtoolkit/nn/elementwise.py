"""Layers that work on codes element by element: quantize, dequantize, add, mul, cat, ReLU,
batch norm."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved
from qtoolkit.nn.weights import IntegerWeight, quantize_bias


@saved(output=QParams)
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

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        if dtypes[0] != torch.float32:
            return None
        step = PlanStep("quantize")
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return x

    def formats(self) -> str:
        return f"float32 -> {code_format(self.quant_min)}"


@saved(input_format=Literal["int8", "uint8"], input=QParams)
class Dequantize(QuantizedModule):
    """Codes to float32; see ``qtoolkit.ops.dequantize_per_tensor``."""

    kernel = "dequantize"

    def __init__(self, input: QParams) -> None:
        super().__init__()
        self.input_format = input.format
        self._register_qparams("input", input)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dequantize_per_tensor(x, self.input_scale, self.input_zero_point)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("dequantize", contiguous=False)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return x

    def formats(self) -> str:
        return f"{self.input_format} -> float32"


@saved(relu=bool, a=QParams, b=QParams, output=QParams)
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

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("add", relu=self.relu)
        step.input("a", self.a_scale, self.a_zero_point, dtypes[0])
        step.input("b", self.b_scale, self.b_zero_point, dtypes[1])
        step.output(self)
        return step

    def float_forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def formats(self) -> str:
        return f"8-bit + 8-bit -> {code_format(self.quant_min)}"


@saved(relu=bool, a=QParams, b=QParams, output=QParams)
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

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("mul", relu=self.relu)
        step.input("a", self.a_scale, self.a_zero_point, dtypes[0])
        step.input("b", self.b_scale, self.b_zero_point, dtypes[1])
        step.output(self)
        return step

    def float_forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def formats(self) -> str:
        return f"8-bit x 8-bit -> {code_format(self.quant_min)}"


@saved(dim=int, input_scales=torch.float32, input_zero_points=torch.int32, output=QParams)
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
            [self.input_scales],
            [self.input_zero_points],
            self.dim,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("cat")
        for i, dtype in enumerate(dtypes):
            step.input(f"input{i}", self.input_scales[i], self.input_zero_points[i], dtype)
        step.output(self)
        return step

    def float_forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, self.dim)

    def formats(self) -> str:
        return f"{len(self.input_scales)} x 8-bit -> {code_format(self.quant_min)}"


@saved(input=QParams, output=QParams)
class ReLU(QuantizedModule):
    """ReLU (clipped at ``upper`` where given) with a change of scale."""

    kernel = "requantize"
    relu = True

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

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("requantize", relu=True)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return x

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


@saved(relu=bool, weight=torch.float32, bias=torch.float32, input=QParams, output=QParams)
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

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("batch_norm", relu=self.relu)
        step.constant("weight", self.weight)
        step.constant("bias", self.bias)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def prepare_float(self) -> None:
        """A depthwise convolution with one weight a channel, which is an exact int8 code at a scale
        of its own: runtimes have integer kernels for that."""
        scale = self.weight.abs()
        # A channel without a weight keeps fine steps for its bias.
        steps = (self.bias.abs() / (self.input_scale * 2.0**20)).clamp(min=2.0**-100)
        codes = self.weight.sign().to(torch.int8).reshape(-1, 1, 1, 1)
        weight = IntegerWeight(codes, torch.where(scale == 0, steps, scale))
        weight, bias = quantize_bias(weight, self.bias, self.input_scale)
        self.register_buffer("codes", weight.codes)
        self.register_buffer("codes_scale", weight.scale)
        self.register_buffer("codes_bias", bias)
        bias_scale = self.input_scale.double() * weight.scale.double()
        self.register_buffer("codes_bias_scale", bias_scale.float())

    def float_forward(self, x: Tensor) -> Tensor:
        weight = ops.qdq_dequantize(self.codes, self.codes_scale, None, 0)
        bias = ops.qdq_dequantize(self.codes_bias, self.codes_bias_scale, None, 0)
        return functional.conv2d(x, weight, bias, groups=self.codes.size(0))

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"
