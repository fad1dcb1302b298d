"""Post-training quantization by a recipe, in one call."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qtoolkit.algorithms import BEFORE, Context, RunFolder
from qtoolkit.batches import gather_batches
from qtoolkit.checkpoint import fingerprint
from qtoolkit.eval_mode import eval_mode
from qtoolkit.qconfig import QConfigMapping
from qtoolkit.recipe import Recipe, get_recipe
from qtoolkit.weight_only import quantize_weights
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

    The recipes "fp16" and "w8a16" quantize no activations: theirs are float16, and the result takes
    float16 inputs, as a model does after ``half()``.

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
    if recipe.weight_only:
        return _quantize_weights(model, batches, recipe, progress=progress)
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


def _quantize_weights(
    model: nn.Module, batches: list[tuple[Any, ...]], recipe: Recipe, *, progress: bool
) -> nn.Module:
    """The model with weights in the format of a recipe and float16 activations."""
    _check_range(model, batches)
    assert recipe.weight_only is not None
    if recipe.weight_only != "fp16":  # which casts by itself, norms excepted
        model = copy.deepcopy(model).half()
    return quantize_weights(model, recipe.weight_only, group_size=None, progress=progress)


def _check_range(model: nn.Module, batches: list[tuple[Any, ...]]) -> None:
    """Raises ValueError that names the first layer whose output float16 cannot hold."""
    largest = torch.finfo(torch.float16).max

    def check(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
            most = float(output.abs().max())
            if most > largest:
                raise ValueError(
                    f"quantize: {name or 'the model'} gives values up to {most:g}, beyond "
                    f"float16's {largest:g}; use qt.quantize_weights(model, 'bf16')"
                )

    with ExitStack() as stack, eval_mode(model), torch.no_grad():
        for name, module in model.named_modules():
            hook = module.register_forward_hook(
                lambda _, __, output, name=name: check(name, output)
            )
            stack.callback(hook.remove)
        for batch in batches:
            model(*batch)


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
