"""Static post-training quantization from a float model to integer layers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import Kinds, ResNet, batches, digits, settle, sqnr, trained
from torch import nn

import qtoolkit as qt
from qtoolkit.nn import QuantizedModule


def quantize(model: nn.Module, data: list[torch.Tensor], mapping=None) -> nn.Module:
    prepared = qt.prepare(model, mapping, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def resnet() -> tuple[nn.Module, nn.Module]:
    model = trained()
    return model, quantize(model, [x for x, _ in digits()[0][:8]])


def quantized_layers(model: nn.Module) -> dict[str, QuantizedModule]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def test_accuracy_on_digits_stays_within_half_a_point(resnet):
    model, quantized = resnet
    test = digits()[1]
    float_accuracy = qt.evaluate(model, test, progress=False)
    accuracy = qt.evaluate(quantized, test, progress=False)
    assert float_accuracy > 0.95
    assert accuracy >= float_accuracy - 0.005


def test_every_layer_of_a_resnet_is_integer_and_fused(resnet):
    _, quantized = resnet
    layers = quantized_layers(quantized)
    kinds = {name: type(layer).__name__ for name, layer in layers.items()}
    assert kinds.pop("fc") == "Linear"
    assert sorted(kinds.values()) == sorted(
        ["Quantize", "MaxPool2d", "AdaptiveAvgPool2d"] + ["Conv2d"] * 6
    )
    assert layers["layer1.conv2"].residual_scale is not None
    assert layers["layer1.conv2"].relu
    assert layers["layer2.conv2"].residual_scale is not None
    assert not layers["layer2.downsample.0"].relu
    assert layers["fc"].output_scale is None  # the logits are float32


def test_weights_are_plain_int8_buffers(resnet):
    _, quantized = resnet
    state = quantized.state_dict()
    assert state["layer1.conv1.weight"].dtype == torch.int8
    assert state["layer1.conv1.weight"].abs().max() == 127
    assert state["layer1.conv1.weight_scale"].shape == (16,)
    assert state["layer1.conv1.bias"].dtype == torch.int32
    assert list(quantized.parameters()) == []


def test_model_is_a_quarter_of_the_size(resnet):
    model, quantized = resnet
    assert qt.model_size(quantized) < 0.33 * qt.model_size(model)


def test_the_users_model_is_not_changed():
    model = settle(ResNet(), (8, 1, 8, 8)).train()
    before = copy.deepcopy(model.state_dict())
    names = [name for name, _ in model.named_modules()]
    quantize(model, batches((8, 1, 8, 8)))
    assert model.training
    assert [name for name, _ in model.named_modules()] == names
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_convert_leaves_the_prepared_model_usable():
    data = batches((4, 1, 8, 8))
    prepared = qt.prepare(settle(ResNet(), (8, 1, 8, 8)), example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    first = qt.convert(prepared)(data[0])
    assert not quantized_layers(prepared)
    assert torch.equal(first, qt.convert(prepared)(data[0]))


def test_every_kind_of_layer_is_quantized():
    model = settle(Kinds(), (8, 3, 32, 32))
    data = batches((4, 3, 32, 32))
    quantized = quantize(model, data)
    kinds = sorted({type(layer).__name__ for layer in quantized_layers(quantized).values()})
    assert kinds == [
        "Add",
        "AvgPool2d",
        "BatchNorm2d",
        "Cat",
        "Conv2d",
        "DepthwiseConv2d",
        "GlobalAvgPool2d",
        "Linear",
        "MaxPool2d",
        "Quantize",
    ]
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 22


@pytest.mark.parametrize("target", ["x86", "fbgemm", "qnnpack", "tensorrt", "openvino", "tflite"])
def test_every_preset_converts(target):
    model = settle(Kinds(), (8, 3, 32, 32))
    data = batches((4, 3, 32, 32))
    quantized = quantize(model, data, qt.get_default_qconfig_mapping(target))
    signed = target in ("tensorrt", "tflite")
    assert quantized.x_quantize(data[0]).dtype == (torch.int8 if signed else torch.uint8)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 16


def test_all_kernel_paths_give_the_same_bits(resnet):
    _, quantized = resnet
    x = digits()[1][0][0]
    expected = quantized(x)
    from qtoolkit import _C

    try:
        for path in _C.cpu_paths():
            _C.force_path(path)
            assert torch.equal(quantized(x), expected), path
            assert _C.last_path("conv2d") == path or path not in _C.kernel_paths("conv2d")
    finally:
        _C.force_path(None)


def test_deepcopy_and_pickle_give_the_same_bits(resnet):
    _, quantized = resnet
    x = digits()[1][0][0]
    expected = quantized(x)
    assert torch.equal(copy.deepcopy(quantized)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), expected)


def test_state_dict_moves_between_conversions(resnet):
    model, quantized = resnet
    other = quantize(model, [10 * x for x, _ in digits()[0][:2]])
    x = digits()[1][0][0]
    assert not torch.equal(other(x), quantized(x))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))


def test_prepared_model_survives_pickle():
    data = batches((4, 1, 8, 8))
    prepared = qt.prepare(settle(ResNet(), (8, 1, 8, 8)), example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(qt.convert(again)(data[0]), qt.convert(prepared)(data[0]))


def test_a_layer_kept_in_float_by_name_and_by_type():
    model = settle(ResNet(), (8, 1, 8, 8))
    data = batches((4, 1, 8, 8))
    mapping = (
        qt.get_default_qconfig_mapping("x86")
        .set_module_name("layer1.conv2", None)
        .set_module_type(nn.Linear, None)
    )
    quantized = quantize(model, data, mapping)
    assert type(quantized.layer1.conv2) is nn.Conv2d
    assert type(quantized.fc) is nn.Linear
    assert isinstance(quantized.layer1.conv1, qt.nn.Conv2d)
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert "qconfig" in reasons["layer1.conv2"]
    assert "qconfig" in reasons["fc"]
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 20


def test_a_layer_called_twice_gets_the_ranges_of_both_calls():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.conv(10 * torch.relu(self.conv(x)))

    model = settle(Twice(), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    convs = [m for m in quantized.modules() if isinstance(m, qt.nn.Conv2d)]
    assert len(convs) == 2
    assert convs[0].input_scale != convs[1].input_scale
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25


def test_two_convolutions_into_one_addition():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 8, 1)
            self.b = nn.Conv2d(4, 8, 3, padding=1)
            self.c = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return self.c(torch.relu(self.a(x) + self.b(x)))

    model = settle(Sum(), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    fused = [n for n, m in quantized_layers(quantized).items() if getattr(m, "relu", False)]
    assert fused == ["a"]
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25


def test_a_weight_channel_of_zeros_keeps_its_bias():
    model = settle(ResNet(), (8, 1, 8, 8))
    with torch.no_grad():
        model.fc.weight[3] = 0
        model.fc.bias[3] = 2.5
    data = batches((4, 1, 8, 8))
    assert torch.allclose(quantize(model, data)(data[0])[:, 3], torch.tensor(2.5), atol=1e-3)


def test_compare_measures_each_layer_and_the_output(resnet):
    model, quantized = resnet
    result = qt.compare(model, quantized, digits()[1], max_batches=2, progress=False)
    by_name = {layer.name: layer.sqnr for layer in result.layers}
    assert {"conv1", "layer1.conv1", "layer1.conv2", "layer2.downsample.0", "fc"} <= set(by_name)
    assert all(value > 20 for value in by_name.values()), by_name
    x = torch.cat([x for x, _ in digits()[1][:2]])
    with torch.no_grad():
        expected = sqnr(model(x), quantized(x))
    assert result.sqnr == pytest.approx(expected, abs=0.01)
    assert by_name["fc"] == pytest.approx(expected, abs=0.01)
    assert "layer2.downsample.0" in str(result)


def test_explain_names_kernels(resnet):
    _, quantized = resnet
    table = {layer.name: layer for layer in qt.explain(quantized).layers}
    assert table["layer1.conv1"].format == "uint8 x int8 -> uint8"
    assert table["layer1.conv1"].kernel.startswith("conv2d (")
    assert table["fc"].format == "uint8 x int8 -> float32"
    assert "layer1.conv1" in str(qt.explain(quantized))


def test_explain_works_on_a_prepared_model():
    prepared = qt.prepare(settle(ResNet(), (8, 1, 8, 8)), None, torch.randn(1, 1, 8, 8))
    assert "layer1.conv1" in {layer.name for layer in qt.explain(prepared).layers}


def test_an_empty_batch_gives_an_empty_result():
    model = settle(ResNet(), (8, 1, 8, 8))
    empty = quantize(model, batches((4, 1, 8, 8)))(torch.empty(0, 1, 8, 8))
    assert empty.shape == (0, 10)


def test_export_program_and_compiled_model_give_the_same_bits(resnet):
    _, quantized = resnet
    x = digits()[1][0][0]
    batch = torch.export.Dim("batch", min=2, max=256)
    program = torch.export.export(quantized, (x,), dynamic_shapes=({0: batch},))
    assert torch.equal(program.module()(x[:7]), quantized(x[:7]))
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), quantized(x))


class Inception(nn.Module):
    """Concatenations whose inputs nothing else reads, and one that something does."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 6, 1)
        self.b = nn.Conv2d(4, 6, 3, padding=1)
        self.c = nn.Conv2d(12, 6, 1)
        self.d = nn.Conv2d(18, 6, 1)

    def forward(self, x):
        both = torch.cat([torch.relu(self.a(x)), torch.relu(self.b(x))], 1)
        return self.d(torch.cat([both, torch.relu(self.c(both))], 1))


def test_inputs_of_a_concatenation_share_its_scale_unless_others_read_them():
    model = settle(Inception(), (4, 4, 8, 8))
    with torch.no_grad():
        model.c.weight *= 10
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    first, second = (m for m in quantized.modules() if isinstance(m, qt.nn.Cat))
    assert (first.input_scales == first.output_scale).all()
    assert second.input_scales[0] != second.output_scale  # c reads it too
    assert second.input_scales[1] == second.output_scale
    assert not any(isinstance(m, qt.observers.Observer) for m in quantized.modules())
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25
