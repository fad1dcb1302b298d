"""Layers whose weight alone is codes: linear, convolution, embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import ops
from qtoolkit.nn.base import QuantizedModule, saved


@dataclass(frozen=True)
class PackedWeight:
    """A matrix of codes; ``qtoolkit.ops.weight_only`` says how they lie and what they mean.

    Attributes:
        format: name of the number format.
        bits: of a code.
        group_size: columns that share a scale.
        columns: of the matrix.
        codes: uint8 ``[N, ceil(columns * bits / 8)]``.
        scale: float32 ``[N, ceil(columns / group_size)]``.
        zero_point: uint8, shaped like ``scale``, or None.
        table: float32 ``[2^bits]``, or None.
    """

    format: str
    bits: int
    group_size: int
    columns: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    table: Tensor | None = None

    def dequantized(self) -> Tensor:
        """The values, float32 ``[N, columns]``."""
        return ops.dequantize_codes(
            self.codes,
            self.scale,
            self.zero_point,
            self.bits,
            self.columns,
            self.group_size,
            self.table,
        )


class QuantizedWeight(QuantizedModule):
    """What the layers share: the codes of a weight.

    Attributes:
        format, bits, group_size, columns, codes, scale, zero_point, table: of ``PackedWeight``.
        shape: of the float weight.
        dtype: name of the float weight's dtype.
        method: how the codes were chosen.
    """

    def _hold(
        self, weight: PackedWeight, shape: tuple[int, ...], dtype: torch.dtype, method: str
    ) -> None:
        self.format, self.bits = weight.format, weight.bits
        self.group_size, self.columns = weight.group_size, weight.columns
        self.shape = [int(size) for size in shape]
        self.dtype = str(dtype).removeprefix("torch.")
        self.method = method
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scale", weight.scale)
        self.register_buffer("zero_point", weight.zero_point)
        self.register_buffer("table", weight.table)

    def packed(self) -> PackedWeight:
        """The codes and what they mean."""
        return PackedWeight(
            self.format,
            self.bits,
            self.group_size,
            self.columns,
            self.codes,
            self.scale,
            self.zero_point,
            self.table,
        )

    @property
    def weight(self) -> Tensor:
        """The weight as numbers of the float layer's dtype and shape, made anew at every read."""
        return self.packed().dequantized().reshape(self.shape).to(getattr(torch, self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # What .half() and the like make of a float weight.
        self.dtype = str(fn(torch.empty(0, dtype=getattr(torch, self.dtype))).dtype)
        self.dtype = self.dtype.removeprefix("torch.")
        return super()._apply(fn, recurse)

    def formats(self) -> str:
        name = f"{self.format} per {self.group_size}"
        return f"float x {name} ({self.method}) -> float"

    def extra_repr(self) -> str:
        return f"{', '.join(map(str, self.shape))}, {self.formats()}"


_HELD = {
    "format": str,
    "bits": int,
    "group_size": int,
    "columns": int,
    "shape": list[int],
    "dtype": Literal["float32", "float16", "bfloat16"],
    "method": str,
    "codes": torch.uint8,
    "scale": torch.float32,
    "zero_point": torch.uint8,
    "table": torch.float32,
}


@saved(
    accumulate=Literal["float32", "int8"],
    bias=torch.float32,
    input_factor=torch.float32,
    input_order=torch.int64,
    **_HELD,
)
class QuantizedWeightLinear(QuantizedWeight):
    """``y = x @ weight.T + bias`` with a weight of codes; see ``ops.linear_weight_only``.

    Input ``[..., in_features]`` float32, float16 or bfloat16; the output has its dtype.

    Attributes:
        accumulate: ``"float32"`` for inputs as they are, ``"int8"`` for inputs rounded by row.
        bias: float32 ``[out_features]`` or None.
        input_factor: float32 ``[in_features]``, what the input is multiplied by first, or None.
        input_order: int64 ``[in_features]``, the input's columns in the order of the weight's, or
            None.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        method: str = "rtn",
        accumulate: str = "float32",
        input_factor: Tensor | None = None,
        input_order: Tensor | None = None,
    ) -> None:
        super().__init__()
        self._hold(weight, (weight.codes.size(0), weight.columns), dtype, method)
        self.accumulate = accumulate
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())
        self.register_buffer("input_factor", input_factor)
        self.register_buffer("input_order", input_order)

    def forward(self, x: Tensor) -> Tensor:
        if self.input_factor is not None:
            x = (x * self.input_factor).to(x.dtype)
        if self.input_order is not None:
            x = x[..., self.input_order]
        return ops.linear_weight_only(
            x,
            self.codes,
            self.scale,
            self.zero_point,
            self.bias,
            self.bits,
            self.group_size,
            self.table,
            self.accumulate,
        )

    @property
    def weight(self) -> Tensor:
        """As of any, with the input's factor and order in it."""
        weight = self.packed().dequantized()
        if self.input_order is not None:
            weight = torch.empty_like(weight).index_copy_(1, self.input_order, weight)
        if self.input_factor is not None:
            weight = weight * self.input_factor
        return weight.to(getattr(torch, self.dtype))

    def float_forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.float(), self.bias)

    @property
    def in_features(self) -> int:
        """Length of an input's row."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Length of an output's row."""
        return self.shape[0]


@saved(
    stride=tuple[int, int],
    padding=Any,
    dilation=tuple[int, int],
    groups=int,
    padding_mode=Literal["zeros", "reflect", "replicate", "circular"],
    bias=torch.float32,
    **_HELD,
)
class QuantizedWeightConv2d(QuantizedWeight):
    """``nn.Conv2d`` with a weight of codes, which is dequantized at each call.

    A row of codes is an output channel, its columns input channel, height and width.
    """

    def __init__(self, weight: PackedWeight, conv: nn.Conv2d, *, method: str = "rtn") -> None:
        super().__init__()
        self._hold(weight, tuple(conv.weight.shape), conv.weight.dtype, method)
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.groups, self.padding_mode = conv.groups, conv.padding_mode
        bias = conv.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().clone())

    def forward(self, x: Tensor) -> Tensor:
        weight = self.packed().dequantized().reshape(self.shape).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        padding = self.padding
        if self.padding_mode != "zeros":
            x, padding = functional.pad(x, self._sides(), mode=self.padding_mode), (0, 0)
        return functional.conv2d(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _sides(self) -> list[int]:
        """What is added left, right, above and below."""
        sides: list[int] = []
        for i in (1, 0):
            whole = self.dilation[i] * (self.shape[2 + i] - 1) if self.padding == "same" else 0
            side = 0 if isinstance(self.padding, str) else self.padding[i]
            sides += [whole // 2, whole - whole // 2] if whole else [side, side]
        return sides


@saved(**_HELD)
class QuantizedWeightEmbedding(QuantizedWeight):
    """``nn.Embedding`` with a table of codes, of which only the rows that are read become numbers.

    Indices of any shape; the result ``[..., embedding_dim]`` has the float table's dtype.
    """

    def __init__(
        self, weight: PackedWeight, *, dtype: torch.dtype = torch.float32, method: str = "rtn"
    ) -> None:
        super().__init__()
        self._hold(weight, (weight.codes.size(0), weight.columns), dtype, method)

    def forward(self, indices: Tensor) -> Tensor:
        rows = ops.embedding_weight_only(
            indices,
            self.codes,
            self.scale,
            self.zero_point,
            self.bits,
            self.columns,
            self.group_size,
            self.table,
        )
        return rows.to(getattr(torch, self.dtype))

    @property
    def num_embeddings(self) -> int:
        """Rows of the table."""
        return self.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Columns of the table."""
        return self.shape[1]


class Float32Layer(nn.Module):
    """A layer that computes in float32 within a model of 16-bit floats.

    The input becomes float32, the output has the input's dtype.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.float()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.float()).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if tensor.is_floating_point() else moved

        return super()._apply(keep_dtype, recurse)

    @property
    def weight(self) -> Any:
        """The layer's own."""
        return self.layer.weight

    @property
    def bias(self) -> Any:
        """The layer's own."""
        return self.layer.bias
