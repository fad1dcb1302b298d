"""Formats below 8 bits: what trains, what converts to integer kernels, what stays simulated."""

from __future__ import annotations

import pytest
import torch
from networks import Kinds, ResNet, batches, settle, sqnr
from torch import nn

import qtoolkit as qt
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec

X = torch.randn(2, 3, 32, 32)


def activation(format: str, **options) -> TensorSpec:
    return TensorSpec(format, observer="moving_average", **options)


def weight(format: str, **options) -> TensorSpec:
    options = {"granularity": "per_channel", "observer": "per_channel_minmax", **options}
    return TensorSpec(format, symmetric=True, **options)


def mapping_of(activation: TensorSpec, weight: TensorSpec) -> QConfigMapping:
    return QConfigMapping().set_global(QConfig(activation, weight))


def trained_qat(mapping: QConfigMapping) -> nn.Module:
    torch.manual_seed(0)
    qat = qt.prepare_qat(settle(Kinds(), (8, 3, 32, 32)), mapping, example_inputs=(X,))
    for x in batches((8, 3, 32, 32)):
        qat(x)
    return qat.eval()


@pytest.mark.parametrize("weight_format", ["int8", "int6", "int4", "int3", "int2"])
@pytest.mark.parametrize("activation_format", ["uint8", "uint5", "uint4", "uint2", "int4", "int3"])
def test_converted_model_computes_what_training_promised(activation_format, weight_format):
    qat = trained_qat(mapping_of(activation(activation_format), weight(weight_format)))
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    x = batches((8, 3, 32, 32), 1, seed=7)[0]
    with torch.no_grad():
        print(sqnr(qat(x), quantized(x)))
        assert sqnr(qat(x), quantized(x)) > 35


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
    weights = [b for n, b in quantized.named_buffers() if n.endswith(".weight") and b.dtype == torch.int8]
    assert all(int(w.abs().max()) == 3 for w in weights)


def test_post_training_quantization_to_4_bits():
    model = settle(ResNet(), (8, 1, 8, 8))
    data = batches((16, 1, 8, 8))
    mapping = mapping_of(TensorSpec("uint4"), weight("int4"))
    prepared = qt.prepare(model, mapping, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    quantized = qt.convert(prepared)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        print(sqnr(model(data[0]), quantized(data[0])))
        assert 5 < sqnr(model(data[0]), quantized(data[0])) < 20


def test_post_training_quantization_has_no_learned_method():
    mapping = mapping_of(activation("uint4"), weight("int4"))
