"""From the fastest quantized model to the safest, until the accuracy holds."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import html
from qtoolkit.algorithms import BEFORE, Algorithm, make_algorithm
from qtoolkit.batches import gather_batches
from qtoolkit.checkpoint import Checkpoint, fingerprint
from qtoolkit.eval_mode import eval_mode
from qtoolkit.metrics import model_size
from qtoolkit.progress import progress_bar
from qtoolkit.qconfig import QConfig, QConfigMapping
from qtoolkit.quantize import quantize
from qtoolkit.recipe import Recipe, get_recipe
from qtoolkit.sensitivity import sensitivity
from qtoolkit.text_table import text_table
from qtoolkit.training import freeze_bn, freeze_observers
from qtoolkit.workflow import convert, prepare_qat

_NAN = float("nan")
#: Of the sensitivity that says which layers go back to float.
_SENSITIVITY_BATCHES = 8
_ROUNDING = 1e-9

Evaluate = Callable[[nn.Module], Any]
TrainStep = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class QuantizationStep:
    """One thing that was tried.

    Attributes:
        name: what it was.
        score: what ``evaluate`` gave; NaN for a step that was skipped.
        drop: how much that is below the float model's.
        held: whether that is within ``max_drop``.
        size: bytes of the model's tensors; 0 for a step that was skipped.
        seconds: how long it took, with the evaluation.
        why: why it was not enough, was skipped, or is the result.
    """

    name: str
    score: float
    drop: float
    held: bool
    size: int
    seconds: float
    why: str


@dataclass(frozen=True)
class AutoQuantization:
    """The model, and every step that was tried; ``print`` it for a table.

    Attributes:
        model: of the first step that held, else of the one with the best score.
        met: whether it is within ``max_drop``.
        chosen: name of its step.
        float_score: what ``evaluate`` gave for the float model.
        float_size: bytes of the float model's tensors.
        max_drop: as asked for.
        steps: in the order in which they were tried.
    """

    model: nn.Module
    met: bool
    chosen: str
    float_score: float
    float_size: int
    max_drop: float
    steps: tuple[QuantizationStep, ...]

    def _summary(self) -> str:
        result = "holds" if self.met else "is the best, but no step holds"
        return (
            f"{self.chosen} {result}: float {self.float_score:.4f}, a drop of {self.max_drop:g} "
            "is allowed"
        )

    def __str__(self) -> str:
        rows = [["step", "score", "drop", "MB", "s", "why"]]
        rows.append(
            ["float", f"{self.float_score:.4f}", "", f"{self.float_size / 1e6:.2f}", "", ""]
        )
        for step in self.steps:
            skipped = step.size == 0
            numbers = [f"{step.score:.4f}", f"{step.drop:+.4f}", f"{step.size / 1e6:.2f}"]
            numbers = ["-"] * 3 if skipped else numbers
            rows.append([step.name, *numbers, f"{step.seconds:.1f}", step.why])
        return f"{text_table(rows, right=range(1, 5))}\n{self._summary()}"

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Writes the record as a page with a plot: one file that loads nothing from elsewhere."""
        tried = [step for step in self.steps if step.size]
        names = ["float", *(step.name for step in tried)]
        scores = [self.float_score, *(step.score for step in tried)]
        rows: list[list[html.Cell | str]] = [
            [
                html.number(0, 0), "float", html.number(self.float_score, 4), html.number(_NAN),
                html.number(self.float_size / 1e6), html.number(_NAN), "what is to be kept",
            ]
        ]  # fmt: skip
        for i, step in enumerate(self.steps, 1):
            rows.append(
                [
                    html.number(i, 0),
                    step.name,
                    html.number(step.score, 4),
                    html.number(step.drop, 4),
                    html.number(step.size / 1e6 if step.size else _NAN),
                    html.number(step.seconds, 1),
                    step.why,
                ]
            )
        parts = [
            html.paragraph(self._summary() + "."),
            html.figure("Score", html.bars(names, scores, "score", "score", "steps, as tried")),
            "<h2>Steps</h2>",
            html.table(["#", "Step", "Score", "Drop", "MB", "s", "Why"], rows),
        ]
        Path(path).write_text(html.page("Automatic quantization", parts), encoding="utf-8")


