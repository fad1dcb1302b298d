"""OpenVINO IR: executed on codes by the CPU plug-in, and the model's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

ov = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'qtoolkit[openvino]'")


def converted(model: nn.Module, x: Tensor, mapping: object | None = None) -> nn.Module:
    prepared = qt.prepare(model, mapping or qt.get_default_qconfig_mapping("openvino"), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


def executed(path: Path) -> list[tuple[str, str]]:
    """The kind and the precision of each step of the plug-in, without constants and the ends."""
    core = ov.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    steps = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if kind not in {"Const", "Input", "Output"}:
            steps.append((kind, precision))
    return steps


class Net(nn.Module):
    """Residuals, a depthwise convolution, concatenation, pools, a gate and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.stem(x)))
        x = functional.relu(self.point(functional.relu6(self.depthwise(x))) + x)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = torch.cat([x, functional.hardswish(self.branch(x))], 1)
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    return converted(Net().eval(), x)


@pytest.fixture(scope="module")
def report(quantized: nn.Module, x: Tensor, tmp_path_factory) -> qt.export.ExportReport:
    path = tmp_path_factory.mktemp("openvino") / "net.xml"
    return qt.export.openvino(quantized, path, (x[:2],))


def test_every_layer_is_executed_on_codes(report):
    steps = executed(report.path)
    layers = [step for step in steps if step[0] not in {"Reorder", "Reshape", "FakeQuantize"}]
    kinds = [kind for kind, _ in layers]
    assert kinds.count("Convolution") == 5
    assert {"FullyConnected", "Pooling", "Concatenation", "Eltwise"} <= set(kinds)
    assert {precision for _, precision in layers} <= {"u8", "i8"}
    # Only the input is quantized from float in a step of its own.
    assert steps.count(("FakeQuantize", "f32")) == 1


def test_the_file_computes_the_models_codes(report):
    assert report.layers.compared > 10
    assert report.layers.max_steps <= 1
    assert report.layers.differing < 0.001
    assert report.outputs[0].sqnr > 30
    assert report.runtime.startswith("OpenVINO 20")


class Block(nn.Module):
    """A residual without a convolution in its other branch, and one with."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner = nn.Conv2d(8, 8, 1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.side = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(self.first(functional.relu(self.inner(x))) + x)
        return self.last(functional.relu(self.second(x) + self.side(x)))


def test_residuals_are_added_within_the_step_of_the_convolution(x, tmp_path):
    torch.manual_seed(0)
    symmetric = qt.QConfig(qt.TensorSpec("uint8", symmetric=True), None)
    mapping = qt.get_default_qconfig_mapping("openvino").set_module_type("input", symmetric)
    model = converted(Block().eval(), x, mapping)
    report = qt.export.openvino(model, tmp_path / "m.xml", (x,), dynamic_batch=False)
    kinds = [kind for kind, _ in executed(report.path)]
    assert kinds.count("Convolution") == 6
    # But for the input's quantization there is no other step.
    assert len([kind for kind in kinds if kind not in {"Convolution", "Reorder", "Reshape"}]) == 1
    assert report.layers.differing == 0.0


def test_names_and_the_dynamic_batch(report, quantized, x):
    model = ov.Core().read_model(report.path)
    assert model.input("x").partial_shape == ov.PartialShape([-1, 3, 16, 16])
    assert model.output("output").partial_shape == ov.PartialShape([-1, 5])
    names = {op.get_friendly_name() for op in model.get_ops()}
    assert {"stem", "depthwise", "pool_1", "mul", "cat"} <= names
    loaded = qt.export.load("openvino", report.path)
    with torch.no_grad():
        for batch in (1, 3):
            assert loaded(x[:batch]).allclose(quantized(x[:batch]), atol=0.02)


def test_weights_are_stored_as_codes(report, quantized):
    model = ov.Core().read_model(report.path)
    weights = [op for op in model.get_ops() if op.get_type_name() == "Convert"]
    assert len(weights) == 6
    for node in weights:
        assert node.get_input_element_type(0) == ov.Type.i8
        (user,) = node.output(0).get_target_inputs()
        assert user.get_node().get_type_name() == "Multiply"
    count = sum(m.weight.numel() for m in quantized.modules() if hasattr(m, "weight_scale"))
    size = report.path.with_suffix(".bin").stat().st_size
    assert count < size < count + 4000


def test_four_bit_weights_are_stored_in_four_bits_and_computed_in_eight(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(2304, 3)
    )
    mapping = qt.low_bit_qconfig_mapping(model, "w4a8", method="observed", edge_bits=None)
    quantized = converted(model.eval(), x, mapping)
    small = qt.export.openvino(quantized, tmp_path / "4.xml", (x,))
    large = qt.export.openvino(quantized, tmp_path / "8.xml", (x,), four_bits=False)
    file = ov.Core().read_model(small.path)
    types = [op.get_element_type() for op in file.get_ops() if op.get_type_name() == "Constant"]
    assert ov.Type.i4 in types
    bins = [r.path.with_suffix(".bin").stat().st_size for r in (small, large)]
    assert bins[0] < 0.7 * bins[1]
    steps = executed(small.path)
    assert [kind for kind, _ in steps].count("Convolution") == 2
    layers = {"Convolution", "FullyConnected"}
    assert {precision for kind, precision in steps if kind in layers} <= {"u8", "i8"}
    assert min(small.outputs[0].sqnr, large.outputs[0].sqnr) > 30


class Outputs(nn.Module):
    """A dictionary, with keys and inputs named like layers."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.features(features))
        return {"out": self.out(x), "features": x}


