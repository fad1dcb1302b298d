"""Quantization-aware training."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import Kinds, ResNet, batches, digits, settle, sqnr, train, trained
from torch import nn

import qtoolkit as qt

X = torch.randn(2, 1, 8, 8)


def prepared_resnet(target: str = "x86") -> nn.Module:
    mapping = qt.get_default_qat_qconfig_mapping(target)
    return qt.prepare_qat(trained(), mapping, example_inputs=(X,))


@pytest.fixture(scope="module")
def tuned() -> nn.Module:
    torch.manual_seed(0)
    qat = prepared_resnet()
    train(qat, 1, 0.005)
    qt.freeze_bn(qat)
    qt.freeze_observers(qat)
    train(qat, 1, 0.001)
    return qat


def test_accuracy_after_training(tuned):
    test = digits()[1]
    float_accuracy = qt.evaluate(trained(), test, progress=False)
    accuracy = qt.evaluate(qt.convert(tuned), test, progress=False)
    assert accuracy >= float_accuracy - 0.006


def test_converted_model_computes_what_training_promised(tuned):
    x = torch.cat([x for x, _ in digits()[1]])
    with torch.no_grad():
        promised = copy.deepcopy(tuned).eval()(x)
        converted = qt.convert(tuned)(x)
    assert sqnr(promised, converted) > 45
    assert torch.equal(promised.argmax(1), converted.argmax(1))


@pytest.mark.parametrize("target", ["x86", "qnnpack", "tensorrt", "tflite"])
def test_converted_model_computes_what_training_promised_for_every_layout(target):
    model = settle(Kinds(), (8, 3, 32, 32))
    # Batch norm factors of either sign and of zero.
    with torch.no_grad():
        model.depthwise_bn.weight[::3] *= -1
        model.depthwise_bn.weight[1] = 0
    mapping = qt.get_default_qat_qconfig_mapping(target)
    torch.manual_seed(0)
    qat = qt.prepare_qat(model, mapping, example_inputs=(torch.randn(2, 3, 32, 32),))
    for x in batches((8, 3, 32, 32)):
        qat(x)
    qat.eval()
    x = batches((8, 3, 32, 32), 1, seed=7)[0]
    with torch.no_grad():
        assert sqnr(qat(x), qt.convert(qat)(x)) > 35


def test_batch_statistics_are_those_of_the_quantized_convolution():
    qat = prepared_resnet()
    x = digits()[0][0][0]
    seen = []
    qat.bn1.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    before = qat.bn1.running_mean.clone()
    qat(x)
    fake_weight = qat.conv1.weight_fake_quant(qat.conv1.weight)
    assert not torch.equal(fake_weight, qat.conv1.weight)
    x_fq = qat.x_fake_quantize.eval()(x)
    expected = nn.functional.conv2d(x_fq, fake_weight, padding=1)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    mean = expected.mean((0, 2, 3))
    assert torch.allclose(qat.bn1.running_mean, 0.9 * before + 0.1 * mean, atol=1e-5)


def test_frozen_batch_norm_uses_and_keeps_its_running_statistics():
    qat = prepared_resnet()
    x, y = digits()[0][0]
    qat(x)
    qt.freeze_bn(qat)
    qt.freeze_observers(qat)
    qat.train()
    state = {k: v.clone() for k, v in qat.state_dict().items()}
    trained_output = qat(x)
    nn.functional.cross_entropy(trained_output, y).backward()
    for key, value in qat.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert qat.bn1.weight.grad is not None
    # Evaluation rounds biases as the converted model does.
    assert sqnr(qat.eval()(x), trained_output) > 40


def test_per_tensor_weights_are_quantized_with_the_batch_norm_folded_in():
    qat = prepared_resnet("qnnpack")
    qat(digits()[0][0][0])
    qat.eval()
    conv, bn = qat.conv1, qat.bn1
    factor = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    folded = conv.weight * factor.reshape(-1, 1, 1, 1)
    codes = conv.quantized_weight() * factor.reshape(-1, 1, 1, 1) / (folded.abs().max() / 127)
    assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_parameters_keep_their_names_and_a_float_checkpoint_loads():
    model = trained()
    qat = prepared_resnet()
    names = dict(model.named_parameters()).keys()
    assert set(names) == {name for name, _ in qat.named_parameters()}
    fresh = qt.prepare_qat(ResNet(), example_inputs=(X,))
    fresh.load_state_dict(model.state_dict())
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def test_training_resumes_from_a_checkpoint_exactly():
    torch.manual_seed(0)
    first = prepared_resnet()
    train(first, 1, 0.005)
    qt.freeze_bn(first)
    checkpoint = copy.deepcopy(first.state_dict())
    second = prepared_resnet()
    second.load_state_dict(checkpoint)
    second.train()
    assert train(first, 1, 0.005) == train(second, 1, 0.005)


def test_the_users_model_is_not_trained():
    model = settle(ResNet(), (8, 1, 8, 8))
    before = copy.deepcopy(model.state_dict())
    qat = qt.prepare_qat(model, example_inputs=(X,))
    train(qat, 1, 0.01)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not model.training


def test_deepcopy_of_a_qat_model_is_independent():
    qat = prepared_resnet("qnnpack")
    qat(X)
    other = copy.deepcopy(qat)
    train(other, 1, 0.01)
    assert other.conv1._batch_norm[0] is other.bn1
    assert not torch.equal(other.conv1.weight, qat.conv1.weight)
