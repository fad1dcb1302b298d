"""INT8 linear layer."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format
from qtoolkit.nn.weights import IntegerWeight, quantize_bias


class Linear(QuantizedModule):
    """``y = x @ weight.T + bias`` on codes, with ReLU fused where asked; see
    ``qtoolkit.ops.linear``.

    Input ``[..., in_features]`` codes; output codes, or float32 where ``output`` is None.
    """

    kernel = "conv2d"

    def __init__(
        self,
        weight: IntegerWeight,
        bias: Tensor | None,
        *,
        input: QParams,
        output: QParams | None,
        relu: bool = False,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.relu = relu
        weight, bias = quantize_bias(weight, bias, input.scale)
        self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("weight_scale", weight.scale.clone())
        self.register_buffer("bias", bias)
        self.input_format = input.format
        self._register_qparams("input", input)
        self._register_output(output, upper)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(
            x,
            self.input_scale,
            self.input_zero_point,
            self.weight,
            self.weight_scale,
            self.bias,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
            self.relu,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("linear", relu=self.relu)
        step.constant("weight", self.weight)
        step.constant("weight_scale", self.weight_scale.reshape(-1))
        step.constant("bias", self.bias)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{self.input_format} x int8 -> {output}"

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, relu={self.relu}, {self.formats()}"
