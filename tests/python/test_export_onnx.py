"""ONNX files in QDQ form: what ONNX Runtime makes of them, and what they hold."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

_WHY = "needs the extra: pip install 'qtoolkit[onnx]'"
onnx = pytest.importorskip("onnx", reason=_WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=_WHY)
pytest.importorskip("onnxscript", reason=_WHY)


class Net(nn.Module):
    """Residuals, a depthwise convolution, concatenation, pools, a gate and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
        x = functional.relu(self.point(functional.relu6(self.depthwise(x))) + x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([x, functional.relu(self.branch(x))], 1)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def converted(model: nn.Module, x: Tensor, mapping: object | None = None) -> nn.Module:
    prepared = qt.prepare(model, mapping or qt.get_default_qconfig_mapping("x86"), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


def optimized(path: Path) -> Counter[str]:
    """The kinds of operators after ONNX Runtime's fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(path.with_suffix(".opt.onnx"))
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(x) -> nn.Module:
    torch.manual_seed(0)
    return converted(Net().eval(), x)


@pytest.fixture(scope="module")
def report(quantized, x, tmp_path_factory) -> qt.export.ExportReport:
    return qt.export.onnx(quantized, tmp_path_factory.mktemp("onnx") / "m.onnx", (x[:1],))


def test_every_layer_is_fused_to_an_integer_kernel(report):
    kinds = optimized(report.path)
    assert kinds["QLinearConv"] == 5
    assert kinds["QLinearAdd"] == 1
    assert kinds["QLinearMul"] == 1
    assert kinds["QLinearConcat"] == 1
    assert kinds["QLinearSigmoid"] == 1
    assert kinds["QLinearGlobalAveragePool"] == 2
    assert kinds["QGemm"] == 1
    moving = {"QuantizeLinear", "Transpose", "NhwcMaxPool", "Reshape", "Flatten"}
    assert {kind for kind in kinds if not kind.startswith("QLinear")} <= {"QGemm"} | moving


def test_linear_layers_of_tokens_are_fused_with_their_bias(tmp_path):
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 8, bias=False), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x + self.b(torch.sigmoid(self.a(x))))

    torch.manual_seed(0)
    x = torch.randn(4, 5, 8)
    report = qt.export.onnx(converted(Tokens().eval(), x), tmp_path / "m.onnx", (x[:1],))
    kinds = optimized(report.path)
    assert (kinds["QGemm"], kinds["QLinearMatMul"], kinds["QLinearAdd"]) == (2, 1, 1)
    assert report.layers.max_steps <= 1
    assert qt.export.load("onnx", report.path)(torch.cat([x, x])).shape == (8, 5, 4)


def test_softmax_of_attention_is_exact(tmp_path):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
            self.out = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (f(x).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
            weights = torch.softmax(q @ k.transpose(-2, -1), -1)
            return self.out((weights @ v).transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    x = 3 * torch.randn(4, 9, 16)
    quantized = converted(Attention().eval(), x)
    assert any(isinstance(module, qt.nn.Softmax) for module in quantized.modules())
    report = qt.export.onnx(quantized, tmp_path / "m.onnx", (x,))
    kinds = optimized(report.path)
    assert (kinds["QLinearMatMul"], kinds["QGemm"], kinds["Softmax"]) == (2, 4, 1)
    assert report.layers.max_steps <= 1
    assert report.layers.differing < 0.001
    assert report.outputs[0].sqnr > 40
    assert "ONNX Runtime has no integer kernel for Softmax" in report.warnings


def test_a_batch_norm_of_its_own_is_a_convolution_on_codes(tmp_path):
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.last = nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(functional.relu(self.first(x)))).mean((2, 3))

    torch.manual_seed(0)
    model = Norm().eval()
    with torch.no_grad():
        model.norm.weight.copy_(torch.tensor([1.0, -2.0, 0.0, 1e-4, 3.0, 0.5, 0.0, 1.0]))
        model.norm.bias.copy_(torch.tensor([0.1, 1.0, 0.7, 0.5, -0.3, 0.0, 0.0, 2.0]))
    x = torch.randn(4, 3, 8, 8)
    quantized = converted(model, x)
    assert any(isinstance(module, qt.nn.BatchNorm2d) for module in quantized.modules())
    report = qt.export.onnx(quantized, tmp_path / "m.onnx", (x,))
    kinds = optimized(report.path)
    assert kinds["QLinearConv"] >= 2
    assert "Mul" not in kinds
    assert report.layers.max_steps <= 1
    assert report.outputs[0].sqnr > 40


def test_a_relu_that_the_codes_do_not_imply_is_a_clip_of_codes(x, tmp_path):
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(16, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            # The inputs of a concatenation have its range, which has negative numbers.
            joined = torch.cat([functional.relu(self.a(x)), self.b(x)], 1)
            return functional.relu(self.c(joined)).mean((2, 3))

    torch.manual_seed(0)
    report = qt.export.onnx(converted(Joined().eval(), x), tmp_path / "m.onnx", (x,))
    kinds = optimized(report.path)
    # The last convolution gives floats.
    assert (kinds["QLinearConv"], kinds["Clip"], kinds["Relu"]) == (2, 1, 0)
    assert report.layers.max_steps <= 1


def test_the_file_is_verified_layer_by_layer(report, quantized):
    assert report.verified
    assert "ONNX Runtime" in report.runtime
    assert report.layers.compared >= 12
    assert report.layers.max_steps <= 1
    assert report.outputs[0].sqnr > 30


def test_another_batch_runs(report, quantized, x):
    run = qt.export.load("onnx", report.path)
    with torch.no_grad():
        expected = quantized(x)
    noise = (run(x) - expected).square().sum()
    assert run(x).shape == (4, 5)
    assert 10 * torch.log10(expected.square().sum() / noise) > 30


def test_weights_are_codes_and_values_have_the_names_of_their_layers(report):
    model = onnx.load(report.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == 21
    types = {value.name: value.data_type for value in model.graph.initializer}
    assert types["stem.weight"] == onnx.TensorProto.INT8
    assert types["stem.bias"] == onnx.TensorProto.INT32
    made = {name: node.op_type for node in model.graph.node for name in node.output}
    for name in ("stem", "depthwise", "point", "point.branch", "branch"):
        assert made[name] == "QuantizeLinear"
    assert model.producer_name == "qtoolkit"


def test_weights_of_four_bits_can_be_stored_so(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 3)).eval()
    mapping = qt.low_bit_qconfig_mapping(model, "w4a8", method="observed", edge_bits=None)
    quantized = converted(model, x, mapping)
    small = qt.export.onnx(quantized, tmp_path / "4.onnx", (x,), int4_weights=True)
    large = qt.export.onnx(quantized, tmp_path / "8.onnx", (x,))
    types = {v.data_type for v in onnx.load(small.path).graph.initializer}
    assert onnx.TensorProto.INT4 in types
    assert small.size < 0.65 * large.size
    assert small.outputs[0].sqnr > 40


def test_a_prepared_qat_model_is_converted_first(x, tmp_path):
    torch.manual_seed(0)
    qat = qt.prepare_qat(Net(), qt.get_default_qat_qconfig_mapping("x86"), (x,))
    qat(x)
    report = qt.export.onnx(qat, tmp_path / "m.onnx", (x,))
    assert report.layers.max_steps <= 1
    assert report.outputs[0].sqnr > 20


def test_what_has_no_translation_is_named_before_a_file_is_written(x, tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvals(self.conv(x)[..., :14, :14]).real

    with pytest.raises(qt.export.UnsupportedError, match=r"aten.linalg_eig.default .* no ONNX"):
        qt.export.onnx(converted(Odd().eval(), x), tmp_path / "m.onnx", (x,))
    assert list(tmp_path.iterdir()) == []


def test_a_grouped_transposed_convolution_has_its_weight_in_float(tmp_path):
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 8, 2, 2, groups=2), nn.Conv2d(8, 4, 1)
    x = torch.randn(2, 4, 8, 8)
    report = qt.export.onnx(converted(nn.Sequential(*layers).eval(), x), tmp_path / "m.onnx", (x,))
    types = {value.name: value.data_type for value in onnx.load(report.path).graph.initializer}
    assert types["1.weight"] == onnx.TensorProto.FLOAT
    assert report.outputs[0].sqnr > 40
    assert any("ConvTranspose" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (nn.Upsample(scale_factor=2.0), None),
        (nn.Upsample(scale_factor=2.0, mode="bilinear"), "Resize"),
        (nn.ReflectionPad2d(1), "Pad"),
        (nn.GELU(), "Gelu"),
        (nn.LeakyReLU(), None),
    ],
)
def test_the_report_names_what_onnx_runtime_computes_in_float(layer, named, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), layer, nn.Conv2d(4, 4, 1)).eval()
    report = qt.export.onnx(converted(model, x), tmp_path / "m.onnx", (x,))
    kinds = optimized(report.path)
    notes = [warning for warning in report.warnings if "no integer kernel" in warning]
    if named is None:
        assert notes == []
        # The quantize of the input, and what the last layer reads: nothing in between is float.
        assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (1, 3)
    else:
        assert notes == [f"ONNX Runtime has no integer kernel for {named}"]
        assert kinds["QuantizeLinear"] == 2


def test_names_and_opset_are_checked(quantized, x, tmp_path):
    named = qt.export.onnx(
        quantized, tmp_path / "n.onnx", (x,), input_names=["image"], output_names=["scores"]
    )
    graph = onnx.load(named.path).graph
    assert [v.name for v in graph.input] == ["image"]
    assert [v.name for v in graph.output] == ["scores"]
    with pytest.raises(qt.export.UnsupportedError, match="opset 20"):
        qt.export.onnx(quantized, tmp_path / "m.onnx", (x,), opset=20)


def test_large_weights_lie_in_a_second_file(quantized, x, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["qtoolkit.export.onnx"], "LARGEST_FILE", 1000)
    report = qt.export.onnx(quantized, tmp_path / "m.onnx", (x,))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert any("m.onnx.data" in warning for warning in report.warnings)
    assert qt.export.load("onnx", report.path)(x).shape == (4, 5)


def test_a_weight_of_two_layers_is_stored_once(tmp_path):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.relu(self.linear(x)))

    torch.manual_seed(0)
    x = torch.randn(4, 64)
    report = qt.export.onnx(converted(Twice().eval(), x), tmp_path / "m.onnx", (x,))
    graph = onnx.load(report.path).graph
    assert sum(list(v.dims) == [64, 64] for v in graph.initializer) == 1
