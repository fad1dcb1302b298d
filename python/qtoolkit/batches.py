"""A model's inputs from what a loader gives."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.graph.report import model_inputs
from qtoolkit.progress import batch_bar


def input_batches(
    loader: Iterable[Any],
    model: nn.Module,
    function: str,
    *,
    inputs: int | None = None,
    max_batches: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Any, ...]]:
    """The positional inputs of the model, batch by batch, on the model's device.

    Args:
        loader: tensors; tuples that begin with the inputs, such as ``(input, label)``; or dicts
            whose keys are arguments of ``model.forward`` (others, such as a label, are left out).
        model: whose inputs they are.
        function: the caller, for errors and the progress bar.
        inputs: how many inputs the model takes; None: the first alone, of a dict all that
            ``forward`` knows.
        max_batches: stop after so many.
        progress: show a progress bar.

    Raises:
        ValueError: the loader is empty, or a batch holds NaN or infinite values; says which.
        TypeError: a batch of another kind, a loader that is none, or a model that is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function} needs a torch.nn.Module, got {type(model).__name__}")
    tensors = (*model.parameters(), *model.buffers())
    device = tensors[0].device if tensors else None
    index = -1
    for index, batch in enumerate(batch_bar(loader, max_batches, function, progress=progress)):
        values = (
            _from_dict(batch, model)
            if isinstance(batch, Mapping)
            else model_inputs(batch, inputs or 1)
        )
        _check_finite(values, f"{function}: batch {index}")
        yield tuple(v.to(device) if isinstance(v, Tensor) else v for v in values)
    if index < 0:
        raise ValueError(f"{function} got no data: the loader is empty")


def gather_batches(
    loader: Iterable[Any],
    model: nn.Module,
    function: str,
    example_inputs: Any,
    max_batches: int | None,
    *,
    progress: bool,
) -> tuple[tuple[Any, ...], list[tuple[Any, ...]]]:
    """Example inputs for ``prepare`` (the first batch where none are given), and all batches.

    Raises:
        ValueError, TypeError: as ``input_batches``.
    """
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    batches = list(
        input_batches(
            loader,
            model,
            function,
            inputs=None if example_inputs is None else len(example_inputs),
            max_batches=max_batches,
            progress=progress,
        )
    )
    return batches[0] if example_inputs is None else tuple(example_inputs), batches


def dict_inputs(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """What of a dict is an argument of ``forward``; a label, for example, is not.

    Raises:
        TypeError: nothing is.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    known = {key: value for key, value in batch.items() if takes_all or key in parameters}
    if not known:
        raise TypeError(
            f"a batch is a dict with the keys {list(batch)}, of which forward takes none: its "
            f"arguments are {list(parameters)}"
        )
    return known


def _from_dict(batch: Mapping[str, Any], model: nn.Module) -> tuple[Any, ...]:
    """The arguments by position, defaults filled in where one that is absent comes before."""
    parameters = inspect.signature(model.forward).parameters
    known = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    dict_inputs(batch, model)
    given = [i for i, p in enumerate(known) if p.name in batch]
    values = []
    for p in known[: given[-1] + 1]:
        if p.name not in batch and p.default is p.empty:
            raise TypeError(f"a batch is a dict without {p.name!r}, which forward needs")
        values.append(batch.get(p.name, p.default))
    return tuple(values)


def _check_finite(values: tuple[Any, ...], where: str) -> None:
    """Infinities may stand in what follows the first input, such as a mask."""
    for i, value in enumerate(values):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            continue
        bad = value.isnan() if i else ~torch.isfinite(value)
        if bool(bad.any()):
            raise ValueError(
                f"{where} holds {int(bad.sum())} NaN or infinite values in input {i} of shape "
                f"{tuple(value.shape)}; check the data and its normalization"
            )