def test_outputs_have_the_keys_of_a_dictionary(x, tmp_path):
    quantized = converted(Outputs().eval(), x)
    report = qt.export.openvino(quantized, tmp_path / "m.xml", (x,))
    model = ov.Core().read_model(report.path)
    assert model.inputs[0].get_any_name().startswith("features")
    assert "out" in {name for port in model.outputs for name in port.get_names()}
    assert [len(report.outputs), report.outputs[0].max_steps is None] == [2, True]
    assert min(output.sqnr for output in report.outputs) > 30


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def test_an_operator_that_openvino_lacks_is_named_with_its_module(x, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Fourier())
    with pytest.raises(qt.export.UnsupportedError, match=r"special_bessel_j0.*nothing was written"):
        qt.export.openvino(converted(model, x), tmp_path / "m.xml", (x,))
    assert list(tmp_path.iterdir()) == []


def test_the_two_files_are_written_together(quantized, x, tmp_path):
    (tmp_path / "m.bin").write_text("old")
    report = qt.export.openvino(quantized, tmp_path / "m.xml", (x,), verify=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.bin", "m.xml"]
    assert report.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert not report.verified


def test_a_fixed_batch(quantized, x, tmp_path):
    report = qt.export.openvino(
        quantized, tmp_path / "m.xml", (x,), verify=False, dynamic_batch=False
    )
    shape = ov.Core().read_model(report.path).inputs[0].partial_shape
    assert shape == ov.PartialShape([4, 3, 16, 16])


def test_a_batch_norm_of_its_own_is_a_convolution_on_codes(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    x = torch.randn(4, 3, 8, 8)
    model(x)
    quantized = converted(model.eval(), x)
    assert any(isinstance(module, qt.nn.BatchNorm2d) for module in quantized.modules())
    report = qt.export.openvino(quantized, tmp_path / "m.xml", (x,))
    convolutions = [precision for kind, precision in executed(report.path) if kind == "Convolution"]
    assert len(convolutions) == 3
    assert set(convolutions) <= {"u8", "i8"}
    assert report.outputs[0].sqnr > 40


def test_attention_and_layer_norm(tmp_path):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))
    x = torch.randn(2, 6, 8)
    report = qt.export.openvino(converted(model.eval(), x), tmp_path / "m.xml", (x,))
    assert report.outputs[0].sqnr > 30
    y = torch.randn(2, 6, 16)
    encoder = qt.export.openvino(converted(layer.eval(), y), tmp_path / "e.xml", (y,))
    assert encoder.outputs[0].sqnr > 30


def test_values_half_way_between_two_codes_are_no_departure(tmp_path):
    """Bilinear weights are quarters, so many values are halves of a step."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    upsample = nn.Upsample(scale_factor=2.0, mode="bilinear")
    model = nn.Sequential(nn.Conv2d(4, 4, 1), upsample, nn.Conv2d(4, 4, 1)).eval()
    report = qt.export.openvino(converted(model, x), tmp_path / "m.xml", (x,))
    assert report.layers.differing < 0.001
    assert report.outputs[0].sqnr > 40
