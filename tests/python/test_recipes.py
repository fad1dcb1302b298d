"""Recipes, the one-call quantization, and what algorithms are given to work on."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.algorithms import Algorithm, BiasCorrection, Context, make_algorithm
from qtoolkit.algorithms.registry import BEFORE, register_algorithm
from qtoolkit.nn.weights import IntegerWeight, pin_weight


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.norm(self.conv(x)))
        x = functional.relu(self.second(x) + x)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(4)]


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


def mapping_of(bits: str) -> qt.QConfigMapping:
    activation = qt.TensorSpec("uint8")
    weight = qt.TensorSpec(bits, "per_channel", symmetric=True, observer="per_channel_minmax")
    return qt.QConfigMapping().set_global(qt.QConfig(activation, weight))


def test_the_call_is_prepare_calibrate_convert(model, batches):
    quantized = qt.quantize(model, batches, "w8a8-fast", progress=False)
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping("x86"), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    with torch.no_grad():
        assert torch.equal(quantized(batches[0]), qt.convert(prepared)(batches[0]))


INTEGER = [name for name in qt.recipe_names() if not qt.get_recipe(name).weight_only]


@pytest.mark.parametrize("name", INTEGER)
def test_every_recipe_quantizes_and_survives_json(name, model, batches, tmp_path):
    recipe = qt.get_recipe(name)
    recipe.save(tmp_path / "recipe.json")
    assert qt.get_recipe(tmp_path / "recipe.json") == recipe
    loader = [(batch, torch.zeros(8)) for batch in batches]
    quantized = qt.quantize(model, loader, tmp_path / "recipe.json", progress=False)
    with torch.no_grad():
        wanted = {"w4a8": 20, "w4a4": 12}.get(name, 25)
        assert sqnr(model(batches[0]), quantized(batches[0])) > wanted


@pytest.mark.parametrize(("name", "wanted"), [("fp16", 55), ("w8a16", 35)])
def test_recipes_with_float16_activations(name, wanted, model, batches, tmp_path):
    recipe = qt.get_recipe(name)
    recipe.save(tmp_path / "recipe.json")
    assert qt.get_recipe(tmp_path / "recipe.json") == recipe
    quantized = qt.quantize(model, batches, name, progress=False)
    weights = [t for t in quantized.state_dict().values() if t.dim() > 1]
    assert {t.dtype for t in weights} <= {torch.float16, torch.int8, torch.uint8, torch.float32}
    with torch.no_grad():
        found = quantized(batches[0].half())
        assert found.dtype == torch.float16
        assert sqnr(model(batches[0]), found.float()) > wanted
        assert model.fc.weight.dtype == torch.float32
        model.fc.weight *= 1e6
    with pytest.raises(ValueError, match=r"fc gives values up to .* beyond float16's 65504"):
        qt.quantize(model, batches, name, progress=False)


def test_a_recipe_with_weights_alone_has_no_mapping():
    with pytest.raises(ValueError, match="can be no mapping, passes or edges"):
        qt.Recipe("test", mapping_of("int8"), weight_only="fp16")


@pytest.mark.parametrize("name", ["w4a8", "w4a4"])
def test_few_bits_spare_the_first_and_the_last_layer(name, model):
    recipe = qt.get_recipe(name)
    mapping = recipe.mapping_for(model)
    formats = {
        layer: mapping.qconfig_for(layer, type(model.get_submodule(layer))).weight.format
        for layer in ("conv", "second", "fc")
    }
    assert formats == {"conv": "int8", "second": "int4", "fc": "int8"}


class Inputs(nn.Module):
    """Two inputs, of which the second may be left out, and a layer that data does not reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        x = self.a(x)
        return x if y is None else x + self.b(y)


@pytest.mark.parametrize("name", ["w8a8", "w4a4"])
def test_batches_of_names_and_of_several_sizes(name):
    torch.manual_seed(0)
    model = Inputs().eval()
    loader = [
        {"x": torch.randn(n, 6), "y": torch.randn(n, 6), "labels": torch.zeros(n)}
        for n in (8, 3, 1)
    ]
    quantized = qt.quantize(model, loader, name, progress=False)
    x, y = loader[0]["x"], loader[0]["y"]
    with torch.no_grad():
        assert sqnr(model(x, y), quantized(x, y)) > 25
        alone = qt.quantize(model, [b["x"] for b in loader], name, progress=False)
        assert sqnr(model(x), alone(x)) > 25


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_said(value, model, batches):
    bad = batches[2].clone()
    bad[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="batch 2 holds 1 NaN or infinite values in input 0"):
        qt.quantize(model, [*batches[:2], bad], progress=False)


def test_bias_correction_takes_the_shift_of_the_mean_out(model, batches):
    def quantized(*passes: Algorithm) -> nn.Module:
        return qt.quantize(
            model, batches, qt.Recipe("test", mapping_of("int3"), passes), progress=False
        )

    x = torch.cat(batches)
    with torch.no_grad():
        expected = model(x)
        plain, corrected = quantized()(x), quantized(BiasCorrection())(x)
    shift = (plain - expected).mean(0).abs().mean()
    assert (corrected - expected).mean(0).abs().mean() < 0.15 * shift
    assert sqnr(expected, corrected) > sqnr(expected, plain) + 1


