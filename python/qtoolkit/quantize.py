"""Post-training quantization by a recipe, in one call."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from torch import nn

from qtoolkit.algorithms import BEFORE, Context, RunFolder
from qtoolkit.batches import gather_batches
from qtoolkit.checkpoint import fingerprint
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
    resume: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The quantized model that a recipe gives: prepare, its passes, calibrate, convert.

    Args:
        model: the float model, in any mode; it is not changed.
        loader: calibration batches: tensors, tuples that begin with the model's inputs, or dicts
            that hold inputs by name. They may differ in size, and are kept in memory for the
            passes.
        recipe: a name (see ``recipe_names``), the path of a JSON or YAML file, a ``Recipe``, or a
            ``QConfigMapping``, which gets the passes of "w8a8".
        example_inputs: what ``model.forward`` takes, as a tuple; if None, the first tensor of the
            first batch, or the inputs that a dict names.
        max_batches: use so many batches at most.
        progress: show progress bars.
        resume: a folder that keeps what is finished, layer by layer. After an interruption the same
            call goes on where it was and gives the same bits; a folder of a call with another
            model, data or recipe is refused.

    Raises:
        ValueError: an unknown recipe; no data; a batch with NaN or infinite values (names it); a
            folder of another run; or what ``calibrate`` and ``convert`` raise.
        TypeError: a batch of another kind.
    """
    recipe = get_recipe(recipe)
    example_inputs, batches = gather_batches(
        loader, model, "quantize", example_inputs, max_batches, progress=False
    )
    mapping = recipe.mapping_for(model)
    prepared = prepare(model, mapping, example_inputs).eval()
    folder = None
    if resume is not None:
        facts = {
            "recipe": recipe.to_dict(),
            "model": fingerprint(model),
            "data": fingerprint(batches),
        }
        folder = RunFolder(resume, facts)
    try:
        _run_passes(prepared, batches, recipe, folder, progress=progress)
    except KeyboardInterrupt:
        if folder is not None and progress:
            print(f"\ninterrupted; {folder.path} keeps what is finished: call again to go on")
        raise
    return convert(prepared)


def _run_passes(
    prepared: nn.Module,
    batches: list[tuple[Any, ...]],
    recipe: Recipe,
    folder: RunFolder | None,
    *,
    progress: bool,
) -> None:
    """Runs passes and calibration on a prepared model."""
    numbered = list(enumerate(recipe.passes))
    state = None if folder is None else folder.load("calibration")
    if state is None:
        context = Context(prepared, batches, progress)
        for _, algorithm in numbered:
            if algorithm.stage == BEFORE:
                algorithm.run(context)
        calibrate(prepared, batches, progress=progress)
        if folder is not None:
            folder.save("calibration", prepared.state_dict())
    else:
        prepared.load_state_dict(state)
    after = [(index, a) for index, a in numbered if a.stage != BEFORE]
    context = Context(prepared, batches, progress)
    for index, algorithm in after:
        if folder is not None:
            context.folder = folder.part(f"{index}-{algorithm.name}")
        algorithm.run(context)
