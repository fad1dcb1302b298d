"""Range of all data, one for the whole tensor."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("minmax")
class MinMaxObserver(Observer):
    """Covers the least and greatest value of all tensors seen."""

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="minmax")

    def observe(self, x: Tensor) -> None:
        """Widens the range to x."""
        min_val, max_val = self._checked(*ops.min_max(x))
        self.min_val.copy_(torch.minimum(self.min_val, min_val))
        self.max_val.copy_(torch.maximum(self.max_val, max_val))
