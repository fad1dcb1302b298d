"""Moving average of the ranges of batches, for training."""

from __future__ import annotations

import torch
from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers.base import Observer
from qtoolkit.observers.registry import register_observer
from qtoolkit.qconfig import TensorSpec


@register_observer("moving_average")
class MovingAverageMinMaxObserver(Observer):
    """Averages the least and greatest value of each batch exponentially.

    The first batch sets the range; each later one moves it by `averaging_constant` of the
    difference. One so far away that the average would overflow changes nothing.

    Args:
        spec: how the tensor is quantized.
        averaging_constant: weight of the newest batch, above 0 and at most 1.
        name: the module that the tensor belongs to.
    """

    options = ("averaging_constant",)

    def __init__(
        self,
        spec: TensorSpec | None = None,
        *,
        averaging_constant: float = 0.01,
        name: str = "",
    ) -> None:
        super().__init__(spec, name=name)
        if not 0.0 < averaging_constant <= 1.0:
            raise ValueError(
                f"averaging_constant must be above 0 and at most 1, got {averaging_constant}"
            )
        self.averaging_constant = averaging_constant

    @classmethod
    def default_spec(cls) -> TensorSpec:
        """uint8, affine."""
        return TensorSpec(observer="moving_average")

    def observe(self, x: Tensor) -> None:
        """Moves the range towards that of x."""
        min_val, max_val = self._checked(*ops.min_max(x))
        # Chosen on the device, as a branch on the state would wait for it.
        first = self.min_val == float("inf")
        skipped = (min_val == float("inf")) & (max_val == float("-inf"))
        states = (self.min_val, self.max_val)
        averages = [
            torch.where(first, batch, running + self.averaging_constant * (batch - running))
            for running, batch in zip(states, (min_val, max_val))
        ]
        # A batch so far away that the average overflows changes nothing.
        skipped = skipped | ~(averages[0].isfinite() & averages[1].isfinite())
        for running, average in zip(states, averages):
            running.copy_(torch.where(skipped, running, average))

    @classmethod
    def merge_states(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of the averages of those ranks that saw data."""
        unseen = state["min_val"] > state["max_val"]
        count = (~unseen).sum(0)
        return {
            name: torch.where(
                count == 0, values[0], values.double().masked_fill(unseen, 0).sum(0) / count
            ).to(values.dtype)
            for name, values in state.items()
        }

    def check_batch(self, x: Tensor) -> None:
        """Does what `on_nonfinite` says if x holds NaN or Inf; observes nothing."""
        self._checked(*ops.min_max(x.detach()))
