"""Plans: whole networks as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def make_plan(state: tuple[Any, ...]) -> Any:
    """A plan from its parts, as ``plan.state()`` gives them; see ``csrc/engine/torch``.

    Raises:
        ValueError: anything in it is wrong; says what.
    """
    return torch.classes.qtoolkit.Plan(state)


def run_plan(plan: Any, inputs: list[Tensor]) -> list[Tensor]:
    """The outputs of a plan.

    Args:
        plan: made by ``qt.compile``.
        inputs: dense CPU tensors of one batch size; of rank 4 contiguous or channels_last.

    Returns:
        The outputs; of rank 4 channels_last.

    Raises:
        TypeError: an input has another dtype than the plan was made for.
        ValueError: an input's rank, shape or the number of inputs does not fit.
    """
    return torch.ops.qtoolkit.run_plan(plan, inputs)
