"""Range of each group of neighbouring values."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("per_group_minmax")
class PerGroupMinMaxObserver(Observer):
    """Covers the least and greatest value of each group along the last axis of all tensors seen.

    The bounds are [*x.shape[:-1], groups]; the last group of a row may be short.
    """

    granularities = ("per_group",)
    resizable = ("min_val", "max_val")

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """int4, symmetric, groups of 32."""
        return TensorSpec("int4", "per_group", 0, 32, True, "per_group_minmax")

    def observe(self, x: Tensor) -> None:
        """Widens each group's range to x.

        Raises:
            ValueError: x has another shape than the tensors before.
        """
        size = self.spec.group_size
        assert size is not None
        groups = -(-x.shape[-1] // size)
        # A short group is filled up with its last value.
        missing = groups * size - x.shape[-1]
        filled = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], missing)], -1)
        bounds = torch.aminmax(filled.unflatten(-1, (groups, size)), dim=-1)
        min_val, max_val = self._checked(bounds.min, bounds.max)
        if self.min_val.numel() == 0:
            self.min_val.resize_(min_val.shape).copy_(min_val)
            self.max_val.resize_(max_val.shape).copy_(max_val)
            return
        if min_val.shape != self.min_val.shape:
            raise ValueError(
                f"observer{self._for_name()}: got groups of shape {tuple(min_val.shape)} where "
                f"earlier tensors had {tuple(self.min_val.shape)}"
            )
        self.min_val.copy_(torch.minimum(self.min_val, min_val))
        self.max_val.copy_(torch.maximum(self.max_val, max_val))
