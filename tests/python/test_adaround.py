"""AdaRound, and long runs that are interrupted and go on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.algorithms import AdaRound, Algorithm, BiasCorrection, Context
from qtoolkit.algorithms.adaround import layer_error
from qtoolkit.algorithms.registry import register_algorithm
from qtoolkit.algorithms.rounding import Samples, SoftRounding, searched_scale
from qtoolkit.algorithms.walk import walk
from qtoolkit.nn.weights import pinned_weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.second = nn.Conv2d(8, 8, 3, 2, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        x = functional.relu(self.second(self.up(x)) + x)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def mapping_of(bits: str) -> qt.QConfigMapping:
    weight = qt.TensorSpec(bits, "per_channel", symmetric=True, observer="per_channel_minmax")
    return qt.QConfigMapping().set_global(qt.QConfig(qt.TensorSpec("uint8"), weight))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = [torch.randn(count, 3, 3, 3, generator=generator) for count in (16, 16, 5)]
    # Neighbours are alike, as in photographs: there roundings can make up for each other.
    return [functional.interpolate(x, (8, 8), mode="bilinear") for x in coarse]


def calibrated(model: nn.Module, batches: list[Tensor], bits: str) -> Context:
    prepared = qt.prepare(model, mapping_of(bits), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    return Context(prepared, [(batch,) for batch in batches], progress=False)


FAST = AdaRound(iterations=60)


def test_every_layer_comes_closer_to_float_than_with_the_nearest_codes(model, batches):
    context = calibrated(model, batches, "int3")
    FAST.run(context)
    ratios = {}
    with context.simulated():
        visits = list(walk(context, context.layers))
    for visit in visits:
        layer = visit.layer
        rounding = SoftRounding.of(layer, visit.float_module)
        samples = Samples(visit.inputs, [layer.activation(y) for y in visit.float_outputs()])
        learned, nearest = (
            layer_error(layer, weight, samples, 64)
            for weight in (pinned_weight(layer.module), rounding.rounded())
        )
        ratios[layer.name] = learned / nearest
        steps = pinned_weight(layer.module).codes - rounding.rounded().codes
        assert int(steps.abs().max()) == 1
    assert max(ratios.values()) < 0.97, ratios
    assert sum(ratios.values()) < 0.75 * len(ratios), ratios


def test_learned_roundings_approach_the_best_of_all():
    """A layer of 8 weights: every choice of up or down is tried."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1)).eval()
    x = torch.randn(64, 3) @ torch.randn(3, 8)
    context = calibrated(model, [x], "int3")
    layer = context.layers[0]
    rounding = SoftRounding.of(layer, layer.module)
    samples = Samples([x], [model(x).detach()])
    choices = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 8)
    errors = []
    for choice in choices:
        with torch.no_grad():
            rounding.logits.copy_((choice * 2 - 1).reshape(1, 8))
        errors.append(layer_error(layer, rounding.learned(), samples, 64))
    AdaRound(iterations=200, activations=False).run(context)
    found = layer_error(layer, pinned_weight(layer.module), samples, 64)
    nearest = layer_error(layer, rounding.rounded(), samples, 64)
    assert min(errors) <= found * 1.0001
    assert found <= sorted(errors)[8]  # among the best 9 of 256
    assert found < nearest


def test_the_searched_scale_is_the_best_of_its_grid():
    torch.manual_seed(0)
    weight = torch.randn(4, 30)
    weight[:, 0] = 6
    for granularity, rows in (("per_channel", weight), ("per_tensor", weight.reshape(1, -1))):
        observer = "per_channel_minmax" if granularity == "per_channel" else "minmax"
        spec = qt.TensorSpec("int4", granularity, symmetric=True, observer=observer)
        found = searched_scale(weight, spec)

        def error(scale: Tensor, row: Tensor) -> float:
            codes = (row / scale).round().clamp(-7, 7)
            return float((codes * scale - row).square().sum())

        for index, row in enumerate(rows):
            grid = [row.abs().max() / 7 * (1 - 0.7 * step / 60) for step in range(60)]
            best = min(grid, key=lambda scale, row=row: error(scale, row))
            torch.testing.assert_close(found[index], best)


def test_adaround_and_what_follows_raise_the_models_quality(model, batches):
    x = torch.cat(batches)
    with torch.no_grad():
        expected = model(x)

    def noise(*passes: Algorithm) -> float:
        recipe = qt.Recipe("test", mapping_of("int3"), passes)
        found = qt.quantize(model, batches, recipe, progress=False)(x)
        return float((found - expected).square().sum())

    plain = noise()
    learned = noise(FAST)
    assert learned < 0.5 * plain
    assert noise(FAST, BiasCorrection()) < learned


@register_algorithm("stop_after")
@dataclass(frozen=True)
class StopAfter(Algorithm):
    """AdaRound that a person stops at a layer."""

    layers: int = 2

    def run(self, context: Context) -> None:
        steps = context.steps

        def stopping(*args: object) -> object:
            for index, step in enumerate(steps(*args)):
                if index == self.layers and not step[1]:
                    raise KeyboardInterrupt
                yield step

        context.limited = lambda _: context
        context.steps = stopping
        FAST.run(context)


def test_an_interrupted_run_goes_on_and_gives_the_same_bits(model, batches, tmp_path, monkeypatch):
    recipe = qt.Recipe("test", mapping_of("int3"), (StopAfter(100), BiasCorrection()))
    expected = qt.quantize(model, batches, recipe, progress=False)
    run = StopAfter.run
    monkeypatch.setattr(StopAfter, "run", lambda self, context: run(StopAfter(2), context))
    with pytest.raises(KeyboardInterrupt):
        qt.quantize(model, batches, recipe, progress=False, resume=tmp_path / "run")
    monkeypatch.setattr(StopAfter, "run", run)
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"run.json", "calibration.pt", "0-stop_after-0.pt", "0-stop_after-1.pt"} == kept
    learned = []
    rounded = AdaRound._rounded

    def counted(self: AdaRound, visit: object, index: int) -> object:
        learned.append(index)
        return rounded(self, visit, index)

    monkeypatch.setattr(AdaRound, "_rounded", counted)
    found = qt.quantize(model, batches, recipe, progress=False, resume=tmp_path / "run")
    assert learned == [2, 3]
    states = expected.state_dict(), found.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    again = qt.quantize(model, batches, recipe, progress=False, resume=tmp_path / "run")
    assert learned == [2, 3]
    assert all(torch.equal(states[0][key], again.state_dict()[key]) for key in states[0])


def test_a_folder_of_another_run_is_refused(model, batches, tmp_path):
    def run(*, fc: float = 0.0, data: list[Tensor] = batches, recipe: str = "w8a8") -> None:
        with torch.no_grad():
            model.fc.bias.fill_(fc)
        qt.quantize(model, data, recipe, progress=False, resume=tmp_path / "run")

    run()
    for change, name in (
        ({"fc": 1.0}, "model"),
        ({"data": batches[:2]}, "data"),
        ({"recipe": "w8a8-fast"}, "recipe"),
    ):
        with pytest.raises(ValueError, match=f"a run with another {name};"):
            run(**change)
    (tmp_path / "run" / "calibration.pt").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"calibration\.pt is damaged"):
        run()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        qt.quantize(model, batches, progress=False, resume=tmp_path / "other")
    assert (tmp_path / "other" / "notes.txt").read_text() == "mine"
