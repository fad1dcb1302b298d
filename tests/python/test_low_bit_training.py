"""Training with few bits: accuracy on the digits, and what convert makes of it."""

from __future__ import annotations

import pytest
import torch
from low_bit import A8, INTEGER, MAPPINGS, W8, mapping_of, train_steps
from networks import ResNet, batches, digits, settle, sqnr, trained
from torch import nn

import qtoolkit as qt
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.qconfig import QConfig, TensorSpec

X = torch.randn(2, 1, 8, 8)


def images() -> torch.Tensor:
    return torch.cat([x for x, _ in digits()[1]])


def prepared(name: str, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = settle(ResNet(), (8, 1, 8, 8)) if model is None else model
    return qt.prepare_qat(model, MAPPINGS[name], example_inputs=(X,))


@pytest.mark.parametrize(
    ("bits", "method", "points"),
    [
        ("w8a8", "lsq", 0.3),
        ("w4a8", "observed", 1.0),
        ("w4a4", "lsq", 1.0),
        ("w4a4", "lsq+", 1.0),
        ("w4a4", "pact", 1.0),
        ("w2a4", "lsq", 2.5),
        ("ternary", "lsq", 2.5),
        ("ternary", "observed", 2.5),
        ("binary", "lsq", 5.0),
    ],
)
def test_accuracy_on_the_digits_and_of_the_converted_model(bits, method, points):
    torch.manual_seed(0)
    mapping = qt.low_bit_qconfig_mapping(trained(), bits, method=method)
    qat = qt.prepare_qat(trained(), mapping, example_inputs=(X,))
    train_steps(qat, 30)
    train_steps(qat, 15, 0.003)
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    test = digits()[1]
    float_accuracy = qt.evaluate(trained(), test, progress=False)
    assert qt.evaluate(quantized, test, progress=False) >= float_accuracy - points / 100
    x = images()
    with torch.no_grad():
        promised, converted = qat.eval()(x), quantized(x)
    assert sqnr(promised, converted) >= 35
    assert (promised.argmax(1) == converted.argmax(1)).float().mean() >= 0.995


@pytest.mark.parametrize("name", MAPPINGS)
def test_every_method_trains(name):
    qat = prepared(name)
    losses = train_steps(qat, 10, 0.03)
    assert all(torch.isfinite(torch.tensor(losses)))
    assert min(losses[-3:]) < losses[0]
    modules = [m for m in qat.modules() if isinstance(m, FakeQuantize)]
    assert all(m.ready for m in modules)
    for module in modules:
        for parameter in module.parameters():
            assert parameter.shape in ((1,), module.scale.shape)
            assert parameter.grad is not None
            assert torch.isfinite(parameter.grad).all()


@pytest.mark.parametrize("name", INTEGER)
def test_weight_codes_are_those_of_the_model_in_evaluation(name):
    qat = prepared(name)
    train_steps(qat, 3)
    qat.eval()
    for module in qat.modules():
        if not isinstance(module, qt.nn.qat.Conv2d | qt.nn.qat.Linear):
            continue
        with torch.no_grad():
            factor = module._fold_factor()
            shape = (-1, *([1] * (module.weight.dim() - 1)))
            weight = module.weight if factor is None else module.weight * factor.reshape(shape)
            expected = module.weight_fake_quant(weight)
            codes, scale = module.weight_fake_quant.integer_codes(weight)
        assert codes.dtype == torch.int8
        assert torch.equal(codes * scale.reshape(shape), expected)
        spec = module.weight_fake_quant.spec
        assert codes.min() >= spec.quant_min
        assert codes.max() <= spec.quant_max


@pytest.mark.parametrize("name", INTEGER)
def test_every_method_with_integers_converts(name):
    qat = prepared(name, trained())
    train_steps(qat, 8, 0.003)
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        # The image too has 4 bits here, where a code that a rounded bias turns weighs most.
        assert sqnr(qat.eval()(images()), quantized(images())) >= 25


@pytest.mark.parametrize("name", [name for name in MAPPINGS if name not in INTEGER])
def test_what_has_no_kernel_stays_simulated_and_gives_the_same(name):
    qat = prepared(name)
    train_steps(qat, 3)
    quantized = qt.convert(qat)
    layers = qt.explain(quantized).float_layers
    assert {"conv1", "layer1.conv1", "fc"} <= {layer.name for layer in layers}
    assert all("simulated in float" in layer.reason for layer in layers)
    x = images()
    with torch.no_grad():
        expected = qat.eval()(x)
        assert sqnr(expected, quantized(x)) > 60
        # Frozen in place: neither data nor mode change it.
        quantized.train()(100 * x)
        assert torch.equal(quantized.eval()(x), quantized(x))
        assert sqnr(expected, quantized(x)) > 60
    assert not any(parameter.requires_grad for parameter in quantized.parameters())
    with pytest.raises(ValueError, match="already"):
        qt.convert(quantized)


def test_integer_layers_beside_simulated_ones():
    fp8 = MAPPINGS["fp8"].global_qconfig
    mapping = mapping_of(A8, W8).set_module_name("layer1", fp8).set_module_name("layer2.conv2", fp8)
    torch.manual_seed(0)
    qat = qt.prepare_qat(trained(), mapping, example_inputs=(X,))
    train_steps(qat, 3)
    quantized = qt.convert(qat)
    integer = {m.source for m in quantized.modules() if isinstance(m, qt.nn.QuantizedModule)}
    assert {"conv1", "fc"} <= integer
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert "weights of format fp8_e5m2" in reasons["layer1.conv1"]
    assert "its input is of a format without" in reasons["layer2.conv1"]
    assert "simulated" in str(qt.explain(quantized))
    with torch.no_grad():
        assert sqnr(qat.eval()(images()), quantized(images())) > 35
    with pytest.raises(ValueError, match=r"simulates formats.*qt\.explain"):
        qt.export.torchscript(quantized, "model.pt", (X,))


def test_a_batch_norm_of_negative_factor_turns_codes_of_the_whole_format():
    model = settle(ResNet(), (8, 1, 8, 8))
    with torch.no_grad():
        model.bn1.weight[::2] *= -1
        model.conv1.weight.clamp_(max=0.3)
    spec = TensorSpec("int2", "per_channel", method="lsq")
    mapping = mapping_of(A8, spec)
    qat = qt.prepare_qat(model, mapping, example_inputs=(X,))
    for x in batches((8, 1, 8, 8)):
        qat(x)
    codes = qat.conv1.weight_fake_quant.integer_codes(qat.conv1.weight)[0]
    assert (int(codes.min()), int(codes.max())) == (-2, 1)
    x = batches((8, 1, 8, 8), 1, seed=5)[0]
    with torch.no_grad():
        assert sqnr(qat.eval()(x), qt.convert(qat)(x)) > 35


def test_8_bit_weights_of_the_whole_format_are_simulated():
    spec = TensorSpec("int8", "per_channel", method="lsq")
    mapping = mapping_of(A8, W8).set_module_name("fc", QConfig(A8, spec))
    qat = qt.prepare_qat(trained(), mapping, example_inputs=(X,))
    qat(digits()[0][0][0])
    (layer,) = qt.explain(qt.convert(qat)).float_layers
    assert layer.name == "fc"
    assert "the code -128" in layer.reason
