"""Transposed and 1-D convolutions through the workflow."""

from __future__ import annotations

import io
import pickle

import pytest
import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn

import qtoolkit as qt


class UNet(nn.Module):
    """Upsampling by transposed convolutions of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.down2 = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU6())
        self.up1 = nn.Sequential(
            nn.ConvTranspose2d(16, 8, 3, 2, 1, 1, groups=4, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
        )
        self.up2 = nn.Sequential(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8, bias=False)
        self.head = nn.ConvTranspose2d(8, 2, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.up1(self.down2(a))
        return self.head(self.depthwise(self.up2(torch.cat([a, b], 1))))


class Sequence(nn.Module):
    """A residual network of 1-D convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(6, 16, 7, 2, 3, bias=False), nn.BatchNorm1d(16), nn.ReLU()
        )
        self.block = nn.Sequential(
            nn.Conv1d(16, 16, 3, padding="same", dilation=2, groups=16),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 16, 1),
            nn.BatchNorm1d(16),
        )
        self.last = nn.Conv1d(16, 8, 5, padding="valid", groups=2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.block(x) + x)
        return self.fc(self.last(x).mean(2))


NETWORKS = {"unet": (UNet, (4, 3, 16, 24), 28), "sequence": (Sequence, (4, 6, 40), 28)}


@pytest.fixture(params=NETWORKS)
def network(request):
    make, shape, least = NETWORKS[request.param]
    torch.manual_seed(0)
    return settle(make(), shape), batches(shape), least


def convert(model, data, mapping=None):
    prepared = qt.prepare(model, mapping, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def test_nothing_stays_float_and_all_is_fused(network):
    model, data, least = network
    quantized = convert(model, data)
    assert not qt.explain(quantized).float_layers, qt.explain(quantized)
    assert not any(isinstance(m, qt.nn.BatchNorm2d | qt.nn.ReLU) for m in quantized.modules())
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > least
        x = torch.cat([data[0]] * 2, -1)[:3]
        assert sqnr(model(x), quantized(x)) > least - 4


@pytest.mark.parametrize("target", ["qnnpack", "tensorrt"])
def test_other_presets_convert(network, target):
    model, data, least = network
    quantized = convert(model, data, qt.get_default_qconfig_mapping(target))
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > least - 10


def test_script_and_pickle_give_the_same_bits(network):
    model, data, _ = network
    quantized = convert(model, data)
    expected = quantized(data[0])
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(data[0]), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(quantized), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(data[0]), expected)
    program = torch.export.export(quantized, (data[0],))
    assert torch.equal(program.module()(data[0]), expected)


@pytest.mark.parametrize("target", ["x86", "qnnpack"])
def test_a_trained_network_converts_to_what_it_computes(network, target):
    model, data, _ = network
    mapping = qt.get_default_qat_qconfig_mapping(target)
    qat = qt.prepare_qat(model, mapping, example_inputs=(data[0],))
    optimizer = torch.optim.SGD(qat.parameters(), 1e-4)
    for x in data:
        qat(x).square().mean().backward()
        optimizer.step()
    assert all(p.grad is not None for p in qat.parameters())
    qat.eval()
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert sqnr(qat(data[0]), quantized(data[0])) > 40


def test_a_checkpoint_of_the_float_model_loads_into_the_trained_one(network):
    model, data, _ = network
    qat = qt.prepare_qat(model, example_inputs=(data[0],))
    missing, unexpected = qat.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not set(missing) & set(model.state_dict())


def test_the_weight_of_a_transposed_convolution_lies_as_torchs(network):
    model, data, _ = network
    if not isinstance(model, UNet):
        pytest.skip("it has none")
    head = convert(model, data).head
    assert head.weight.shape == model.head.weight.shape
    real = head.weight.float() * head.weight_scale.reshape(1, -1, 1, 1)
    assert sqnr(model.head.weight, real) > 35


def test_low_bit_weights_of_transposed_convolutions():
    torch.manual_seed(0)
    model, data = settle(UNet(), (4, 3, 16, 24)), batches((4, 3, 16, 24))
    mapping = qt.low_bit_qconfig_mapping(model, "w4a4")
    qat = qt.prepare_qat(model, mapping, example_inputs=(data[0],))
    for x in data:
        qat(x).square().mean().backward()
    qat.eval()
    with torch.no_grad():
        assert sqnr(qat(data[0]), qt.convert(qat)(data[0])) > 40


def test_an_output_size_keeps_a_transposed_convolution_in_float():
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 3, 2), nn.ConvTranspose2d(4, 3, 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.conv(x), output_size=x.shape)

    model, data = Sized(), batches((2, 3, 16, 16))
    quantized = convert(model, data)
    assert [layer.name for layer in qt.explain(quantized).float_layers] == ["up"]
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25
