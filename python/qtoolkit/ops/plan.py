"""Plans: whole networks as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: The types of a plan's inputs and outputs, by the number that the engine gives them.
_DTYPES = (torch.float32, torch.uint8, torch.int8)


def make_plan(state: tuple[Any, ...]) -> Any:
    """A plan from its parts, as ``plan.state()`` gives them; see ``csrc/engine/torch``.

    Raises:
        ValueError: anything in it is wrong; says what.
    """
    return torch.classes.qtoolkit.Plan(state)


def load_plan(path: str) -> Any:
    """A plan from a file that ``plan.save(path)`` wrote; see ``csrc/engine/plan_file.h``.

    Raises:
        RuntimeError: the file cannot be read.
        ValueError: the file is damaged, or of a newer version.
    """
    return torch.classes.qtoolkit.Plan.load(path)


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


@torch._library.register_fake_class("qtoolkit::Plan")
class _TracedPlan:
    """Stands for a plan while torch.export and torch.compile trace; only ``run_plan`` takes it."""

    def __init__(self, identity: str) -> None:
        self.identity = identity

    @classmethod
    def __obj_unflatten__(cls, flattened: tuple[tuple[str, str], ...]) -> _TracedPlan:
        return cls(**dict(flattened))

    def _untraceable(self, *_: Any) -> Any:
        raise NotImplementedError("only run_plan of a plan can be traced")

    tune = report = outputs = state = instances = _untraceable


@torch.library.register_fake("qtoolkit::run_plan")
def _run_plan_fake(plan: Any, inputs: list[Tensor]) -> list[Tensor]:
    # The batch may be unknown. No other size depends on it, nor does a stride, so 1 takes its
    # place; the sizes of an image become those of the trace.
    batch = inputs[0].shape[0]
    described = []
    for i, x in enumerate(inputs):
        if x.shape[0] != batch:
            raise ValueError(
                f"qtoolkit::run_plan: input {i} has {x.shape[0]} images, input 0 has {batch}"
            )
        dtype = _DTYPES.index(x.dtype) if x.dtype in _DTYPES else -1
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
        images = batch if isinstance(batch, int) else 1
        described.append([dtype, int(last), images, *(int(size) for size in x.shape[1:])])
    real: Any = plan if isinstance(plan, torch.ScriptObject) else plan.real_obj
    return [
        torch.empty(
            (batch, *sizes),
            dtype=_DTYPES[dtype],
            device=inputs[0].device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for dtype, last, _, *sizes in real.outputs(described)
    ]
