"""Range of each group of neighbouring values."""

from __future__ import annotations

from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("per_group_minmax")
class PerGroupMinMaxObserver(Observer):
    """Covers the least and greatest value of each group along one axis of all tensors seen.

    The bounds have the tensors' shape with the number of groups along the axis; the last group may
    be short.

    Args:
        spec: how the tensor is quantized; `spec.group_size` values form a group.
        axis: the dimension along which they are neighbours.
        name: the module that the tensor belongs to.
    """

    granularities = ("per_group",)
    resizable = ("min_val", "max_val")
    options = ("axis",)

    def __init__(self, spec: TensorSpec | None = None, *, axis: int = -1, name: str = "") -> None:
        super().__init__(spec, name=name)
        self.axis = axis

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """int4, symmetric, groups of 32."""
        return TensorSpec("int4", "per_group", 0, 32, True, "per_group_minmax")

    def observe(self, x: Tensor) -> None:
        """Widens each group's range to x.

        Raises:
            ValueError: x has no such axis, or another shape than the tensors before.
        """
        size = self.spec.group_size
        assert size is not None
        if not -x.dim() <= self.axis < x.dim():
            raise ValueError(
                f"observer{self._for_name()}: axis {self.axis} is out of range for a tensor of "
                f"shape {tuple(x.shape)}"
            )
        min_val, max_val = self._checked(*ops.min_max_per_group(x, size, self.axis))
        self._widen_each(min_val, max_val, "groups of shape")
