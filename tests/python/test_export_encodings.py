"""Float ONNX files with encodings beside them: what they name, and that it is what was observed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit.graph.prepare import is_observer

_WHY = "needs the extra: pip install 'qtoolkit[onnx]'"
onnx = pytest.importorskip("onnx", reason=_WHY)
pytest.importorskip("onnxruntime", reason=_WHY)
pytest.importorskip("onnxscript", reason=_WHY)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.body(x) + x)
        return self.head(self.up(x).flatten(2).transpose(1, 2)).mean(1)


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".encodings").read_text())


def tensors(path: Path) -> dict[str, str]:
    """The names of a file's tensors: inputs, values and initializers."""
    graph = onnx.load(path).graph
    found = {value.name: "input" for value in graph.input}
    found |= {name: node.op_type for node in graph.node for name in node.output}
    return found | {value.name: "initializer" for value in graph.initializer}


def by_name(path: Path, kind: str) -> dict[str, Any]:
    return {entry["name"]: entry for entry in document(path)[f"{kind}_encodings"]}


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(x) -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(x)
    return net.eval()


def prepared(model: nn.Module, x: Tensor, preset: str = "x86") -> nn.Module:
    result = qt.prepare(model, qt.get_default_qconfig_mapping(preset), (x,))
    return qt.calibrate(result, [(x,)], progress=False)


def observed(model: nn.Module, name: str) -> tuple[float, int]:
    scale, zero_point = model.get_submodule(name).calculate_qparams()
    return float(scale), int(zero_point)


def test_the_file_is_the_float_model_and_encodings_are_what_was_observed(model, x, tmp_path):
    calibrated = prepared(model, x)
    report = qt.export.onnx(calibrated, tmp_path / "m.onnx", (x,), form="encodings")
    assert report.outputs[0].sqnr > 100
    with torch.no_grad():
        torch.testing.assert_close(qt.export.load("onnx", report.path)(x), model(x))
    names, activations = tensors(report.path), by_name(report.path, "activation")
    assert "QuantizeLinear" not in names.values()
    assert "DequantizeLinear" not in names.values()
    assert activations.keys() <= names.keys()
    assert (names["x"], names["stem.0"], names["body"]) == ("input", "Relu", "Relu")
    assert names["body.branch"] == "Conv"
    observers = {name for name, module in calibrated.named_modules() if is_observer(module)}
    assert len(activations) == len(observers)
    for tensor, observer in (("x", "x_observer"), ("body.branch", "body_observer")):
        scale, zero_point = observed(calibrated, observer)
        entry = activations[tensor]
        assert (entry["scale"], entry["offset"]) == ([scale], [-zero_point])
        assert (entry["enc_type"], entry["bw"], entry["dtype"]) == ("PER_TENSOR", 8, "INT")
        assert not entry["is_sym"]


def test_weights_have_the_scales_of_convert_per_channel(model, x, tmp_path):
    calibrated = prepared(model, x, "tensorrt")
    report = qt.export.onnx(calibrated, tmp_path / "m.onnx", (x,), form="encodings")
    names, parameters = tensors(report.path), by_name(report.path, "param")
    assert parameters.keys() == {f"{n}.weight" for n in ("stem.0", "body", "up", "head")}
    converted = qt.convert(calibrated)
    for name, entry in parameters.items():
        assert names[name] == "initializer"
        layer = converted.get_submodule(name.removesuffix(".weight"))
        assert entry["scale"] == layer.weight_scale.reshape(-1).tolist()
        assert set(entry["offset"]) == {-128}
        assert entry["is_sym"]
        assert entry["enc_type"] == "PER_CHANNEL"
    for entry in by_name(report.path, "activation").values():
        assert entry["offset"] == [-128]  # int8 codes from -128, whose zero point is 0
        assert entry["is_sym"]


