"""LSQ+: learned scale and zero point."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.fake_quantize.learned import has_zero_point
from qtoolkit.fake_quantize.lsq import LSQFakeQuantize
from qtoolkit.fake_quantize.measured import over_channels
from qtoolkit.fake_quantize.registry import register_fake_quantize
from qtoolkit.qconfig import TensorSpec


@register_fake_quantize("lsq+")
class LSQPlusFakeQuantize(LSQFakeQuantize):
    """LSQ with a learned zero point for affine activations.

    An activation's parameters begin with what `spec.observer` finds in the first batch
    ("histogram": the range of least squared error, as in the paper). A weight, and a symmetric
    activation, has zero point 0; a weight's scale begins as
    max(|mean - 3 std|, |mean + 3 std|) / 2^(bits - 1).

    The zero point used is the nearest integer to the learned one, so that convert is exact.

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and
    better initialization", 2020, sections 3.1 and 3.2.
    """

    @property
    def learns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The scale, and the zero point where there is one."""
        return ("scale",) if self.zero_point is None else ("scale", "zero_point")

    @classmethod
    def uses_observer(cls, spec: TensorSpec) -> bool:
        """In activations, which are per tensor."""
        return spec.granularity == "per_tensor"

    def _make_zero_point(self) -> None:
        shifts = has_zero_point(self.spec, self.is_weight)
        self.zero_point = torch.nn.Parameter(torch.zeros(1)) if shifts else None

    def _known(self) -> tuple[Tensor, ...]:
        return super(LSQFakeQuantize, self)._known()

    def _begin(self, x: Tensor) -> None:
        if not self.is_weight:
            assert self.observer is not None
            self.observer.reset()
            self.observer(x)
            scale, zero_point = self.observer.calculate_qparams()
            self._set_scale(scale)
            if self.zero_point is not None:
                self._set("zero_point", zero_point)
            return
        deviation, mean = torch.std_mean(over_channels(x, self.spec), 1, correction=0)
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        self._set_scale(reach / (self.spec.quant_max + 1))
