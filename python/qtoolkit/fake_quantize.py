"""FakeQuantize: quantizes and dequantizes in float, for training with quantization."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers import make_observer
from qtoolkit.observers.state import QuantizationState
from qtoolkit.qconfig import TensorSpec


class FakeQuantize(QuantizationState):
    """Rounds a tensor to the values that its quantized form can hold; gradients pass straight.

    An activation is observed in training mode, unless frozen, and quantized with the range known
    then. A weight's range is a function of the weight: it is taken anew from the tensor at every
    call, in eval mode too, unless frozen.

    Computes in float32 and returns x's dtype.

    Args:
        spec: how the tensor is quantized.
        name: the module that the tensor belongs to, for error messages.
        is_weight: whether the tensor is a weight; per-channel tensors are, when not given.

    Attributes:
        observer: the observer that `spec` names.
        scale, zero_point: buffers, float32 and int32, 0-dim per tensor and [channels] per channel.
        observing: False while frozen.
        fake_quantizing: False while tensors pass through unchanged.
        ready: whether scale and zero point hold values from data.
        The three flags are saved in the state dict.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018; Bengio et al., "Estimating or Propagating Gradients
    Through Stochastic Neurons for Conditional Computation", 2013 (straight-through gradients).
    """

    flags = ("observing", "fake_quantizing", "ready")
    resizable = ("scale", "zero_point")

    scale: Tensor
    zero_point: Tensor

    def __init__(self, spec: TensorSpec, name: str = "", *, is_weight: bool | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.observer = make_observer(spec, name)
        self.is_weight = spec.granularity != "per_tensor" if is_weight is None else is_weight
        self.observing = True
        self.fake_quantizing = True
        self.ready = False
        shape = () if spec.granularity == "per_tensor" else (0,)
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.int32))

    @property
    def name(self) -> str:
        """The module that the tensor belongs to."""
        return self.observer.name

    @name.setter
    def name(self, value: str) -> None:
        self.observer.name = value

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantizes x, a floating-point tensor of any shape; returns its shape and dtype.

        Raises:
            RuntimeError: an activation that was never observed is used in eval mode or frozen.
            TypeError, ValueError: the observer's, for a tensor that cannot be observed.
        """
        scale, zero_point = self.scale, self.zero_point
        if self.observing and (self.training or self.is_weight):
            # The new tensors are used, not the buffers: those change in place at the next call,
            # which may come before the gradient of this one.
            scale, zero_point = self._observe(x)
        if not self.fake_quantizing:
            return x
        self._check_ready()
        value = x.to(torch.float32)
        spec = self.spec
        if spec.granularity == "per_tensor":
            y = ops.fake_quantize_per_tensor(
                value, scale, zero_point, spec.quant_min, spec.quant_max
            )
        else:
            y = ops.fake_quantize_per_channel(
                value, scale, zero_point, spec.axis, spec.quant_min, spec.quant_max
            )
        return y.to(x.dtype)

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point that the last call used.

        Raises:
            RuntimeError: nothing has been observed.
            ValueError: the data held NaN or Inf.
        """
        self._check_ready()
        self.observer.check_finite(self.scale, self.zero_point)
        return self.scale, self.zero_point

    def freeze(self) -> None:
        """Keeps scale and zero point as they are from now on."""
        self.observing = False

    def unfreeze(self) -> None:
        """Lets scale and zero point follow the data again."""
        self.observing = True

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Switches quantization on, or off: then tensors are observed and pass unchanged."""
        self.fake_quantizing = enabled

    def extra_repr(self) -> str:
        """Shows what is quantized, and the flags that differ from their defaults."""
        parts = [self.spec.format, self.spec.granularity]
        if self.is_weight:
            parts.append("weight")
        if not self.observing:
            parts.append("frozen")
        if not self.fake_quantizing:
            parts.append("fake quantization off")
        return ", ".join(parts)

    @torch.no_grad()
    def _observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_weight:
            self.observer.reset()
        self.observer(x)
        scale, zero_point = self.observer.calculate_qparams_unchecked()
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.ready = True
        return scale, zero_point

    def _check_ready(self) -> None:
        if not self.ready:
            of = f" of {self.name!r}" if self.name else ""
            raise RuntimeError(
                f"FakeQuantize{of} has seen no data: run a batch in training mode (model.train()), "
                "or qt.calibrate(prepared, loader), or load a checkpoint of the prepared model"
            )
