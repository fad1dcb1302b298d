"""Batches and other items with a progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm


def batch_bar(
    loader: Iterable[Any], max_batches: int | None, description: str, *, progress: bool
) -> tqdm:
    """The first batches of a loader, with a bar that knows how many there are if the loader does.

    Raises:
        ValueError: ``max_batches`` is below 1.
        TypeError: the loader is one tensor, whose samples would pass for batches, or no iterable.
    """
    iterable = hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    if isinstance(loader, Tensor) or not iterable:
        what = f"a tensor of {tuple(loader.shape)}" if isinstance(loader, Tensor) else repr(loader)
        raise TypeError(
            f"{description} needs a loader: an iterable of batches, such as a DataLoader or "
            f"[batch]; got {what}"
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"{description}: max_batches must be at least 1, got {max_batches}")
    return tqdm(
        itertools.islice(loader, max_batches),
        total=_batch_count(loader, max_batches),
        desc=description,
        disable=not progress,
    )


def progress_bar(
    items: Iterable[Any], description: str, *, progress: bool, total: int | None = None
) -> tqdm:
    """Items with a bar; ``total`` says how many there are where ``items`` has no length."""
    return tqdm(items, desc=description, disable=not progress, total=total)


def _batch_count(loader: Iterable[Any], max_batches: int | None) -> int | None:
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:  # an iterator, or a loader over a stream
        return max_batches
    return count if max_batches is None else min(count, max_batches)
