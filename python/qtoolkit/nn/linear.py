"""INT8 linear layers: on codes, and on floats that are quantized as they come."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved
from qtoolkit.nn.kernels import weight_without_kernel
from qtoolkit.nn.weights import (
    IntegerWeight,
    add_bias_scale,
    float_bias,
    float_weight,
    quantize_bias,
    quantize_weight,
)
from qtoolkit.qconfig import TensorSpec


@saved(
    relu=bool,
    input_format=Literal["int8", "uint8"],
    weight=torch.int8,
    weight_scale=torch.float32,
    bias=torch.int32,
    input=QParams,
    output=QParams,
)
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

    def prepare_float(self) -> None:
        add_bias_scale(self)

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, float_weight(self), float_bias(self))

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{self.input_format} x int8 -> {output}"

    def extra_repr(self) -> str:
        out_features, in_features = self.weight.shape
        return f"{in_features}, {out_features}, relu={self.relu}, {self.formats()}"


@saved(
    activation=Literal["none", "relu", "gelu", "gelu_tanh", "silu"],
    weight=torch.int8,
    weight_scale=torch.float32,
    bias=torch.float32,
)
class DynamicLinear(QuantizedModule):
    """``activation(x @ weight.T + bias)`` with an int8 weight, on float rows that are quantized one
    by one as they come; see ``qtoolkit.ops.linear_dynamic``. No calibration, no gradient; on CPU.

    Input ``[..., in_features]`` float32, float16 or bfloat16; the output ``[..., out_features]``
    has its dtype. A row of the input that holds NaN or infinity gives NaN.

    Attributes:
        weight: int8 ``[out_features, in_features]``.
        weight_scale: float32 ``[out_features]``.
        bias: float32 ``[out_features]`` or None.
        activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"`` or ``"silu"``.
    """

    kernel = "conv2d"

    #: The default of ``from_float``: int8, symmetric, a scale for each output channel.
    WEIGHT = TensorSpec(
        "int8", "per_channel", axis=0, symmetric=True, observer="per_channel_minmax"
    )

    def __init__(
        self, weight: IntegerWeight, bias: Tensor | None, *, activation: str = "none"
    ) -> None:
        super().__init__()
        if activation not in ("none", "relu", "gelu", "gelu_tanh", "silu"):
            raise ValueError(
                'activation must be "none", "relu", "gelu", "gelu_tanh" or "silu", got '
                f"{activation!r}"
            )
        self.activation = activation
        self.register_buffer("weight", weight.codes.contiguous())
        self.register_buffer("weight_scale", weight.scale)
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    @classmethod
    def from_float(
        cls,
        linear: nn.Linear,
        *,
        activation: str = "none",
        weight: TensorSpec | None = None,
        name: str = "linear",
    ) -> DynamicLinear:
        """The layer for a float one, which is not changed.

        Args:
            linear: float32, float16 or bfloat16.
            activation: what follows.
            weight: how its weight is quantized; ``DynamicLinear.WEIGHT`` if None.
            name: its name, for error messages.

        Raises:
            TypeError: ``linear`` is no ``nn.Linear`` or of another dtype.
            ValueError: a value is NaN or infinite; the specification has no integer kernel, or the
                activation is unknown.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{name} must be a torch.nn.Linear, got {type(linear).__name__}")
        if linear.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise TypeError(
                f"{name}.weight must be float32, float16 or bfloat16, got {linear.weight.dtype}; "
                "convert it with .float() first"
            )
        spec = cls.WEIGHT if weight is None else weight
        reason = weight_without_kernel(spec)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        for part, tensor in (("weight", linear.weight), ("bias", linear.bias)):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"{name}.{part} holds NaN or Inf; check the model's checkpoint")
        codes = quantize_weight(linear.weight.detach().float(), spec, name)
        return cls(codes, linear.bias, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear_dynamic(x, self.weight, self.weight_scale, self.bias, self.activation)

    def float_forward(self, x: Tensor) -> Tensor:
        y = functional.linear(x, float_weight(self), self.bias)
        if self.activation == "relu":
            return functional.relu(y)
        if self.activation == "silu":
            return functional.silu(y)
        if self.activation == "none":
            return y
        return functional.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return int(self.weight.size(1))

    @property
    def out_features(self) -> int:
        """Length of an output's row."""
        return int(self.weight.size(0))

    def formats(self) -> str:
        return "float x int8 -> float"

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation}"
        )
