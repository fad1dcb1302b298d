"""Softmax and layer norm through the workflow."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt


class LayerNorm2d(nn.LayerNorm):
    """Torchvision's: over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OwnNorm(nn.Module):
    """As models from papers write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.ones(channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias, 1e-6)


class Mixer(nn.Module):
    """Patches, an MLP over tokens and one over channels, each with a layer norm of its own kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.image_norm = LayerNorm2d(24)
        self.tokens = nn.Sequential(OwnNorm(24), nn.Linear(24, 24), nn.GELU())
        self.norm = nn.LayerNorm(24, elementwise_affine=False)
        self.channels = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
        self.last = nn.LayerNorm(24, bias=False)
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.image_norm(self.patches(x)).flatten(2).transpose(1, 2)
        x = x + self.tokens(x)
        x = x + self.channels(functional.layer_norm(self.norm(x), (24,)))
        return self.head(self.last(x).mean(dim=1))


class Gates(nn.Module):
    """Softmax in three writings, over channels and over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.softmax, self.fc = nn.Softmax(dim=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.softmax(self.a(x))
        x = functional.softmax(self.b(x), dim=-1, dtype=torch.float32)
        return self.fc(torch.softmax(self.c(x).flatten(2), 1).mean(2))


NETWORKS = {"mixer": (Mixer, 25), "gates": (Gates, 25)}
SHAPE = (3, 3, 16, 20)


@pytest.fixture(params=NETWORKS)
def network(request):
    make, least = NETWORKS[request.param]
    torch.manual_seed(0)
    return settle(make(), SHAPE), batches(SHAPE), least


def prepared(model: nn.Module, data: list[Tensor]) -> nn.Module:
    model = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(model, data, progress=False)
    return model


def test_nothing_stays_float(network):
    model, data, least = network
    quantized = qt.convert(prepared(model, data))
    assert not qt.explain(quantized).float_layers, qt.explain(quantized)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > least


def test_script_copy_and_pickle_give_the_same_bits(network):
    model, data, _ = network
    observed = prepared(model, data)
    quantized = qt.convert(observed)
    expected = quantized(data[0])
    assert torch.equal(qt.convert(pickle.loads(pickle.dumps(observed)))(data[0]), expected)
    assert torch.equal(copy.deepcopy(quantized)(data[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(data[0]), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(quantized), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(data[0]), expected)
    program = torch.export.export(quantized, (data[0],))
    assert torch.equal(program.module()(data[0]), expected)


def test_a_trained_network_converts_to_what_it_computes(network):
    model, data, _ = network
    qat = qt.prepare_qat(model, example_inputs=(data[0],))
    missing, unexpected = qat.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(model.state_dict())
    optimizer = torch.optim.SGD(qat.parameters(), 1e-3)
    for x in data:
        qat(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in qat.parameters())
    qat.eval()
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert sqnr(qat(data[0]), quantized(data[0])) > 35


def test_a_norm_with_computed_parameters_stays_float():
    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), OwnNorm(8)
            self.scale = nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            x = functional.layer_norm(self.norm(self.a(x)), (8,), self.scale * 2)
            return self.b(x)

    data = batches((4, 8))
    model = Computed()
    quantized = qt.convert(prepared(model, data))
    assert [layer.kind for layer in qt.explain(quantized).float_layers].count("layer_norm") == 1
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25


def test_a_softmax_at_the_end_and_one_behind_a_float_layer_stay_float():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.cumsum(self.a(x), 1).softmax(-1)
            return self.b(x).softmax(1)

    data = batches((4, 8))
    model = Ends()
    quantized = qt.convert(prepared(model, data))
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert reasons["softmax"] == "a float layer makes its input"
    assert reasons["softmax_1"] == "only float layers use its output"
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25
