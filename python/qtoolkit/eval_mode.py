"""Evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """Sets a model to evaluation mode, and each of its modules back to its own mode at the end.

    What is no module, such as a function, has no mode.
    """
    if not isinstance(model, nn.Module):
        yield
        return
    # A frozen TorchScript module has no mode.
    modes = [(module, module.training) for module in model.modules() if hasattr(module, "training")]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
