"""Product of two matrices of codes."""

from __future__ import annotations

from torch import Tensor

from qtoolkit import ops
from qtoolkit.nn.base import QParams, QuantizedModule, code_format, saved


@saved(input_formats=tuple[str, str], a=QParams, b=QParams, output=QParams)
class Matmul(QuantizedModule):
    """``a @ b`` of activations, as attention has it; see ``qtoolkit.ops.matmul``.

    Inputs ``[..., M, K]`` and ``[..., K, N]`` codes; output ``[..., M, N]`` codes, or float32 where
    ``output`` is None.
    """

    kernel = "conv2d"

    def __init__(self, a: QParams, b: QParams, *, output: QParams | None) -> None:
        super().__init__()
        self.input_formats = (a.format, b.format)
        self._register_qparams("a", a)
        self._register_qparams("b", b)
        self._register_output(output)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return ops.matmul(
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
        )

    def float_forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def formats(self) -> str:
        output = "float32" if self.output_scale is None else code_format(self.quant_min)
        return f"{' x '.join(self.input_formats)} -> {output}"

    def extra_repr(self) -> str:
        return self.formats()
