"""Formats below 8 bits: what trains, what converts to integer kernels, what stays simulated."""

from __future__ import annotations

import pytest
import torch
from low_bit import activation, mapping_of, weight
from networks import Kinds, ResNet, batches, settle, sqnr
from torch import nn

import qtoolkit as qt
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec

X = torch.randn(2, 3, 32, 32)


def trained_qat(mapping: QConfigMapping) -> nn.Module:
    torch.manual_seed(0)
    qat = qt.prepare_qat(settle(Kinds(), (8, 3, 32, 32)), mapping, example_inputs=(X,))
    for x in batches((8, 3, 32, 32)):
        qat(x)
    return qat.eval()


@pytest.mark.parametrize(
    ("activation_format", "weight_format", "least"),
    [
        ("uint8", "int6", 45),
        ("uint8", "int4", 45),
        ("int8", "int2", 45),
        ("uint5", "int4", 35),
        # One code in a thousand that a rounded bias turns is 30 dB where a code is 1/15.
        ("uint4", "int4", 28),
        ("int4", "int3", 45),
        ("uint2", "int2", 45),
    ],
)
def test_converted_model_computes_what_training_promised(activation_format, weight_format, least):
    qat = trained_qat(mapping_of(activation(activation_format), weight(weight_format)))
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    x = batches((8, 3, 32, 32), 1, seed=7)[0]
    with torch.no_grad():
        assert sqnr(qat(x), quantized(x)) > least


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_stay_in_the_range_of_their_format(symmetric):
    quantized = qt.convert(
        trained_qat(mapping_of(activation("int4", symmetric=symmetric), weight("int3")))
    )
    seen = []
    for module in quantized.modules():
        if isinstance(module, qt.nn.QuantizedModule):
            module.register_forward_hook(lambda module, args, y: seen.append(y))
    quantized(batches((8, 3, 32, 32), 1)[0])
    codes = [y for y in seen if not y.is_floating_point()]
    assert len(codes) > 10
    assert {y.dtype for y in codes} == {torch.int8}
    assert min(int(y.min()) for y in codes) == (-7 if symmetric else -8)
    assert max(int(y.max()) for y in codes) == 7


def test_weight_codes_are_multiples_of_those_of_their_format():
    qat = trained_qat(mapping_of(activation("uint8"), weight("int3")))
    quantized = qt.convert(qat)
    codes = quantized.grouped.weight
    assert codes.dtype == torch.int8
    for channel, float_channel in zip(codes, qat.grouped.quantized_weight()):
        step = channel.abs().max() // 3
        assert torch.equal(channel % step, torch.zeros_like(channel))
        original = float_channel / (float_channel.abs().max() / 3)
        assert torch.equal(channel / step, original.round())
    real = codes * quantized.grouped.weight_scale.reshape(-1, 1, 1, 1)
    assert torch.allclose(real, qat.grouped.quantized_weight(), rtol=1e-6)


def test_post_training_quantization_to_4_bits():
    model = settle(ResNet(), (8, 1, 8, 8))
    data = batches((16, 1, 8, 8))
    mapping = mapping_of(TensorSpec("uint4"), weight("int4"))
    prepared = qt.prepare(model, mapping, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    quantized = qt.convert(prepared)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert 8 < sqnr(model(data[0]), quantized(data[0])) < 25


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (TensorSpec("int4", "per_group", 0, 16, True, "per_group_minmax"), "per group"),
        (TensorSpec("int4", "per_channel", 1, None, True, "per_channel_minmax"), "axis 1"),
        (TensorSpec("int4", observer="minmax"), "zero point"),
        (TensorSpec("uint4", symmetric=True, observer="minmax"), "zero point"),
    ],
)
def test_a_weight_without_integer_kernel_stays_in_float_and_explain_says_why(spec, reason):
    mapping = qt.get_default_qconfig_mapping().set_module_name(
        "layer1.conv1", QConfig(TensorSpec(), spec)
    )
    prepared = qt.prepare(settle(ResNet(), (8, 1, 8, 8)), mapping, torch.randn(2, 1, 8, 8))
    layers = {layer.name: layer.reason for layer in qt.explain(prepared).float_layers}
    assert reason in layers["layer1.conv1"]
