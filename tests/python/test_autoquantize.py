"""The walk from the fastest quantized model to the safest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from chromium import rendered
from networks import digits, train
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit.nn.base import QuantizedModule

RECIPES = ("w8a8-fast", "w8a8")
ADAROUND = (0.9, 0.9)  # the scores of two steps


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    pool = nn.Sequential(nn.AvgPool2d(4), nn.Flatten())
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), pool)
    model.append(nn.Linear(8, 10))
    train(model, 2, 0.1)
    return model.eval()


@pytest.fixture(autouse=True)
def adaround(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The contexts that AdaRound was called with; it takes seconds, and has its own tests."""
    contexts: list[object] = []
    monkeypatch.setattr(
        qt.algorithms.AdaRound, "run", lambda self, context: contexts.append(context)
    )
    return contexts


def calibration() -> list[Tensor]:
    return [x[:12] for x, _ in digits()[0][:3]]


def run(model: nn.Module, evaluate: object, *args: object, **options: object) -> object:
    options = {"max_batches": 2, "max_float": 0.5, "progress": False, **options}
    return qt.autoquantize(model, calibration(), evaluate, *args, **options)


def accuracy(model: nn.Module) -> float:
    return qt.evaluate(model, digits()[1], progress=False)


def quantized_layers(model: nn.Module) -> set[str]:
    """Of those that a mapping names."""
    names = {m.source for m in model.modules() if isinstance(m, QuantizedModule)}
    return {name for name in names if not name.endswith("(input)")}


class Scores:
    """An ``evaluate`` that gives 1 to the float model, and to each quantized model the next of some
    numbers."""

    def __init__(self, *scores: object) -> None:
        self.scores = list(scores)
        self.models: list[nn.Module] = []

    def __call__(self, model: nn.Module) -> object:
        assert not model.training
        if not any(isinstance(m, QuantizedModule) for m in model.modules()):
            return 1.0
        self.models.append(model)
        score = self.scores.pop(0)
        if isinstance(score, BaseException):
            raise score
        return score


def test_the_first_step_that_holds_is_taken(network):
    result = run(network, accuracy)
    assert result.met
    assert result.chosen == "w8a8-fast"
    assert [step.name for step in result.steps] == ["w8a8-fast"]
    assert result.float_score == accuracy(network)
    assert accuracy(result.model) >= result.float_score - 0.01
    assert result.steps[0].size == qt.model_size(result.model) < result.float_size / 3


def test_a_recipe_that_drops_too_much_is_followed_by_the_next(network):
    evaluate = Scores(0.9, 0.995)
    result = run(network, evaluate)
    assert (result.chosen, result.met) == ("w8a8", True)
    assert result.model is evaluate.models[1]
    assert result.steps[0].drop == pytest.approx(0.1)
    assert result.steps[0].why == "a drop of 0.1000 is more than 0.01"
    assert "w8a8 holds: float 1.0000, a drop of 0.01 is allowed" in str(result)


def test_the_worst_layers_go_back_to_float(network):
    evaluate = Scores(0.9, 0.9, 0.9, 1.0)
    result = run(network, evaluate, recipes=RECIPES)
    worst = qt.sensitivity(network, calibration()[:2], progress=False).worst()
    assert [step.name for step in result.steps[2:]] == [
        f"w8a8, {worst[0]} in float",
        "w8a8, 2 of 4 layers in float",
    ]
    every, one, two = (quantized_layers(evaluate.models[i]) for i in (0, 2, 3))
    assert every >= set(worst)
    assert worst[0] not in one
    assert two.isdisjoint(worst[:2])
    assert result.model is evaluate.models[3]


def test_a_layer_stays_in_float_where_a_recipe_treats_the_first_and_last_apart(network):
    evaluate = Scores(0.9, 0.9, 0.9)
    result = run(network, evaluate, recipes=("w4a8",))
    every, *fewer = (quantized_layers(m) for m in evaluate.models)
    assert every >= {"0", "5"}
    assert len(fewer) == 2
    first = result.steps[1].name.removeprefix("w4a8, ").removesuffix(" in float")
    assert first in ("0", "5")
    assert first not in fewer[0] | fewer[1]
    assert [step.name for step in result.steps[-2:]] == ["w4a8 with AdaRound", "training"]
    assert result.steps[-2].why == "skipped: the recipe has it already"


def test_recipes_of_one_name_are_tried_each(network):
    fast = qt.get_recipe("w8a8-fast")
    float_first = fast.mapping.set_module_name("0", None)
    evaluate = Scores(0.5, 1.0)
    result = run(network, evaluate, recipes=(fast, dataclasses.replace(fast, mapping=float_first)))
    assert [step.score for step in result.steps] == [0.5, 1.0]
    assert "0" not in quantized_layers(result.model)


