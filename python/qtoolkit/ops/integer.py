"""Operators on codes, to codes and from codes. `qtoolkit.ops` says what all share."""

from typing import Optional

import torch
from torch import Tensor


def quantize_per_tensor(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int
) -> Tensor:
    """The codes of x, in its shape and memory format.

    x: float32 (or float16, bfloat16) of any shape. NaN becomes the zero point, infinities are
    clamped.
    """
    return torch.ops.qtoolkit.quantize_per_tensor(x, scale, zero_point, quant_min, quant_max)


def quantize_per_channel(
    x: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """quantize_per_tensor with scale and zero_point of shape [x.size(ch_axis)]."""
    return torch.ops.qtoolkit.quantize_per_channel(
        x, scale, zero_point, ch_axis, quant_min, quant_max
    )


def dequantize_per_tensor(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """float32 scale * (x - zero_point) of uint8 or int8 codes of any shape."""
    return torch.ops.qtoolkit.dequantize_per_tensor(x, scale, zero_point)


def dequantize_per_channel(x: Tensor, scale: Tensor, zero_point: Tensor, ch_axis: int) -> Tensor:
    """dequantize_per_tensor with scale and zero_point of shape [x.size(ch_axis)]."""
    return torch.ops.qtoolkit.dequantize_per_channel(x, scale, zero_point, ch_axis)


def conv2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
    relu: bool = False,
    residual: Optional[Tensor] = None,  # noqa: UP045
    residual_scale: Optional[Tensor] = None,  # noqa: UP045
    residual_zero_point: Optional[Tensor] = None,  # noqa: UP045
) -> Tensor:
    """Convolution of codes with exact int32 accumulation; the output is channels_last.

    x: codes [N, C, H, W] in any memory format (channels_last costs nothing); the padding is real 0.
    weight: int8 [OC, C / groups, KH, KW] with zero point 0; weight_scale: [OC] or one element.
    bias: int32 [OC] at scale x_scale * weight_scale, or None.
    y_scale and y_zero_point: the output's parameters, or None for a float32 output (dequantized).
    relu: max with real 0. residual: codes in the output's shape, added before the ReLU (not with
    a float32 output).

    The weight is packed once and kept while it lives; an in-place change is noticed by its
    version. An in-place change of a few elements of a tensor without versions (an inference
    tensor, or through `.data`) is not: replace such a tensor instead.

    Raises ValueError also where one output is a sum of more than 65793 products, which int32 may
    not hold.
    """
    return torch.ops.qtoolkit.conv2d(
        x,
        x_scale,
        x_zero_point,
        weight,
        weight_scale,
        bias,
        stride,
        padding,
        dilation,
        groups,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
        residual,
        residual_scale,
        residual_zero_point,
    )


def conv_transpose2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: list[int],
    padding: list[int],
    output_padding: list[int],
    dilation: list[int],
    groups: int,
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """Transposed convolution of codes with exact int32 accumulation; the output is channels_last.

    weight: int8 [C, OC / groups, KH, KW], as torch has it; weight_scale: [OC] or one element; bias:
    int32 [OC]. The rest is as in conv2d.
    """
    return torch.ops.qtoolkit.conv_transpose2d(
        x,
        x_scale,
        x_zero_point,
        weight,
        weight_scale,
        bias,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
    )


def linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """The fully connected layer: x [..., K] codes, weight int8 [OC, K], the result [..., OC].

    Everything else is as in conv2d.
    """
    return torch.ops.qtoolkit.linear(
        x,
        x_scale,
        x_zero_point,
        weight,
        weight_scale,
        bias,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
    )


def linear_dynamic(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Optional[Tensor] = None,  # noqa: UP045
    activation: str = "none",
) -> Tensor:
    """The fully connected layer on float rows that are quantized here, each by its own range.

    x: float32, float16 or bfloat16 [..., K]; the result [..., OC] has its dtype. Each row of K
    values (a token) becomes uint8 codes for the range [min(0, least), max(0, greatest)], with the
    scale and zero point of an affine observer. A row that holds NaN or infinity gives NaN.
    weight: int8 [OC, K] with zero point 0; weight_scale: float32 [OC] or one element.
    bias: float32 [OC], or None.
    activation: "none", "relu", "gelu" (exact), "gelu_tanh" (its approximation) or "silu".

    The sums of products are exact in int32; then, in float32 and rounded once an operation,
    y = activation(float(acc) * (row_scale * weight_scale[c]) + bias[c]). 16-bit results are rounded
    once more at the end.

    Dynamic quantization as in torch.ao.quantization.quantize_dynamic, but with a scale for each row
    as in Yao et al., "ZeroQuant" (2022). GELU: Hendrycks & Gimpel, "Gaussian Error Linear Units"
    (2016).

    The weight is packed once and kept, as in conv2d. There is no gradient.
    """
    return torch.ops.qtoolkit.linear_dynamic(x, weight, weight_scale, bias, activation)


def matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Optional[Tensor],  # noqa: UP045
    y_zero_point: Optional[Tensor],  # noqa: UP045
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Product of matrices of codes [..., M, K] and [..., K, N]; batch dimensions are broadcast.

    a and b: uint8 or int8 codes of any strides, such as the transposed keys of attention; b is
    packed at every call.
    y_scale and y_zero_point: the output's parameters, or None for a float32 output (dequantized).

    The sums of products of (a - a_zero_point) and (b - b_zero_point) are exact in int32, so K must
    be at most 33025.
    """
    return torch.ops.qtoolkit.matmul(
        a,
        a_scale,
        a_zero_point,
        b,
        b_scale,
        b_zero_point,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
    )


def add(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """The codes of real a + real b, then ReLU if relu. a and b are broadcast to one shape."""
    return torch.ops.qtoolkit.add(
        a,
        a_scale,
        a_zero_point,
        b,
        b_scale,
        b_zero_point,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
    )


def mul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """The codes of real a * real b, then ReLU if relu. a and b are broadcast to one shape."""
    return torch.ops.qtoolkit.mul(
        a,
        a_scale,
        a_zero_point,
        b,
        b_scale,
        b_zero_point,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
    )


def requantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """The same real values in other parameters (and dtype), then ReLU if relu."""
    return torch.ops.qtoolkit.requantize(
        x, x_scale, x_zero_point, y_scale, y_zero_point, quant_min, quant_max, relu
    )


def lookup(x: Tensor, table: Tensor) -> Tensor:
    """Any function of one code: y = table[x], as PyTorch indexes with an int64 tensor.

    x: codes of any shape; table: [256], uint8 or int8, the dtype of the result. Entry c is for the
    code c, entry 256 + c for a negative one.
    """
    return torch.ops.qtoolkit.lookup(x, table)


def batch_norm(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    weight: Tensor,
    bias: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    relu: bool = False,
) -> Tensor:
    """The codes of real x * weight[c] + bias[c], then ReLU if relu.

    x: codes [N, C] or [N, C, H, W] (then the output is channels_last); weight, bias: float32 [C],
    the batch norm written as an affine map.
    """
    return torch.ops.qtoolkit.batch_norm(
        x,
        x_scale,
        x_zero_point,
        weight,
        bias,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
        relu,
    )


def max_pool2d(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum of the codes [N, C, H, W] in each window, in the same parameters; channels_last.

    The rules of torch.nn.functional.max_pool2d; an empty stride is kernel_size.
    """
    return torch.ops.qtoolkit.max_pool2d(x, kernel_size, stride, padding, dilation, ceil_mode)


def avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: Optional[int],  # noqa: UP045
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Mean of the codes [N, C, H, W] in each window; channels_last.

    The rules of torch.nn.functional.avg_pool2d; an empty stride is kernel_size.
    """
    return torch.ops.qtoolkit.avg_pool2d(
        x,
        x_scale,
        x_zero_point,
        kernel_size,
        stride,
        padding,
        ceil_mode,
        count_include_pad,
        divisor_override,
        y_scale,
        y_zero_point,
        quant_min,
        quant_max,
    )


def adaptive_avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    output_size: list[int],
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Mean of the codes [N, C, H, W] in each of output_size windows; channels_last."""
    return torch.ops.qtoolkit.adaptive_avg_pool2d(
        x, x_scale, x_zero_point, output_size, y_scale, y_zero_point, quant_min, quant_max
    )


def cat(
    xs: list[Tensor],
    scales: list[Tensor],
    zero_points: list[Tensor],
    dim: int,
    y_scale: Tensor,
    y_zero_point: Tensor,
    quant_min: int,
    quant_max: int,
) -> Tensor:
    """Concatenation along dim of codes with their own parameters, each requantized to y's.

    scales and zero_points: a tensor of one element for each of xs, or a single tensor that holds
    one element for each, of shape [len(xs)].
    """
    return torch.ops.qtoolkit.cat(
        xs, scales, zero_points, dim, y_scale, y_zero_point, quant_min, quant_max
    )
