"""Algorithms that rescale channels: equalization, SmoothQuant, activation-aware scales."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.algorithms import (
    ActivationAwareScales,
    Algorithm,
    Context,
    CrossLayerEqualization,
    SmoothQuant,
)
from qtoolkit.algorithms.activations import linear_links
from qtoolkit.algorithms.scaling import find_links

PER_TENSOR = qt.QConfig(
    qt.TensorSpec("uint8"), qt.TensorSpec("int8", symmetric=True, observer="minmax")
)


def sqnr(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - actual).square().sum()))


class Chain(nn.Module):
    """Layers of every kind in a row, a residual addition, and a flattening before the last one."""

    def __init__(self, relu: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(8, 12, 2, 2)
        self.last = nn.Conv2d(12, 4, 3, 2, 1)
        self.fc1 = nn.Linear(4 * 16, 10)
        self.fc2 = nn.Linear(10, 5)
        self.relu = relu()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.norm(self.first(x)))
        x = self.point(functional.leaky_relu(self.depthwise(x)))
        x = self.relu(self.grouped(x) + x)
        x = self.relu(self.last(self.relu(self.up(functional.max_pool2d(x, 2)))))
        return self.fc2(self.relu(self.fc1(x.flatten(1))))


def rescaled(model: nn.Module, pairs: list[tuple[str, str]], seed: int = 0) -> nn.Module:
    """Channels multiplied by up to 30 or divided by that, without a change of what it computes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for before, after in pairs:
            first, second = model.get_submodule(before), model.get_submodule(after)
            factor = 30 ** (2 * torch.rand(first.weight.shape[0], generator=generator) - 1)
            shape = (-1, *([1] * (first.weight.dim() - 1)))
            first.weight.mul_(factor.reshape(shape))
            first.bias.mul_(factor)
            if getattr(second, "groups", 1) > 1:
                second.weight.div_(factor.reshape(shape))
            else:
                second.weight.div_(factor.reshape(1, -1, *([1] * (second.weight.dim() - 2))))
    return model


def prepared_of(model: nn.Module, x: torch.Tensor, qconfig: qt.QConfig = PER_TENSOR) -> nn.Module:
    return qt.prepare(model, qt.QConfigMapping().set_global(qconfig), (x,))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def run(prepared: nn.Module, algorithm: Algorithm, *batches: torch.Tensor) -> Context:
    context = Context(prepared, [(batch,) for batch in batches], progress=False)
    algorithm.run(context)
    return context


@pytest.mark.parametrize("relu", [nn.ReLU, nn.ReLU6])
def test_equalization_changes_no_output_and_evens_ranges(relu, x):
    torch.manual_seed(0)
    model = Chain(relu).eval()
    prepared = prepared_of(model, x)
    run(prepared, CrossLayerEqualization(), x)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-5)
    found = {
        (link.path, link.readers[0].path): link.made_ranges() / link.read_ranges()
        for link in find_links(prepared)
    }
    # Not (point, grouped): that value is added to another one. Nor (grouped, up), the sum.
    assert set(found) == {
        ("first", "depthwise"),
        ("depthwise", "point"),
        ("up", "last"),
        ("last", "fc1"),
        ("fc1", "fc2"),
    }
    if relu is nn.ReLU:
        for ratio in found.values():
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.02, atol=0)


def test_a_relu6_that_clips_a_channel_keeps_its_scale(x):
    torch.manual_seed(0)
    model = Chain(nn.ReLU6).eval()
    with torch.no_grad():
        model.norm.weight[:4] *= 20
    prepared = prepared_of(model, x)
    before = prepared.first.weight.clone()
    run(prepared, CrossLayerEqualization(), x)
    clipped = torch.relu(model.norm(model.first(x))).amax((0, 2, 3)) >= 6
    same = (prepared.first.weight == before).flatten(1).all(1)
    assert clipped[:4].all()
    assert not clipped.all()
    assert torch.equal(same, clipped)
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-5, atol=1e-5)