class Twice(nn.Module):
    """One layer, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(functional.relu(self.conv(x)))


def test_bias_correction_tells_the_calls_of_a_layer_apart():
    torch.manual_seed(0)
    model = Twice().eval()
    batches = [torch.randn(count, 4, 8, 8) for count in (8, 8, 3)]
    recipe = qt.Recipe("test", mapping_of("int3"), (BiasCorrection(),))
    plain = qt.quantize(model, batches, qt.Recipe("plain", mapping_of("int3")), progress=False)
    corrected = qt.quantize(model, batches, recipe, progress=False)
    x = torch.cat(batches)
    with torch.no_grad():
        shifts = [(q(x) - model(x)).mean((0, 2, 3)).abs().mean() for q in (plain, corrected)]
    assert shifts[1] < 0.15 * shifts[0]


def test_the_simulation_computes_what_the_converted_model_does(model, batches):
    prepared = qt.prepare(model, mapping_of("int4"), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    context = Context(prepared, [(batch,) for batch in batches], progress=False)
    before = context.run((batches[0],))
    with context.simulated():
        simulated = context.run((batches[0],))
    with torch.no_grad():
        expected = qt.convert(prepared)(batches[0])
        assert sqnr(expected, simulated) > 40
        assert sqnr(expected, before) < 30
        assert torch.equal(before, prepared(batches[0]))  # all is as it was


def test_a_pinned_weight_is_what_convert_uses(model, batches):
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping("x86"), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    layer = next(layer for layer in Context(prepared, []).layers if layer.name == "second")
    codes = torch.randint(-100, 100, layer.module.weight.shape).to(torch.int8)
    pin_weight(layer.module, IntegerWeight(codes, torch.full((8,), 0.5)))
    converted = qt.convert(prepared)
    second = next(m for m in converted.modules() if getattr(m, "source", "") == "second")
    assert torch.equal(second.weight, codes)
    assert torch.equal(layer.module.weight, codes.float() * 0.5)


def test_layers_are_recorded_in_their_place(model, batches):
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping("x86"), (batches[0],))
    context = Context(prepared, [(batch,) for batch in batches])
    assert [layer.name for layer in context.layers] == ["conv", "second", "fc"]
    inputs = context.inputs_of(context.layers[1])
    with torch.no_grad():
        expected = functional.relu(model.norm(model.conv(batches[2])))
    assert len(inputs) == 4
    torch.testing.assert_close(inputs[2], expected)
    seen = []
    context.watch(context.layers[1:], lambda layer, y: seen.append((layer.name, y.shape[1])))
    assert seen == [("second", 8), ("fc", 4)] * 4


def test_passes_run_before_or_after_calibration(model, batches):
    seen = []

    @register_algorithm("look")
    @dataclass(frozen=True)
    class Look(Algorithm):
        when: str = "x"
        stage = BEFORE

        def run(self, context: Context) -> None:
            observer = context.layers[0].output_observer()
            seen.append((self.when, observer.calibrated(), len(context.batches)))

    recipe = qt.Recipe("test", mapping_of("int8"), (Look("early"), BiasCorrection()))
    qt.quantize(model, iter(batches), recipe, max_batches=3, progress=False)
    assert seen == [("early", False, 3)]
    with pytest.raises(ValueError, match="runs before calibration follows one that runs after"):
        qt.Recipe("test", mapping_of("int8"), (BiasCorrection(), Look()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2 is newer than 1"),
        ({"version": None}, "version must be 1"),
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"target": "x86"}, "either mapping or target"),
        ({"passes": ["adarond"]}, "unknown algorithm 'adarond': use one of"),
        ({"passes": [{"name": "bias_correction", "x": 1}]}, r"has no option \['x'\]"),
        ({"passes": [3]}, "a pass is a name or an object"),
        ({"passes": "bias_correction"}, "passes must be a list"),
    ],
)
def test_a_bad_recipe_is_explained(change, message, tmp_path):
    data = {**qt.get_recipe("w8a8").to_dict(), **change}
    with pytest.raises(ValueError, match=message):
        qt.Recipe.from_dict(data)
    with pytest.raises(ValueError, match="unknown recipe 'w9a9': use one of w8a8"):
        qt.get_recipe("w9a9")
    (tmp_path / "r.json").write_text("{")
    with pytest.raises(ValueError, match=r"r\.json"):
        qt.get_recipe(tmp_path / "r.json")


def test_no_data_is_said(model):
    with pytest.raises(ValueError, match="the loader is empty"):
        qt.quantize(model, [], progress=False)
    with pytest.raises(ValueError, match="unknown algorithm"):
        make_algorithm("nothing")


class Either(nn.Module):
    """Of two parts, the inputs decide which is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = (
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.large(x) if x.sum() > 1e6 else self.small(x)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w4a4", "qnnpack"])
def test_a_layer_that_data_does_not_reach_stays_float_or_is_named(name):
    torch.manual_seed(0)
    model, batches = Either().eval(), [torch.randn(8, 6)]
    quantized = qt.quantize(model, batches, name, progress=False)
    large = torch.full((2, 6), 1e6)
    with torch.no_grad():
        assert torch.equal(quantized(large), model(large))
        assert sqnr(model(batches[0]), quantized(batches[0])) > 12
    with pytest.raises(RuntimeError, match=r"large\..* has seen no data: run qt.calibrate"):
        qt.quantize(model, batches, name, example_inputs=(large,), progress=False)
