"""Operators of float networks that train with quantization simulated."""

from typing import Optional

import torch
from torch import Tensor


def max_pool2d_train(
    x: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool = False,
) -> Tensor:
    """torch.nn.functional.max_pool2d of float32 [N, C, H, W] with the gradient of x.

    The place of each maximum is kept in one byte, where torch keeps eight, so a window has at most
    256 elements. The output is channels_last. No second derivatives.
    """
    return torch.ops.qtoolkit.max_pool2d_train(
        x, kernel_size, stride, padding, dilation, ceil_mode
    )[0]


def conv2d_train(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_scale: Optional[Tensor],  # noqa: UP045
    x_zero_point: Optional[Tensor],  # noqa: UP045
    x_quant_min: int,
    x_quant_max: int,
    weight_scale: Optional[Tensor],  # noqa: UP045
    weight_quant_max: int,
) -> Tensor:
    """torch.nn.functional.conv2d that keeps 8-bit codes for its backward where it can.

    Where every value of x is one that the scale (one element), zero point and range can represent,
    the codes of x are kept instead of x, a quarter of the memory, and give the same gradients bit
    for bit; likewise for the weight, whose scale has one element or one an output channel, and
    whose codes lie in [-weight_quant_max, weight_quant_max]. All else is kept as it is, as
    are both where their scale is None. Only on CPU and for float32.

    Raises RuntimeError where second derivatives are asked for.
    """
    return torch.ops.qtoolkit.conv2d_train(
        x,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        x_scale,
        x_zero_point,
        x_quant_min,
        x_quant_max,
        weight_scale,
        weight_quant_max,
    )


def batch_norm_act(
    x: Tensor,
    weight: Optional[Tensor],  # noqa: UP045  (torch.jit.script reads it)
    bias: Optional[Tensor],  # noqa: UP045
    running_mean: Optional[Tensor],  # noqa: UP045
    running_var: Optional[Tensor],  # noqa: UP045
    residual: Optional[Tensor] = None,  # noqa: UP045
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    upper: Optional[float] = None,  # noqa: UP045
    min_val: Optional[Tensor] = None,  # noqa: UP045
    max_val: Optional[Tensor] = None,  # noqa: UP045
    scale: Optional[Tensor] = None,  # noqa: UP045
    zero_point: Optional[Tensor] = None,  # noqa: UP045
    averaging_constant: float = 0.0,
    symmetric: bool = False,
    quant_min: int = 0,
    quant_max: int = 255,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fake_quantize(act(batch_norm(x) + residual)), with the range observed on the way.

    The batch norm is that of Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1, with
    PyTorch's running statistics: with `training` the batch is normalized by its own mean and biased
    variance, and running_mean and running_var, where given, move towards the batch's by `momentum`;
    else they are used as they are. It comes before the fake-quantize in float, as in
    Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference" (2018), section
    3.2.2; ranges and the straight-through gradient are those of Jacob et al. (2018), section 3.2.

    Where averaging_constant is above 0, min_val and max_val move towards the least and greatest
    value of the batch as in `MovingAverageMinMaxObserver`, and scale and zero_point follow them; a
    batch with NaN or Inf changes nothing. With 0 scale and zero_point are used as they are. While
    min_val is +Inf (nothing seen), and where scale is None, the result is not quantized. The
    results are the same bits for any number of threads and on every CPU.

    Args:
        x: float32, float16 or bfloat16 [N, C] or [N, C, ...]; computed in float32. channels_last is
            fastest, with a multiple of 16 channels.
        weight, bias, running_mean, running_var: float32 [C], or None for 1 and 0, and for no
            running statistics. The latter are changed in place.
        residual: float, of x's shape; added before the activation.
        relu: whether ReLU follows; `upper` then bounds it (6 for ReLU6).
        min_val, max_val, scale, zero_point: one element each, float32, zero_point int32; changed in
            place.
        symmetric: the range is made symmetric, with the middle code as zero point.

    Returns:
        y of x's shape, dtype and memory format; mean and 1 / sqrt(var + eps), float32 [C], by which
        x was normalized; and the mask, uint8 [ceil(x.numel() / 8)] (or [0] without activation and
        quantization): bit i % 8 of byte i / 8 is set where the gradient of element i in y's memory
        passes, inside the activation's open range and the range of the codes. Only y has a
        gradient; it reaches x, weight, bias and residual, once.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or device does not fit, `training` with fewer than two values for each
            channel, or of arguments that go together only some are given.
    """
    return torch.ops.qtoolkit.batch_norm_act(
        x,
        weight,
        bias,
        running_mean,
        running_var,
        residual,
        training,
        momentum,
        eps,
        relu,
        upper,
        min_val,
        max_val,
        scale,
        zero_point,
        averaging_constant,
        symmetric,
        quant_min,
        quant_max,
    )