def test_a_trained_model_is_written_with_its_batch_norms_folded(model, x, tmp_path):
    qat = qt.prepare_qat(model, qt.get_default_qat_qconfig_mapping("x86"), (x,))
    for _ in range(2):
        qat(x)
    before = {name: tensor.clone() for name, tensor in qat.state_dict().items()
              if isinstance(tensor, Tensor)}  # fmt: skip
    report = qt.export.onnx(qat, tmp_path / "m.onnx", (x,), form="encodings")
    after = qat.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert report.outputs[0].sqnr > 100
    assert "BatchNormalization" not in tensors(report.path).values()
    weights = by_name(report.path, "param")
    layer = qt.convert(qat).get_submodule("stem.0")
    assert weights["stem.0.weight"]["scale"] == pytest.approx(layer.weight_scale.tolist(), rel=1e-6)
    scale, zero_point = observed(qat, "x_fake_quantize")
    entry = by_name(report.path, "activation")["x"]
    assert (entry["scale"], entry["offset"]) == ([scale], [-zero_point])


def test_a_converted_model_is_written_with_its_rounded_weights(model, x, tmp_path):
    quantized = qt.convert(prepared(model, x))
    report = qt.export.onnx(quantized, tmp_path / "m.onnx", (x,), form="encodings")
    assert report.outputs[0].sqnr > 100  # of the same float network in PyTorch
    layer = quantized.get_submodule("body")
    weight = next(t for t in onnx.load(report.path).graph.initializer if t.name == "body.weight")
    expected = layer.weight.float() * layer.weight_scale.reshape(-1, 1, 1, 1)
    assert torch.equal(torch.tensor(onnx.numpy_helper.to_array(weight)), expected)
    entry = by_name(report.path, "activation")["body"]
    assert entry["scale"] == [float(layer.output_scale)]
    assert entry["offset"] == [-int(layer.output_zero_point)]


def test_version_0_6_1_and_other_names(model, x, tmp_path):
    calibrated = prepared(model, x)
    report = qt.export.onnx(
        calibrated,
        tmp_path / "m.onnx",
        (x,),
        form="encodings",
        encodings_version="0.6.1",
        input_names=["image"],
    )
    found = document(report.path)
    assert found["version"] == "0.6.1"
    assert found["quantizer_args"]["per_channel_quantization"] == "True"
    (entry,) = found["activation_encodings"]["image"]
    scale, zero_point = observed(calibrated, "x_observer")
    assert (entry["bitwidth"], entry["dtype"], entry["is_symmetric"]) == (8, "int", "False")
    assert (entry["min"], entry["max"]) == (-scale * zero_point, scale * (255 - zero_point))
    assert len(found["param_encodings"]["body.weight"]) == 6


def test_four_bits_have_their_width(x, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten()).eval()
    activation = qt.TensorSpec("uint4", observer="minmax")
    weight = qt.TensorSpec("int4", "per_channel", symmetric=True, observer="per_channel_minmax")
    mapping = qt.QConfigMapping().set_global(qt.QConfig(activation, weight))
    calibrated = qt.calibrate(qt.prepare(net, mapping, (x,)), [(x,)], progress=False)
    report = qt.export.onnx(calibrated, tmp_path / "m.onnx", (x,), form="encodings")
    entry = by_name(report.path, "param")["0.weight"]
    assert (entry["bw"], set(entry["offset"])) == (4, {-8})
    assert {e["bw"] for e in by_name(report.path, "activation").values()} == {4}


def test_what_has_no_encoding_is_refused_before_a_file_is_written(model, x, tmp_path):
    mapping = qt.low_bit_qconfig_mapping(model, "ternary", edge_bits=None)
    qat = qt.prepare_qat(model, mapping, (x,))
    qat(x)
    with pytest.raises(qt.export.UnsupportedError, match=r"stem.0.* of format ternary"):
        qt.export.onnx(qat, tmp_path / "m.onnx", (x,), form="encodings")
    raw = qt.prepare(model, qt.get_default_qconfig_mapping(), (x,))
    with pytest.raises(RuntimeError, match=r"x_observer|seen no data"):
        qt.export.onnx(raw, tmp_path / "m.onnx", (x,), form="encodings")
    with pytest.raises(ValueError, match="form must be"):
        qt.export.onnx(raw, tmp_path / "m.onnx", (x,), form="other")
    with pytest.raises(ValueError, match=r"'2\.0\.0': use one of"):
        qt.export.onnx(raw, tmp_path / "m.onnx", (x,), form="encodings", encodings_version="2.0.0")
    assert list(tmp_path.iterdir()) == []
