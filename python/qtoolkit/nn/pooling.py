"""Pooling on codes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved


@saved(
    kernel_size=list[int],
    stride=list[int],
    padding=list[int],
    dilation=list[int],
    ceil_mode=bool,
)
class MaxPool2d(QuantizedModule):
    """Max pooling; output codes have the input's scale and zero point."""

    kernel = "max_pool2d"

    def __init__(
        self,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        ceil_mode: bool,
    ) -> None:
        super().__init__()
        self.kernel_size = list(kernel_size)
        self.stride = list(stride)
        self.padding = list(padding)
        self.dilation = list(dilation)
        self.ceil_mode = ceil_mode

    def forward(self, x: Tensor) -> Tensor:
        return ops.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        return PlanStep(
            "max_pool2d",
            kernel_size=self.kernel_size,
            stride=self.stride or self.kernel_size,
            padding=self.padding,
            dilation=self.dilation,
            ceil_mode=self.ceil_mode,
        )

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.max_pool2d(
            x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode
        )

    def formats(self) -> str:
        return "8-bit"


@saved(
    kernel_size=list[int],
    stride=list[int],
    padding=list[int],
    ceil_mode=bool,
    count_include_pad=bool,
    divisor_override=int | None,
    input=QParams,
    output=QParams,
)
class AvgPool2d(QuantizedModule):
    """Average pooling with a change of scale."""

    kernel = "avg_pool2d"

    def __init__(
        self,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        ceil_mode: bool,
        count_include_pad: bool,
        divisor_override: int | None,
        *,
        input: QParams,
        output: QParams,
    ) -> None:
        super().__init__()
        self.kernel_size = list(kernel_size)
        self.stride = list(stride)
        self.padding = list(padding)
        self.ceil_mode = ceil_mode
        self.count_include_pad = count_include_pad
        self.divisor_override = divisor_override
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.avg_pool2d(
            x,
            self.input_scale,
            self.input_zero_point,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        step = PlanStep(
            "avg_pool2d",
            kernel_size=self.kernel_size,
            stride=self.stride or self.kernel_size,
            padding=self.padding,
            ceil_mode=self.ceil_mode,
            count_include_pad=self.count_include_pad,
        )
        if self.divisor_override is not None:
            step.integers["divisor"] = [self.divisor_override]
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.avg_pool2d(
            x,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


@saved(output_size=list[int], input=QParams, output=QParams)
class AdaptiveAvgPool2d(QuantizedModule):
    """Adaptive average pooling with a change of scale."""

    kernel = "avg_pool2d"

    def __init__(self, output_size: tuple[int, int], *, input: QParams, output: QParams) -> None:
        super().__init__()
        self.output_size = list(output_size)
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.adaptive_avg_pool2d(
            x,
            self.input_scale,
            self.input_zero_point,
            self.output_size,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        flatten = not getattr(self, "keepdim", True)
        step = PlanStep("adaptive_avg_pool2d", output_size=self.output_size, flatten=flatten)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(x, self.output_size)  # type: ignore[arg-type]

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


@saved(output_size=list[int], keepdim=bool, input=QParams, output=QParams)
class GlobalAvgPool2d(AdaptiveAvgPool2d):
    """Mean over height and width; drops both dimensions unless ``keepdim``."""

    def __init__(self, keepdim: bool, *, input: QParams, output: QParams) -> None:
        super().__init__((1, 1), input=input, output=output)
        self.keepdim = keepdim

    def forward(self, x: Tensor) -> Tensor:
        y = ops.adaptive_avg_pool2d(
            x,
            self.input_scale,
            self.input_zero_point,
            self.output_size,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )
        return y if self.keepdim else y.flatten(1)

    def float_forward(self, x: Tensor) -> Tensor:
        return x.mean([2, 3], self.keepdim)


@saved(dims=list[int], keepdim=bool, input=QParams, output=QParams)
class Mean(QuantizedModule):
    """Mean over dimensions with a change of scale."""

    kernel = "avg_pool2d"

    def __init__(self, dims: list[int], keepdim: bool, *, input: QParams, output: QParams) -> None:
        super().__init__()
        self.dims = list(dims)
        self.keepdim = keepdim
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.mean(
            x,
            self.input_scale,
            self.input_zero_point,
            self.dims,
            self.keepdim,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        if sorted(self.dims) not in ([2, 3], [-2, -1]):
            return None
        step = PlanStep("adaptive_avg_pool2d", output_size=[1, 1], flatten=not self.keepdim)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        return x.mean(self.dims, self.keepdim)

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


@saved(dims=list[int], keepdim=bool, input=QParams, output=QParams)
class Sum(Mean):
    """Sum over dimensions with a change of scale."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.sum(
            x,
            self.input_scale,
            self.input_zero_point,
            self.dims,
            self.keepdim,
            self.output_scale,
            self.output_zero_point,
            self.quant_min,
            self.quant_max,
        )

    def float_forward(self, x: Tensor) -> Tensor:
        return x.sum(self.dims, self.keepdim)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep | None:
        return None