def test_equalization_repairs_a_network_that_was_rescaled(x):
    torch.manual_seed(0)
    model = Chain().eval()
    pairs = [("depthwise", "point"), ("fc1", "fc2")]
    broken = rescaled(model, pairs)
    with torch.no_grad():
        expected = broken(x)

    def found(*passes: Algorithm) -> float:
        mapping = qt.QConfigMapping().set_global(PER_TENSOR)
        recipe = qt.Recipe("test", mapping, passes)
        return sqnr(expected, qt.quantize(broken, [x], recipe, progress=False)(x))

    assert found(CrossLayerEqualization()) > found() + 6


class Shared(nn.Module):
    """A layer that is called twice, and a weight that the model reads itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Linear(8, 8), nn.Linear(8, 8)
        self.read = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(torch.relu(self.twice(torch.relu(self.first(x)))))
        return self.read(torch.relu(x)) + self.read.weight.sum()


def test_weights_that_have_other_users_are_left_alone():
    model = Shared().eval()
    assert find_links(prepared_of(model, torch.randn(2, 8))) == []


class Attention(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        if fused:
            self.qkv = nn.Linear(32, 96)
        else:
            self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.proj = nn.Linear(32, 32)
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)
        self.fused = fused

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, c = x.shape
        h = self.norm1(x)
        if self.fused:
            q, k, v = self.qkv(h).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (p(h).view(b, n, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        a = (q @ k.transpose(-2, -1) * 8**-0.5).softmax(-1)
        x = x + self.proj((a @ v).transpose(1, 2).reshape(b, n, c))
        return x + self.fc2(torch.relu(self.fc1(self.norm2(x))))


def with_outliers(*, fused: bool = True) -> tuple[nn.Module, torch.Tensor]:
    """An attention whose normalized values have three channels far larger than the others."""
    torch.manual_seed(0)
    model = Attention(fused=fused).eval()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2):
            norm.weight[:3] *= 60
        for name, layer in model.named_children():
            if isinstance(layer, nn.Linear) and name not in ("proj", "fc2"):
                layer.weight[:, :3] /= 60
    return model, torch.randn(8, 10, 32)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("algorithm", [SmoothQuant(), ActivationAwareScales()])
def test_activation_scales_change_no_output_and_reach_attention(algorithm, fused):
    model, x = with_outliers(fused=fused)
    prepared = prepared_of(model, x)
    context = run(prepared, algorithm, x)
    links = {(link.path, *(r.path for r in link.readers)) for link in linear_links(context)}
    inputs = ("qkv",) if fused else ("q", "k", "v")
    assert links == {
        ("norm1", *inputs),
        ("qkv" if fused else "v", "proj"),
        ("norm2", "fc1"),
        ("fc1", "fc2"),
    }
    with torch.no_grad():
        torch.testing.assert_close(prepared(x), model(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(prepared.norm1.weight, model.norm1.weight)


def test_smooth_quant_takes_outliers_out_of_activations():
    model, x = with_outliers()
    prepared = prepared_of(model, x)
    run(prepared, SmoothQuant(0.5), x)
    with torch.no_grad():
        before, after = (m.norm1(x).abs().amax((0, 1)) for m in (model, prepared))
    assert after.max() / after.median() < 0.2 * before.max() / before.median()


@pytest.mark.parametrize("algorithm", [SmoothQuant(), ActivationAwareScales()])
def test_activation_scales_raise_the_quality_of_a_network_with_outliers(algorithm):
    model, x = with_outliers()
    mapping = qt.get_default_qconfig_mapping("x86")
    with torch.no_grad():
        expected = model(x)
        plain, smooth = (
            sqnr(expected, qt.quantize(model, [x], qt.Recipe("t", mapping, p), progress=False)(x))
            for p in ((), (algorithm,))
        )
    assert smooth > plain + 3


def test_alpha_out_of_range_is_said():
    with pytest.raises(ValueError, match="alpha must be from 0 to 1, got 2"):
        SmoothQuant(2)
