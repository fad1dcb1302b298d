"""Algorithms that put statistics right: analytic bias correction, batch-norm re-estimation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.algorithms import (
    Algorithm,
    AnalyticBiasCorrection,
    BatchNormReestimation,
    BiasCorrection,
    Context,
)
from qtoolkit.algorithms.bias_correction import _shift
from qtoolkit.algorithms.moments import clipped_normal, expected_output, input_moments


@pytest.mark.parametrize("upper", [None, 1.5])
def test_moments_of_a_clipped_normal_value_are_those_of_samples(upper):
    mean, deviation = torch.tensor([-1.0, 0.0, 0.7, 3.0]), torch.tensor([1.0, 0.5, 2.0, 0.2])
    generator = torch.Generator().manual_seed(0)
    samples = mean + deviation * torch.randn(400_000, 4, generator=generator)
    samples = samples.clamp(0.0, upper)
    found = clipped_normal(mean, deviation**2, upper)
    torch.testing.assert_close(found[0], samples.mean(0), rtol=0, atol=0.01)
    torch.testing.assert_close(found[1], samples.var(0), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 4, 3, groups=2, bias=False),
        nn.ConvTranspose2d(6, 4, 2, 2, groups=2, bias=False),
        nn.Linear(6, 4, bias=False),
    ],
)
def test_the_expected_output_is_that_of_a_constant_input(layer):
    mean = torch.arange(6.0) - 2
    x = mean if isinstance(layer, nn.Linear) else mean.reshape(1, 6, 1, 1).expand(1, 6, 6, 6)
    with torch.no_grad():
        y = layer(x)
        wanted = y if isinstance(layer, nn.Linear) else y.mean((0, 2, 3))
        torch.testing.assert_close(expected_output(layer, layer.weight, mean), wanted)


class Net(nn.Module):
    """Normalized layers with ReLU and ReLU6, a residual addition, and a layer without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 8, 1)
        self.conv4 = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)))
        x = functional.relu6(self.norm2(self.conv2(x)) + x)
        x = functional.relu(self.conv4(self.conv3(x)))
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def settled(seed: int = 0) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.uniform_(-0.5, 0.5)
            norm.momentum = None
        for _ in range(4):
            model(torch.randn(32, 3, 10, 10))
    return model.eval(), [torch.randn(16, 3, 10, 10) for _ in range(4)]


def mapping_of(bits: str) -> qt.QConfigMapping:
    weight = qt.TensorSpec(bits, "per_channel", symmetric=True, observer="per_channel_minmax")
    return qt.QConfigMapping().set_global(qt.QConfig(qt.TensorSpec("uint8"), weight))


def test_means_that_are_known_without_data_are_those_of_data():
    model, batches = settled()
    prepared = qt.prepare(model, mapping_of("int8"), (batches[0],))
    context = Context(prepared, [(batch,) for batch in batches], progress=False)
    known = {node.name: moments for node, moments in input_moments(prepared).items()}
    assert set(known) == {"conv2", "conv3", "conv4", "fc"}
    for layer in context.layers[1:]:
        inputs = torch.cat(context.inputs_of(layer))
        wanted = inputs.movedim(1, 0).flatten(1).mean(1)
        error = (known[layer.match.anchor.name][0] - wanted).norm() / wanted.norm()
        assert error < 0.2, layer.name  # values are taken as independent and normal


def noise(model: nn.Module, batches: list[Tensor], *passes: Algorithm) -> tuple[float, float]:
    """Squared mean, and mean square, of the outputs' errors."""
    recipe = qt.Recipe("test", mapping_of("int3"), passes)
    with torch.no_grad():
        x = torch.cat(batches)
        error = qt.quantize(model, batches, recipe, progress=False)(x) - model(x)
    return float(error.mean(0).square().sum()), float(error.square().sum(1).mean())


def test_both_raise_the_models_quality():
    model, batches = settled()
    plain, analytic, empirical, estimated = (
        noise(model, batches, *passes)
        for passes in (
            (),
            (AnalyticBiasCorrection(),),
            (BiasCorrection(),),
            (BatchNormReestimation(), BiasCorrection()),
        )
    )
    assert analytic[0] < 0.5 * plain[0]
    assert empirical[0] < analytic[0]
    assert estimated[1] < 0.5 * plain[1]


def test_reestimation_gives_layers_the_float_networks_statistics():
    model, batches = settled()
    prepared = qt.prepare(model, mapping_of("int3"), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    context = Context(prepared, [(batch,) for batch in batches], progress=False)
    BatchNormReestimation().run(context)
    converted = qt.convert(prepared)
    found: dict[str, list[Tensor]] = {"conv1": [], "conv2": []}
    outputs: dict[str, list[Tensor]] = {"conv1": [], "conv2": []}
    layers = [layer for layer in context.layers if layer.name in found]
    with context.simulated():
        context.watch(layers, lambda layer, y: found[layer.name].append(y))
    context.watch(layers, lambda layer, y: outputs[layer.name].append(y), reference=True)
    for name in found:
        a, b = torch.cat(found[name]), torch.cat(outputs[name])
        torch.testing.assert_close(a.mean((0, 2, 3)), b.mean((0, 2, 3)), rtol=0, atol=1e-4)
        torch.testing.assert_close(a.std((0, 2, 3)), b.std((0, 2, 3)), rtol=1e-3, atol=0)
    with torch.no_grad(), context.simulated():
        torch.testing.assert_close(
            converted(batches[0]), context.run((batches[0],)), rtol=0.1, atol=0.05
        )


def test_a_shift_that_few_samples_show_by_chance_is_not_corrected():
    model, batches = settled()
    context = Context(qt.prepare(model, mapping_of("int8"), (batches[0],)), [], progress=False)
    layer = context.layers[-1]
    generator = torch.Generator().manual_seed(0)
    wanted = torch.zeros(16, 4000)
    chance = torch.randn(16, 4000, generator=generator)
    found = _shift(layer, [chance], [wanted])
    assert found.norm() < 0.3 * chance.mean(0).norm()
    real = _shift(layer, [0.1 * chance + 1], [wanted])
    # Of a shift of 1 with a standard error of 0.025, 0.05 ** 2 is taken off.
    torch.testing.assert_close(real, 0.1 * chance.mean(0) + 1, rtol=1e-2, atol=0)
    assert torch.equal(_shift(layer, [chance[:1]], [wanted[:1]]), chance[0])
