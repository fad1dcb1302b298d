"""Softmax and layer norm on codes."""

from __future__ import annotations

import struct

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved


@saved(dim=int, input=QParams, output=QParams)
class Softmax(QuantizedModule):
    """Softmax along a dimension; see ``qtoolkit.ops.softmax``."""

    kernel = "softmax"

    def __init__(self, dim: int, *, input: QParams, output: QParams) -> None:
        super().__init__()
        self.dim = dim
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.softmax(
            x,
            self.input_scale,
            self.input_zero_point,
            self.dim,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep("softmax")
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.softmax(x, self.dim)

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


@saved(
    normalized_shape=list[int],
    eps=float,
    weight=torch.float32,
    bias=torch.float32,
    input=QParams,
    output=QParams,
)
class LayerNorm(QuantizedModule):
    """Layer norm over the last dimensions; see ``qtoolkit.ops.layer_norm``.

    ``weight`` and ``bias`` are float32 of the normalized shape, or None.
    """

    kernel = "layer_norm"

    def __init__(
        self,
        normalized_shape: tuple[int, ...],
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        *,
        input: QParams,
        output: QParams,
    ) -> None:
        super().__init__()
        self.normalized_shape = list(normalized_shape)
        self.eps = eps
        for name, value in (("weight", weight), ("bias", bias)):
            self.register_buffer(name, None if value is None else value.detach().float().clone())
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(
            x,
            self.input_scale,
            self.input_zero_point,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        if len(self.normalized_shape) != 1:
            return None
        (bits,) = struct.unpack("<q", struct.pack("<d", self.eps))  # no constant is float64
        step = PlanStep("layer_norm", eps=bits)
        shape = self.normalized_shape
        device = self.input_scale.device
        weight, bias = self.weight, self.bias
        step.constant("weight", torch.ones(shape, device=device) if weight is None else weight)
        step.constant("bias", torch.zeros(shape, device=device) if bias is None else bias)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"
