"""Accuracy and size of a model, float or quantized."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.eval_mode import eval_mode
from qtoolkit.progress import batch_bar

Metric = Callable[[Any, Any], Tensor | float]


def _top_k(k: int, output: Tensor, label: Tensor) -> Tensor:
    """Whether each sample's label is among its k highest classes: bool [N]."""
    if not isinstance(output, Tensor) or output.dim() != 2:
        what = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output)
        raise TypeError(
            f"evaluate: metric top{k} needs model outputs of shape [N, classes], got {what}; "
            "pass a callable metric(output, label)"
        )
    if output.shape[1] < k:
        raise ValueError(f"evaluate: metric top{k} needs {k} classes, got {output.shape[1]}")
    if not isinstance(label, Tensor) or label.shape != output.shape[:1]:
        what = f"shape {tuple(label.shape)}" if isinstance(label, Tensor) else type(label)
        raise TypeError(
            f"evaluate: metric top{k} needs labels of shape [{output.shape[0]}], got {what}"
        )
    if bool(output.isnan().any()):
        raise ValueError("evaluate: the model gave NaN; check its weights and the input data")
    return (output.topk(k, dim=1).indices == label.unsqueeze(1)).any(dim=1)


_METRICS: dict[str, Metric] = {
    "top1": lambda output, label: _top_k(1, output, label),
    "top5": lambda output, label: _top_k(5, output, label),
}


def evaluate(
    model: Callable[[Any], Any],
    loader: Iterable[Any],
    metric: str | Metric = "top1",
    max_batches: int | None = None,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> float:
    """The mean score of a model on labelled data.

    The model runs in eval mode without gradients; every submodule has its own mode back afterwards.

    Args:
        model: a module (float, prepared, quantized, scripted) or another callable.
        loader: gives batches (input, label) with N samples in the first dimension of both.
        metric: "top1" or "top5" accuracy, or metric(output, label) that returns a score for each
            sample ([N], in [0, 1]) or the batch's mean score.
        max_batches: stop after this many batches.
        progress: show a progress bar.
        device: where batches are moved to; the model's own device when absent.

    Returns:
        The mean over all samples, in [0, 1].

    Raises:
        ValueError: an unknown metric, a max_batches below 1, no batch in the loader, or fewer
            classes than the metric needs; or the model gives NaN.
        TypeError: a batch that is not (input, label), or outputs and labels of wrong shapes.
    """
    if isinstance(metric, str) and metric not in _METRICS:
        raise ValueError(f"evaluate: unknown metric {metric!r}; use top1, top5 or a callable")
    score = _METRICS[metric] if isinstance(metric, str) else metric
    if device is None:
        device = _device_of(model)
    total, samples = 0.0, 0
    bar = batch_bar(loader, max_batches, "evaluate", progress=progress)
    with bar, eval_mode(model), torch.no_grad():
        for batch in bar:
            x, label = _split(batch)
            if device is not None:
                x = x.to(device)
                label = label.to(device) if isinstance(label, Tensor) else label
            batch_score = torch.as_tensor(score(model(x), label), dtype=torch.float64)
            total += batch_score.mean().item() * x.shape[0]
            samples += x.shape[0]
            bar.set_postfix_str(f"{total / max(samples, 1):.4f}", refresh=False)
    if samples == 0:
        raise ValueError("evaluate: the loader gave no data; it is empty or used up already")
    return total / samples


def _split(batch: Any) -> tuple[Tensor, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        what = type(batch).__name__
        if isinstance(batch, (tuple, list)):
            what += f" of {len(batch)} items"
        raise TypeError(f"evaluate: each batch must be (input, label), got {what}")
    x, label = batch
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise TypeError(
            "evaluate: each batch must be (input, label) with a tensor [N, ...] as input, "
            f"got {type(x).__name__}"
        )
    return x, label


def _device_of(model: Any) -> torch.device | None:
    """The device of the model's first parameter or buffer; None for a model that has neither."""
    if not isinstance(model, nn.Module):
        return None
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else first.device


def model_size(model: nn.Module) -> int:
    """Bytes of the tensors in a model's state dict, those that share memory counted once.

    A quantized weight counts with its 8-bit codes. Code and file headers are not included.
    """
    seen: set[tuple[int, int, torch.Size]] = set()
    total = 0
    for tensor in _tensors(model.state_dict()):
        key = (tensor.data_ptr(), tensor.element_size(), tensor.shape)
        if tensor.device.type != "meta" and key in seen:
            continue
        seen.add(key)
        total += tensor.numel() * tensor.element_size()
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
