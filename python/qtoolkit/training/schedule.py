"""When ranges are observed, values rounded and statistics frozen in the course of a training."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from qtoolkit.training.control import (
    disable_fake_quant,
    enable_fake_quant,
    freeze_bn,
    freeze_observers,
    qat_models,
)


@dataclass
class QATSchedule:
    """Switches a QAT model at given training steps.

    Steps count from 0. At each of the steps given here, before its forward pass:

    Args:
        start_observers: ranges begin to follow the data.
        start_fake_quant: values begin to be rounded; before, the model trains in float.
        freeze_bn: batch norms begin to use their running statistics; None: never.
        freeze_observers: ranges stay as they are; None: never.

    What holds at a step depends on that step alone, so training may resume anywhere. The model is
    only touched where that changes: what else you switch stays until the next such step.

    Three ways to use it:

        schedule(model, step)            # your own count
        schedule.step(model)             # its count, in state_dict() and load_state_dict()
        Trainer(..., callbacks=[schedule.transformers_callback()])  # or lightning_callback()

    Raises:
        TypeError: a step is not an int.
        ValueError: a step is negative, or they are out of order: values cannot be rounded before
            their ranges are observed, nor ranges frozen.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference: A
    whitepaper", 2018, sections 3.2.2 (freezing batch norms) and 6.2 (delayed quantization).
    """

    start_observers: int = 0
    start_fake_quant: int = 0
    freeze_bn: int | None = None
    freeze_observers: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            step, optional = getattr(self, field.name), field.default is None
            if step is None and optional:
                continue
            if not isinstance(step, int) or isinstance(step, bool):
                wanted = "an int or None" if optional else "an int"
                raise TypeError(f"QATSchedule: {field.name} must be {wanted}, got {step!r}")
            if step < 0:
                raise ValueError(f"QATSchedule: {field.name} is {step}, but steps count from 0")
        if self.start_fake_quant < self.start_observers:
            raise ValueError(
                f"QATSchedule: start_fake_quant={self.start_fake_quant} comes before "
                f"start_observers={self.start_observers}, so there would be no ranges to round to"
            )
        if self.freeze_observers is not None and self.freeze_observers <= self.start_observers:
            raise ValueError(
                f"QATSchedule: freeze_observers={self.freeze_observers} must come after "
                f"start_observers={self.start_observers}, or ranges are frozen without any data"
            )
        self._count = 0
        self._reached: tuple[Callable[[], nn.Module | None], dict[str, bool]] | None = None

    def __call__(self, model: nn.Module, step: int) -> None:
        """Puts the model into the state of a step; call it before the step's forward pass.

        Args:
            model: the result of ``prepare_qat``, or what holds it.
            step: from 0.

        Raises:
            ValueError: the step is negative, or the model no QAT model.
        """
        if step < 0:
            raise ValueError(f"QATSchedule: steps count from 0, got {step}")
        wanted = {
            "observe": self.start_observers <= step and not _reached(self.freeze_observers, step),
            "fake_quantize": self.start_fake_quant <= step,
        }
        if self.freeze_bn is not None:
            wanted["freeze_bn"] = step >= self.freeze_bn
        done: dict[str, bool] = {}
        if self._reached is not None and self._reached[0]() is model:
            done = self._reached[1]
        if wanted == done:
            return
        qat_models(model, "QATSchedule")
        if wanted["observe"] != done.get("observe"):
            freeze_observers(model, frozen=not wanted["observe"])
        if wanted["fake_quantize"] != done.get("fake_quantize"):
            (enable_fake_quant if wanted["fake_quantize"] else disable_fake_quant)(model)
        if "freeze_bn" in wanted and wanted["freeze_bn"] != done.get("freeze_bn"):
            freeze_bn(model, frozen=wanted["freeze_bn"])
        self._reached = (weakref.ref(model), wanted)

    def step(self, model: nn.Module) -> None:
        """``self(model, n)`` at its n-th call, counted from 0."""
        self(model, self._count)
        self._count += 1

    def state_dict(self) -> dict[str, int]:
        """The count of ``step``, for a checkpoint."""
        return {"step": self._count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues the count of ``step`` where the checkpoint was written."""
        self._count = int(state["step"])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reached": None}  # a weak reference has no pickle

    def transformers_callback(self) -> Any:
        """A ``transformers.TrainerCallback`` that follows this schedule in optimizer steps.

        Raises:
            ImportError: transformers is not installed.
        """
        try:
            from transformers import TrainerCallback
        except ImportError as error:
            raise ImportError(
                "QATSchedule.transformers_callback needs transformers: pip install transformers"
            ) from error
        schedule = self

        class QATCallback(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                schedule(kwargs["model"], state.global_step)

        return QATCallback()

    def lightning_callback(self) -> Any:
        """A Lightning ``Callback`` that follows this schedule in optimizer steps
        (``trainer.global_step``).

        It is one of ``lightning`` or of ``pytorch_lightning``: of what is imported already, else of
        what is installed.

        Raises:
            ImportError: neither is installed.
        """
        schedule = self

        class QATCallback(*_lightning_callbacks()):  # type: ignore[misc]
            def on_train_batch_start(
                self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int
            ) -> None:
                schedule(pl_module, trainer.global_step)

        return QATCallback()


def _reached(point: int | None, step: int) -> bool:
    return point is not None and step >= point


def _lightning_callbacks() -> list[type]:
    """The base classes of a callback that the Lightning in use takes for its own."""
    packages = ("lightning.pytorch", "pytorch_lightning")
    imported = [sys.modules[name].Callback for name in packages if sys.modules.get(name)]
    if imported:
        return imported
    try:
        from lightning.pytorch import Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback
        except ImportError as error:
            raise ImportError(
                "QATSchedule.lightning_callback needs Lightning: pip install lightning"
            ) from error
    return [Callback]
