"""Functions of one value on codes: the table of what each code becomes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit import ops
from qtoolkit.nn import functional as own
from qtoolkit.nn.base import PlanStep, QParams, QuantizedModule, code_format, saved


@saved(function=str, functions=Any, table=Tensor, input=QParams, output=QParams)
class Lookup(QuantizedModule):
    """A function of one value, such as SiLU; see ``qtoolkit.ops.lookup``.

    The table is made once and kept, so that every device and kernel gives the same bits.

    Attributes:
        function: its name, for reports.
        functions: what the table was made of, for export: float layers one after the other, each as
            the name of its class (of ``torch.nn`` or ``qtoolkit.nn.functional``) and its arguments.
    """

    kernel = "lookup"

    def __init__(
        self,
        function: str,
        table: Tensor,
        *,
        input: QParams,
        output: QParams,
        functions: list[tuple[str, dict[str, Any]]] | None = None,
    ) -> None:
        """See ``tabulate`` for the table."""
        super().__init__()
        self.function = function
        self.functions = functions or []
        self.register_buffer("table", table)
        self._register_qparams("input", input)
        self._register_output(output)

    def forward(self, x: Tensor) -> Tensor:
        return ops.lookup(x, self.table)

    def plan_step(self, dtypes: list[torch.dtype]) -> PlanStep:
        # Inside a plan int8 codes are code + 128.
        table = self.table.view(torch.uint8)
        if dtypes[0] == torch.int8:
            table = table.roll(128)
        if self.quant_min < 0:
            table = table ^ 128
        step = PlanStep("lookup")
        step.constant("table", table)
        step.input("input", self.input_scale, self.input_zero_point, dtypes[0])
        step.output(self)
        return step

    def float_forward(self, x: Tensor) -> Tensor:
        if not self.functions:
            raise NotImplementedError(f"a table of {self.function} has no float form")
        for name, arguments in self.functions:
            kind = getattr(own, name, None) or getattr(nn, name, None)
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ValueError(f"a table of {self.function} names the unknown layer {name!r}")
            x = kind(**arguments)(x)
        return x

    def kind(self) -> str:
        return f"Lookup({self.function})"

    def formats(self) -> str:
        return f"8-bit -> {code_format(self.quant_min)}"


def describe_function(function: nn.Module) -> tuple[str, dict[str, Any]]:
    """A float layer without tensors as the name of its class and its arguments."""
    parameters = inspect.signature(type(function)).parameters
    return type(function).__name__, {
        name: getattr(function, name)
        for name in parameters
        if name != "inplace" and isinstance(getattr(function, name, None), int | float | str)
    }


def tabulate(function: Callable[[Tensor], Tensor], *, input: QParams, output: QParams) -> Tensor:
    """The codes of a function's values at the 256 codes of its input, for ``Lookup``.

    Entry c is ``quantize(function(dequantize(c)))``, computed in float32 on the CPU; entry 256 + c
    that of a negative code c.
    """
    dtype = torch.int8 if input.quant_min < 0 else torch.uint8
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    with torch.no_grad():
        values = function(
            ops.dequantize_per_tensor(codes, input.scale.cpu(), input.zero_point.cpu())
        )
        table = ops.quantize_per_tensor(
            values, output.scale.cpu(), output.zero_point.cpu(), output.quant_min, output.quant_max
        )
    return table.to(output.scale.device)