def autoquantize(
    model: nn.Module,
    loader: Iterable[Any],
    evaluate: Evaluate,
    max_drop: float = 0.01,
    *,
    recipes: Sequence[str | Recipe] = ("w8a8-fast", "w8a8"),
    max_float: float = 0.25,
    train_loader: Iterable[Any] | None = None,
    train_step: TrainStep | None = None,
    epochs: int = 2,
    rate: float = 1e-3,
    example_inputs: Any = None,
    max_batches: int = 32,
    resume: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> AutoQuantization:
    """Tries one way to quantize after the other, and stops at the first whose score holds.

    The recipes, fastest first; then the last of them with the layers in float that cost the most
    by ``sensitivity``: one, two, four and so on; then with AdaRound; then, where there is training
    data, quantization-aware training for a few epochs. If none holds, the result is the model with
    the best score, with a warning.

    Args:
        model: the float model; it is not changed.
        loader: calibration batches, with or without labels: tensors; tuples that begin with the
            inputs; or dicts of arguments of ``forward``. They are kept in memory.
        evaluate: gives a model's score, greater is better, such as ``lambda m: qt.evaluate(m,
            test_loader)``; called with the float model and each quantized one, in eval mode.
        max_drop: how much the score may fall below the float model's.
        recipes: see ``get_recipe``; the last one is what the later steps build on.
        max_float: the share of layers that may go back to float.
        train_loader: training batches, (input, label) unless ``train_step`` takes others; without
            it there is no training.
        train_step: train_step(model, batch) gives the loss of a batch; cross-entropy if None.
        epochs: of training; statistics and ranges are frozen in the last of several.
        rate: of SGD with momentum 0.9.
        example_inputs: what ``model.forward`` takes, as a tuple; if None, the first input of the
            first batch, or all that its dict names.
        max_batches: use so many calibration batches at most.
        resume: a folder that keeps the scores of the steps that were done when the run is
            interrupted, what sensitivity has measured and the layers that AdaRound has finished;
            the same call then goes on from there. It cannot tell one ``evaluate`` from another.
        progress: show progress bars.

    Raises:
        ValueError: no data; a batch holds NaN or infinite values; ``evaluate`` gives NaN for the
            float model; an argument is out of range; a recipe is for weights alone; or the folder
            is of another run.
        TypeError: ``evaluate`` gives no number, or a batch is of another kind.
    """
    if not isinstance(max_drop, int | float) or not math.isfinite(max_drop) or max_drop < 0:
        raise ValueError(f"autoquantize: max_drop must be a number of at least 0, got {max_drop!r}")
    if not 0 <= max_float <= 1:
        raise ValueError(f"autoquantize: max_float must be a share, 0 to 1, got {max_float!r}")
    if not recipes:
        raise ValueError("autoquantize needs at least one recipe")
    if train_step is not None and train_loader is None:
        raise ValueError("autoquantize: train_step needs a train_loader")
    inputs, batches = gather_batches(
        loader, model, "autoquantize", example_inputs, max_batches, progress=progress
    )
    known = [get_recipe(recipe) for recipe in recipes]
    for recipe in known:
        if recipe.weight_only:
            raise ValueError(
                f"autoquantize: recipe {recipe.name!r} quantizes no activations, so no layer of it "
                "can be left in float; give it to qt.quantize"
            )
    # What is left in float must not come back as one of the first or last layers.
    base = replace(known[-1], mapping=known[-1].mapping_for(model), edges=None)
    identity = ""
    folder = None if resume is None else Path(resume)
    if folder is not None:
        plain = [recipe.to_dict() for recipe in known]
        options = [max_float, epochs, rate, train_loader is None]
        identity = fingerprint(model, plain, options, *batches)
    kept = Checkpoint(None if folder is None else folder / "steps.json", identity)
    walk = _Walk(model, evaluate, float(max_drop), kept)
    plans = _Plans(model, inputs, batches, base, folder, progress)
    training = None
    if train_loader is not None:
        training = _Training(train_loader, train_step or _cross_entropy, epochs, rate)
    for name, build in plans.all(known, max_float, training):
        if isinstance(build, str):
            walk.skip(name, build)
        elif walk.attempt(name, build):
            break
    return walk.result()


def _number(value: Any, where: str) -> float:
    try:
        if isinstance(value, str | bytes | bool):
            raise TypeError(value)
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor of several
        raise TypeError(
            f"autoquantize: evaluate must return a number, the score; got {type(value).__name__} "
            f"for {where}"
        ) from error


class _Walk:
    """The steps so far, and the best model."""

    def __init__(
        self, model: nn.Module, evaluate: Evaluate, max_drop: float, kept: Checkpoint
    ) -> None:
        self.evaluate = evaluate
        self.max_drop = max_drop
        self.kept = kept
        self.float_size = model_size(model)
        self.steps: list[QuantizationStep] = []
        self.best: QuantizationStep | None = None
        self.best_model: nn.Module | Callable[[], nn.Module] | None = None
        if "float" not in kept.state:
            kept.state["float"] = self._score(model, "float")
            if math.isnan(kept.state["float"]):
                raise ValueError(
                    "autoquantize: evaluate gives NaN for the float model; check the model and "
                    "what evaluate computes"
                )
            kept.state["steps"] = {}
            kept.save()
        self.float_score: float = kept.state["float"]

    def _score(self, model: nn.Module, where: str) -> float:
        with eval_mode(model), torch.no_grad():
            return _number(self.evaluate(model), where)

    def skip(self, name: str, why: str) -> None:
        """Notes a step that cannot be tried."""
        self.steps.append(QuantizationStep(name, _NAN, _NAN, False, 0, 0.0, f"skipped: {why}"))

    def attempt(self, name: str, build: Callable[[], nn.Module]) -> bool:
        """Tries a step, or takes what an earlier run found; True if it holds."""
        key = f"{len(self.steps)} {name}"  # two recipes may have one name
        done = self.kept.state["steps"].get(key)
        model: nn.Module | Callable[[], nn.Module] = build
        if done is None:
            start = time.perf_counter()
            model = build()
            score = self._score(model, name)
            done = [score, model_size(model), time.perf_counter() - start]
            self.kept.state["steps"][key] = done
            self.kept.save()
        score, size, seconds = done
        drop = self.float_score - score
        held = drop <= self.max_drop + _ROUNDING
        if math.isnan(score):
            why = "evaluate gave NaN"
        elif held:
            why = f"a drop of {drop:.4f} is within {self.max_drop:g}"
        else:
            why = f"a drop of {drop:.4f} is more than {self.max_drop:g}"
        step = QuantizationStep(name, score, drop, held, int(size), seconds, why)
        self.steps.append(step)
        if self.best is None or score > self.best.score or math.isnan(self.best.score):
            self.best, self.best_model = step, model
        return held

    def result(self) -> AutoQuantization:
        """The model; built again where an earlier run had made it."""
        assert self.best is not None
        assert self.best_model is not None
        model = self.best_model
        if not isinstance(model, nn.Module):
            model = model()
        if not self.best.held:
            warnings.warn(
                f"autoquantize: no step is within {self.max_drop:g} of the float model's "
                f"{self.float_score:.4f}; the best is {self.best.name} with "
                f"{self.best.score:.4f}. print(result) for all steps",
                stacklevel=3,
            )
        return AutoQuantization(
            model,
            self.best.held,
            self.best.name,
            self.float_score,
            self.float_size,
            self.max_drop,
            tuple(self.steps),
        )


@dataclass(frozen=True)
class _Training:
    """How the model is trained."""

    loader: Iterable[Any]
    step: TrainStep
    epochs: int
    rate: float


_Build = Callable[[], nn.Module] | str


@dataclass(frozen=True)
class _Plans:
    """What makes each step's model."""

    model: nn.Module
    inputs: tuple[Any, ...]
    batches: list[tuple[Any, ...]]
    base: Recipe
    folder: Path | None
    progress: bool

    def all(
        self, recipes: list[Recipe], max_float: float, training: _Training | None
    ) -> Iterator[tuple[str, _Build]]:
        """Names of steps, each with what makes its model, or why there is none."""
        for recipe in recipes:
            yield recipe.name, self._with(recipe)
        worst = self._worst() if max_float else []
        most = math.floor(max_float * len(worst))
        counts = [2**i for i in range(most.bit_length()) if 2**i < most]
        for count in [*counts, most] if most else []:
            named = worst[0] if count == 1 else f"{count} of {len(worst)} layers"
            name = f"{self.base.name}, {named} in float"
            yield name, self._with(self._keeping(worst[:count], self.base.passes))
        name = f"{self.base.name} with AdaRound"
        if any(algorithm.name == "adaround" for algorithm in self.base.passes):
            yield name, "the recipe has it already"
        else:
            yield name, self._with(self._keeping([], _with_adaround(self.base)), "adaround")
            if most:
                name = f"{name}, {most} of {len(worst)} layers in float"
                recipe = self._keeping(worst[:most], _with_adaround(self.base))
                yield name, self._with(recipe, "adaround-float")
        if training is None:
            yield "training", "no train_loader was given"
        else:
            yield "training", lambda: self._train(training)

    def _with(self, recipe: Recipe, name: str = "") -> Callable[[], nn.Module]:
        """What quantizes by a recipe; with a name it goes on where it was interrupted."""
        folder = None if self.folder is None or not name else self.folder / name
        return lambda: quantize(
            self.model,
            self.batches,
            recipe,
            example_inputs=self.inputs,
            max_batches=len(self.batches),
            progress=self.progress,
            resume=folder,
        )

    def _keeping(self, names: list[str], passes: tuple[Algorithm, ...]) -> Recipe:
        mapping = self.base.mapping
        for name in names:
            mapping = mapping.set_module_name(name, None)
        return replace(self.base, mapping=mapping, passes=passes)

    def _worst(self) -> list[str]:
        """The layers, those first that cost the most when they alone are quantized."""
        found = sensitivity(
            self.model,
            self.batches,
            {"recipe": self.base.mapping.global_qconfig},
            example_inputs=self.inputs,
            max_batches=_SENSITIVITY_BATCHES,
            resume=None if self.folder is None else self.folder / "sensitivity.json",
            progress=self.progress,
        )
        return found.worst()

    def _train(self, training: _Training) -> nn.Module:
        qat = prepare_qat(self.model, _for_training(self.base.mapping), self.inputs)
        parameters = [p for p in qat.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, training.rate, momentum=0.9)
        batches = 0
        for epoch in range(training.epochs):
            if 0 < epoch == training.epochs - 1:
                freeze_observers(qat)
                freeze_bn(qat)
            bar = progress_bar(
                training.loader, f"training {epoch + 1}/{training.epochs}", progress=self.progress
            )
            for batch in bar:
                optimizer.zero_grad()
                loss = training.step(qat, batch)
                if not bool(torch.isfinite(loss)):
                    raise ValueError(
                        f"autoquantize: the loss of training batch {batches} is {float(loss)}; "
                        "check the data, or lower rate"
                    )
                loss.backward()
                optimizer.step()
                batches += 1
        if batches == 0:
            raise ValueError("autoquantize: train_loader is empty, or used up already")
        return convert(qat.eval())


def _with_adaround(recipe: Recipe) -> tuple[Algorithm, ...]:
    """The recipe's passes, and AdaRound as the first of those after calibration."""
    before = [algorithm for algorithm in recipe.passes if algorithm.stage == BEFORE]
    after = [algorithm for algorithm in recipe.passes if algorithm.stage != BEFORE]
    return (*before, make_algorithm("adaround"), *after)


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise TypeError(
            "autoquantize: training batches must be (input, label); give a train_step for others"
        )
    device = next((p.device for p in model.parameters()), None)
    x, label = (value.to(device) for value in batch)
    return functional.cross_entropy(model(x), label)


def _for_training(mapping: QConfigMapping) -> QConfigMapping:
    """The same formats with ranges that follow the data."""

    def trained(qconfig: QConfig | None) -> QConfig | None:
        if qconfig is None or qconfig.activation is None:
            return qconfig
        averaged = replace(qconfig.activation, observer="moving_average", observer_options=())
        return replace(qconfig, activation=averaged)

    def entries(items: Iterable[tuple[str, QConfig | None]]) -> tuple[Any, ...]:
        return tuple((key, trained(qconfig)) for key, qconfig in items)

    return QConfigMapping(
        trained(mapping.global_qconfig),
        entries(mapping.module_types),
        entries(mapping.module_names),
    )
