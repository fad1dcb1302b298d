"""Neighbouring layers of a QAT graph that run as one operator.

Each function takes the modules that it stands for, computes what calling them one after the other
computes, and does call them where they are not what the operator knows (a replaced module, a
forward hook, another device).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qtoolkit import ops
from qtoolkit.fake_quantize import ObservedFakeQuantize
from qtoolkit.nn import functional
from qtoolkit.nn.qat.batch_norm import BatchNorm1d, BatchNorm2d
from qtoolkit.observers.moving_average import MovingAverageMinMaxObserver


def _leaf(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps a call as one node where a graph is traced again, as happens when it is unpickled."""

    @functools.wraps(function)
    def call(x: Any, *args: Any) -> Any:
        if isinstance(x, fx.Proxy):
            return x.tracer.create_proxy("call_function", call, (x, *args), {})
        return function(x, *args)

    return call


def _is(module: nn.Module | None, *kinds: type) -> bool:
    """True if a module is of exactly one of these classes and nothing watches its calls."""
    return type(module) in kinds and not (
        module._forward_hooks  # type: ignore[union-attr]
        or module._forward_pre_hooks  # type: ignore[union-attr]
        or module._backward_hooks  # type: ignore[union-attr]
        or module._backward_pre_hooks  # type: ignore[union-attr]
    )


@_leaf
def batch_norm_act(
    x: Tensor,
    residual: Tensor | None,
    batch_norm: nn.Module,
    add: nn.Module | None,
    relu: nn.Module | None,
    fake_quant: nn.Module | None,
) -> Tensor:
    """``fake_quant(relu(add(batch_norm(x), residual)))``; what is None is left out."""
    if not _has_operator(x, residual, batch_norm, add, relu):
        y = batch_norm(x)
        y = y if add is None else add(y, residual)
        y = y if relu is None else relu(y)
        return y if fake_quant is None else fake_quant(y)
    y, quantized = _run(x, residual, batch_norm, relu, fake_quant)
    return y if quantized or fake_quant is None else fake_quant(y)


def _has_operator(
    x: Tensor,
    residual: Tensor | None,
    batch_norm: nn.Module,
    add: nn.Module | None,
    relu: nn.Module | None,
) -> bool:
    return (
        _is(batch_norm, BatchNorm1d, BatchNorm2d)
        and (add is None or _is(add, functional.Add))
        and (relu is None or _is(relu, nn.ReLU, nn.ReLU6, nn.Hardtanh))
        and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
        and _has_float32_state(batch_norm)
        and x.device.type == "cpu"
        and x.dim() == (2 if isinstance(batch_norm, BatchNorm1d) else 4)
        and x.numel() > x.size(1)
    )


def _has_float32_state(batch_norm: Any) -> bool:
    """False after ``model.bfloat16()``, which changes the statistics too."""
    state = (batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var)
    return all(tensor is None or tensor.dtype == torch.float32 for tensor in state)


def _run(
    x: Tensor,
    residual: Tensor | None,
    batch_norm: Any,
    relu: nn.Module | None,
    fake_quant: nn.Module | None,
) -> tuple[Tensor, bool]:
    """The result of the operator, and whether fake-quantization was part of it."""
    training = batch_norm.training or batch_norm.running_mean is None
    momentum = 0.0
    if batch_norm.training and batch_norm.track_running_stats:
        batch_norm.num_batches_tracked.add_(1)
        momentum = batch_norm.momentum
        if momentum is None:  # the mean over all batches
            momentum = 1.0 / float(batch_norm.num_batches_tracked)
    keeps_statistics = not batch_norm.training or batch_norm.track_running_stats
    options = (
        x,
        batch_norm.weight,
        batch_norm.bias,
        batch_norm.running_mean if keeps_statistics else None,
        batch_norm.running_var if keeps_statistics else None,
        residual,
        training,
        momentum,
        batch_norm.eps,
        relu is not None,
        float(relu.max_val) if isinstance(relu, nn.Hardtanh) else None,
    )
    if not isinstance(fake_quant, ObservedFakeQuantize) or not _is_moving_average(fake_quant):
        return ops.batch_norm_act(*options)[0], False
    observer, spec = fake_quant.observer, fake_quant.spec
    assert isinstance(observer, MovingAverageMinMaxObserver)
    observes = fake_quant.follows_data() and observer.enabled
    if not observes:
        fake_quant.check_ready()
    y, mean, *_ = ops.batch_norm_act(
        *options,
        observer.min_val if observes else None,
        observer.max_val if observes else None,
        fake_quant.scale,
        fake_quant.zero_point,
        observer.averaging_constant if observes else 0.0,
        spec.symmetric,
        spec.quant_min,
        spec.quant_max,
    )
    if observes:
        observer._checked(mean, mean)  # says so if the operator has skipped the batch
        fake_quant.note_measured()
    return y, True


def _is_moving_average(fake_quant: ObservedFakeQuantize) -> bool:
    """True where the range is a moving average, and values are rounded to it."""
    return (
        _is(fake_quant, ObservedFakeQuantize)
        and _is(fake_quant.observer, MovingAverageMinMaxObserver)
        and fake_quant.spec.granularity == "per_tensor"
        and fake_quant.fake_quantizing
        and fake_quant.on_nonfinite == "skip"  # as the operator does
    )


@_leaf
def max_pool2d(x: Tensor, pool: Any) -> Tensor:
    """``pool(x)``, an ``nn.MaxPool2d`` without indices."""
    if not _is(pool, nn.MaxPool2d) or not _is_plain_float(x) or not torch.is_grad_enabled():
        return pool(x)
    kernel_size, stride, padding, dilation = (
        _pair(getattr(pool, name)) for name in ("kernel_size", "stride", "padding", "dilation")
    )
    if kernel_size[0] * kernel_size[1] > 256 or pool.return_indices:
        return pool(x)
    return ops.max_pool2d_train(x, kernel_size, stride, padding, dilation, pool.ceil_mode)


def _is_plain_float(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4


def _pair(value: Any) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


@_leaf
def contiguous(x: Tensor) -> Tensor:
    """x as user code knows it: inside a QAT graph images are channels_last."""
    return x.contiguous()
