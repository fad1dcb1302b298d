"""Fake quantization with the range that an observer finds."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.fake_quantize.measured import MeasuredFakeQuantize
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.observers import MovingAverageMinMaxObserver, Observer
from qtoolkit.qconfig import TensorSpec

# Relative difference of scales that are of one range: averages are rounded.
_SAME_SCALE = 1e-3


@register_fake_quantize("observed")
class ObservedFakeQuantize(MeasuredFakeQuantize):
    """Uniform quantization in the range that `spec.observer` finds; gradients pass straight.

    Per group, a weight is divided into groups of `spec.group_size` along its flattened input
    dimensions, [output channels, -1], with the buffers [output channels, groups].

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", 2018; Bengio et al., "Estimating or Propagating Gradients
    Through Stochastic Neurons for Conditional Computation", 2013 (straight-through gradients).
    """

    granularities = ("per_tensor", "per_channel", "per_group")

    @classmethod
    def uses_observer(cls, spec: TensorSpec) -> bool:
        """Always."""
        return True

    def forward(self, x: Tensor) -> Tensor:
        """As in the base class; a moving average is moved by the operator that then quantizes."""
        observer = self.observer
        if not (
            type(observer) is MovingAverageMinMaxObserver
            and self.follows_data()
            and self.fake_quantizing
            and self.on_nonfinite == "skip"  # as the operator does
            and not self.is_weight
            and observer.enabled
            and self.spec.granularity == "per_tensor"
            and isinstance(x, Tensor)
            and x.numel() > 0
        ):
            return super().forward(x)
        spec = self.spec
        reads = x.device.type == "cpu" and not torch.compiler.is_compiling()
        before = (observer.min_val.item(), observer.max_val.item()) if reads else None
        y = ops.observe_fake_quantize(
            x,
            observer.min_val,
            observer.max_val,
            self.scale,
            self.zero_point,
            observer.averaging_constant,
            spec.quant_min,
            spec.quant_max,
            spec.symmetric,
        )
        self.note_measured()
        if reads and before == (observer.min_val.item(), observer.max_val.item()):
            observer.check_batch(x)  # it was skipped, or happens to have the same range
        return y

    @torch.no_grad()
    def train(self, mode: bool = True) -> ObservedFakeQuantize:
        """Sets the mode.

        An average of models (`torch.optim.swa_utils.AveragedModel` with `use_buffers`) truncates
        its int32 zero points at each step, so in evaluation they are derived anew from the range,
        which is float, where that belongs to the scale.
        """
        super().train(mode)
        if not mode and self._derives_zero_point():
            assert self.observer is not None
            scale, zero_point = self.observer.calculate_qparams_unchecked()
            same = (scale - self.scale).abs() <= _SAME_SCALE * scale
            self.zero_point.copy_(torch.where(same, zero_point, self.zero_point))
        return self

    def _derives_zero_point(self) -> bool:
        # A range that is searched in a histogram is not a function of two averaged numbers.
        observer = self.observer
        assert observer is not None
        searched = type(observer).value_range is not Observer.value_range
        return not (self.spec.symmetric or self.is_weight or searched)

    def _measure(self, x: Tensor) -> tuple[Tensor, ...]:
        assert self.observer is not None
        self.show_observer(self._grouped(x))
        return self.observer.calculate_qparams_unchecked()

    def _grouped(self, x: Tensor) -> Tensor:
        return x.flatten(1) if self.spec.granularity == "per_group" else x

    def _quantize(self, x: Tensor, *parameters: Tensor) -> Tensor:
        scale, zero_point = parameters
        spec = self.spec
        if spec.granularity == "per_tensor":
            return ops.fake_quantize_per_tensor(
                x, scale, zero_point, spec.quant_min, spec.quant_max
            )
        if spec.granularity == "per_channel":
            return ops.fake_quantize_per_channel(
                x, scale, zero_point, spec.axis, spec.quant_min, spec.quant_max
            )
        assert spec.group_size is not None
        grouped = self._grouped(x)
        y = ops.fake_quantize_per_group(
            grouped, scale, zero_point, spec.group_size, spec.quant_min, spec.quant_max
        )
        return y.reshape(x.shape)
