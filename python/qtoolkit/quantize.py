"""Post-training quantization by a recipe, in one call."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qtoolkit.algorithms import BEFORE, Context
from qtoolkit.graph.report import model_inputs
from qtoolkit.qconfig import QConfigMapping
from qtoolkit.recipe import Recipe, get_recipe
from qtoolkit.workflow import calibrate, convert, prepare


def quantize(
    model: nn.Module,
    loader: Iterable[Any],
    recipe: str | Recipe | QConfigMapping | os.PathLike[str] = "w8a8",
    *,
    example_inputs: Any = None,
    max_batches: int = 32,
    progress: bool = True,
) -> nn.Module:
    """The quantized model that a recipe gives: prepare, its passes, calibrate, convert.

    Args:
        model: the float model, in any mode; it is not changed.
        loader: calibration batches: tensors, or tuples that begin with the model's inputs. They are
            kept in memory for the passes.
        recipe: a name (see ``recipe_names``), the path of a JSON or YAML file, a ``Recipe``, or a
            ``QConfigMapping``, which gets the passes of "w8a8".
        example_inputs: what ``model.forward`` takes, as a tuple; if None, the first tensor of the
            first batch.
        max_batches: use so many batches at most.
        progress: show progress bars.

    Raises:
        ValueError: an unknown recipe; no data; or what ``calibrate`` and ``convert`` raise.
        TypeError: a batch of another kind.
    """
    recipe = get_recipe(recipe)
    given = list(itertools.islice(loader, max_batches))
    if not given:
        raise ValueError("quantize got no data: the loader is empty")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if example_inputs is None:
        example_inputs = model_inputs(given[0], 1)
    device = next((p.device for p in model.parameters()), None)
    batches = [
        tuple(
            value.to(device) if isinstance(value, torch.Tensor) else value
            for value in model_inputs(batch, len(example_inputs))
        )
        for batch in given
    ]
    prepared = prepare(model, recipe.mapping, example_inputs).eval()
    before = [algorithm for algorithm in recipe.passes if algorithm.stage == BEFORE]
    after = [algorithm for algorithm in recipe.passes if algorithm.stage != BEFORE]
    for algorithm in before:
        algorithm.run(Context(prepared, batches, progress))
    calibrate(prepared, batches, progress=progress)
    for algorithm in after:
        algorithm.run(Context(prepared, batches, progress))
    return convert(prepared)
