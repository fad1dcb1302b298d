"""Products, and sums of tensors whose shapes differ, from float models to codes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import batches, settle, sqnr
from torch import nn
from torch.nn import functional as F

import qtoolkit as qt

DATA = batches((4, 8, 9, 9))


class SqueezeExcitation(nn.Module):
    """A gate for each channel, as in MobileNetV3 and EfficientNet."""

    def __init__(self, gate=nn.Hardsigmoid, product=lambda x, gate: gate * x) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 24, 3, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.act = nn.Hardswish(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(24, 8, 1)
        self.fc2 = nn.Conv2d(8, 24, 1)
        self.gate = gate()
        self.product = product
        self.last = nn.Conv2d(24, 8, 1)

    def forward(self, x):
        x = self.act(self.bn(self.conv(x)))
        gate = self.gate(self.fc2(F.relu(self.fc1(self.avgpool(x)))))
        return self.last(self.product(x, gate))


def quantize(model: nn.Module, data: list = DATA, mapping=None) -> nn.Module:
    prepared = qt.prepare(model, mapping, (data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def layers_of(model: nn.Module, kind: type) -> list:
    return [module for module in model.modules() if isinstance(module, kind)]


def inplace(x, gate):
    x *= gate
    return x


PRODUCTS = {
    "gate * x": lambda x, gate: gate * x,
    "torch.mul": torch.mul,
    "x.mul": lambda x, gate: x.mul(gate),
    "x.mul_": lambda x, gate: x.mul_(gate),
    "x *= gate": inplace,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_squeeze_and_excitation_stays_on_codes(name):
    model = settle(SqueezeExcitation(product=PRODUCTS[name]), (4, 8, 9, 9))
    quantized = quantize(model)
    assert not qt.explain(quantized).float_layers
    assert len(layers_of(quantized, qt.nn.Mul)) == 1
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 28


def test_kernels_of_a_product_are_named():
    quantized = quantize(settle(SqueezeExcitation(), (4, 8, 9, 9)))
    table = {layer.kind: layer for layer in qt.explain(quantized).layers}
    assert table["Mul"].kernel.startswith("mul (")
    assert table["Mul"].format == "8-bit x 8-bit -> uint8"


def test_relu_after_a_product_is_fused():
    model = settle(SqueezeExcitation(nn.Tanh, lambda x, gate: F.relu6(x * gate)), (4, 8, 9, 9))
    quantized = quantize(model)
    (mul,) = layers_of(quantized, qt.nn.Mul)
    assert mul.relu
    assert mul.upper == 6
    assert not layers_of(quantized, qt.nn.ReLU)
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 28


@pytest.mark.parametrize("target", ["x86", "qnnpack", "tensorrt"])
def test_presets_with_signed_codes_and_symmetric_ranges(target):
    model = settle(SqueezeExcitation(nn.Sigmoid), (4, 8, 9, 9))
    quantized = quantize(model, mapping=qt.get_default_qconfig_mapping(target))
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 20


def test_training_converts_to_its_own_values():
    model = settle(SqueezeExcitation(nn.Sigmoid), (4, 8, 9, 9))
    qat = qt.prepare_qat(model, None, (DATA[0],))
    for x in DATA:
        qat(x).square().sum().backward()
    assert all(p.grad is not None for p in qat.parameters())
    qat.eval()
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    assert len(layers_of(quantized, qt.nn.Mul)) == 1
    with torch.no_grad():
        assert sqnr(qat(DATA[0]), quantized(DATA[0])) > 60


def test_paths_copies_pickles_and_scripts_give_the_same_bits(tmp_path):
    from qtoolkit import _C

    quantized = quantize(settle(SqueezeExcitation(), (4, 8, 9, 9)))
    expected = quantized(DATA[0])
    assert torch.equal(copy.deepcopy(quantized)(DATA[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(DATA[0]), expected)
    qt.export.torchscript(quantized, tmp_path / "m.pt", example_inputs=(DATA[0],))
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(DATA[0]), expected)
    try:
        for path in _C.cpu_paths():
            _C.force_path(path)
            assert torch.equal(quantized(DATA[0]), expected), path
    finally:
        _C.force_path(None)


def test_sums_of_broadcast_shapes_stay_on_codes_and_are_not_fused():
    model = settle(SqueezeExcitation(nn.Sigmoid, lambda x, gate: x + gate), (4, 8, 9, 9))
    quantized = quantize(model)
    assert not qt.explain(quantized).float_layers
    assert len(layers_of(quantized, qt.nn.Add)) == 1
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 28
    qat = qt.prepare_qat(model, None, (DATA[0],))
    for x in DATA:
        qat(x).sum().backward()
    qat.eval()
    with torch.no_grad():
        assert sqnr(qat(DATA[0]), qt.convert(qat)(DATA[0])) > 60


def test_a_broadcast_sum_after_a_convolution_is_no_residual():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 9)
            self.bn = nn.BatchNorm2d(8)
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.c(F.relu(self.a(x) + self.bn(self.b(x))))

    model = settle(Sum(), (4, 8, 9, 9))
    quantized = quantize(model)
    (add,) = layers_of(quantized, qt.nn.Add)
    assert add.relu
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 28
    qat = qt.prepare_qat(model, None, (DATA[0],))
    for x in DATA:
        qat(x).sum().backward()
    assert not qt.explain(qt.convert(qat.eval())).float_layers


class Scaled(nn.Module):
    """A product with what a float layer makes, or with a parameter."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x):
        x = self.a(x)
        if self.kind == "parameter":
            return self.b(x * self.weight)
        return self.b(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5))


@pytest.mark.parametrize("kind", ["parameter", "norm"])
def test_products_with_float_values_stay_in_float(kind):
    quantized = quantize(settle(Scaled(kind), (16, 8)), batches((16, 8)))
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert "a float layer makes its input" in reasons.values()
    assert not layers_of(quantized, qt.nn.Mul)


def test_stochastic_depth_is_dropped_in_inference_and_drops_in_training():
    ops = pytest.importorskip("torchvision.ops")

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
            self.drop = ops.StochasticDepth(0.5, "row")

        def forward(self, x):
            x = self.a(x)
            return self.b(x + self.drop(self.b(x)))

    model = settle(Residual(), (4, 8, 9, 9))
    quantized = quantize(model)
    assert not qt.explain(quantized).float_layers
    assert not layers_of(quantized, qt.nn.Add)  # fused into the convolution
    with torch.no_grad():
        assert sqnr(model(DATA[0]), quantized(DATA[0])) > 28
    qat = qt.prepare_qat(model, None, (DATA[0],))
    outputs = torch.stack([qat(DATA[0]) for _ in range(8)])
    assert outputs[:, 0].std(0).max() > 0.01
    qat.eval()
    with torch.no_grad():
        assert sqnr(qat(DATA[0]), qt.convert(qat)(DATA[0])) > 60