def test_training_comes_last_and_adaround_before_it(network, adaround):
    result = run(network, Scores(*[0.9] * 4, *ADAROUND, 0.999), train_loader=digits()[0][:4])
    assert result.chosen == "training"
    assert [step.name for step in result.steps[4:]] == [
        "w8a8 with AdaRound",
        "w8a8 with AdaRound, 2 of 4 layers in float",
        "training",
    ]
    assert len(adaround) == 2
    assert len(adaround[1].layers) < len(adaround[0].layers)
    assert accuracy(result.model) > accuracy(network) - 0.05


def test_a_train_step_of_ones_own_and_batches_of_dicts(network):
    seen = []

    def step(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch["y"].shape)
        return nn.functional.cross_entropy(model(batch["x"]), batch["y"])

    loader = [{"x": x, "y": y} for x, y in digits()[0][:2]]
    result = run(
        network, Scores(0.5, 0.5, 1.0), recipes=("w8a8-fast",), max_float=0,
        train_loader=loader, train_step=step, epochs=3,
    )  # fmt: skip
    assert result.chosen == "training"
    assert len(seen) == 6


def test_if_nothing_holds_the_best_is_returned_with_a_warning(network):
    scores = Scores(0.7, 0.9, float("nan"), 0.8, *ADAROUND)
    with pytest.warns(UserWarning, match=r"no step is within 0\.01 of .*1\.0000; the best is w8a8"):
        result = run(network, scores)
    assert not result.met
    assert result.chosen == "w8a8"
    assert result.model is scores.models[1]
    assert result.steps[2].why == "evaluate gave NaN"
    assert result.steps[-1].why == "skipped: no train_loader was given"


def test_an_interrupted_walk_goes_on_where_it_was(network, tmp_path: Path):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(network, Scores(0.9, 0.9, KeyboardInterrupt()), resume=folder)
    rest = Scores(0.9, 1.0)
    result = run(network, rest, resume=folder)
    assert [step.score for step in result.steps] == [0.9, 0.9, 0.9, 1.0]
    assert len(rest.models) == 2
    # Once more: nothing is evaluated, and the model is built again.
    again = run(network, Scores(), resume=folder)
    assert again.steps == result.steps
    x = digits()[1][0][0]
    assert torch.equal(again.model(x), result.model(x))
    with pytest.raises(ValueError, match=r"steps\.json is of another run"):
        run(network, Scores(), resume=folder, max_batches=1)


@pytest.mark.parametrize(
    ("evaluate", "error", "message"),
    [
        (lambda m: "0.9", TypeError, "must return a number, the score; got str for float"),
        (lambda m: None, TypeError, "got NoneType"),
        (lambda m: True, TypeError, "got bool"),
        (lambda m: torch.ones(2), TypeError, "got Tensor"),
        (lambda m: float("nan"), ValueError, "gives NaN for the float model"),
    ],
)
def test_what_evaluate_returns_is_checked(network, evaluate: Callable, error, message):
    with pytest.raises(error, match=message):
        run(network, evaluate)


def test_a_score_may_be_a_tensor(network):
    assert run(network, lambda m: torch.tensor(0.5)).float_score == 0.5


def test_bad_arguments(network):
    with pytest.raises(ValueError, match="max_drop must be a number of at least 0, got -1"):
        run(network, accuracy, -1)
    with pytest.raises(ValueError, match="max_float must be a share"):
        run(network, accuracy, max_float=2)
    with pytest.raises(ValueError, match="recipe 'fp16' quantizes no activations"):
        run(network, accuracy, recipes=("w8a8", "fp16"))
    with pytest.raises(ValueError, match="train_step needs a train_loader"):
        run(network, accuracy, train_step=lambda m, b: b)
    with pytest.raises(ValueError, match="autoquantize got no data"):
        qt.autoquantize(network, [], accuracy, progress=False)
    nan = torch.full((2, 1, 8, 8), float("nan"))
    with pytest.raises(ValueError, match="autoquantize: batch 0 holds 128 NaN"):
        qt.autoquantize(network, [nan], accuracy, progress=False)
    options = {"recipes": ("w8a8-fast",), "max_float": 0}
    with pytest.raises(ValueError, match="train_loader is empty"):
        run(network, Scores(0.5, 0.5), train_loader=[], **options)


def test_the_model_is_not_changed(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.train()
    run(network, Scores(0.9, 0.9, 0.9, 0.9, *ADAROUND, 1.0), train_loader=digits()[0][:1])
    assert network.training
    network.eval()
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())


def test_the_page_shows_every_step(network, tmp_path: Path):
    result = run(network, Scores(0.9, 0.9, 1.0))
    result.to_html(tmp_path / "record.html")
    document = rendered(tmp_path / "record.html")
    for step in result.steps:
        assert f'data-sort="{step.name}"' in document
        assert step.why in document
    assert document.count("<rect") == 4
