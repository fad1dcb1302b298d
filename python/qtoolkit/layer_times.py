"""How long the layers of a model take, each by itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def wait_for(values: Any) -> None:
    """Returns when the tensors among the values are computed: CUDA computes later than it is asked
    to. Nested tuples, lists and dicts are looked into."""
    if isinstance(values, Tensor):
        if values.is_cuda:
            torch.cuda.synchronize(values.device)
    elif isinstance(values, dict):
        wait_for(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            wait_for(value)


@contextmanager
def timed_calls(
    layers: Iterable[nn.Module], took: Callable[[nn.Module, float], None]
) -> Iterator[None]:
    """Tells how many milliseconds each call of some modules took, until the block ends.

    Args:
        layers: the modules.
        took: called after each call of one of them, with the module and the time.
    """
    started: dict[nn.Module, float] = {}

    def before(layer: nn.Module, inputs: Any) -> None:
        wait_for(inputs)
        started[layer] = time.perf_counter()

    def after(layer: nn.Module, _: Any, output: Any) -> None:
        wait_for(output)
        took(layer, (time.perf_counter() - started[layer]) * 1e3)

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(before).remove)
            stack.callback(layer.register_forward_hook(after).remove)
        yield
