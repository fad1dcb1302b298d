"""TFLite files: computed on codes in LiteRT, and the model's numbers."""

from __future__ import annotations

import copy
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.export import tflite_writer

_WHY = "needs the extra: pip install 'qtoolkit[tflite]'"
schema = pytest.importorskip("tflite", reason=_WHY)
litert = pytest.importorskip("ai_edge_litert.interpreter", reason=_WHY)


def converted(model: nn.Module, x: Tensor, preset: str = "tflite") -> nn.Module:
    prepared = qt.prepare(model.eval(), qt.get_default_qconfig_mapping(preset), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


class File:
    """A file, read with the schema."""

    def __init__(self, path: Path) -> None:
        self.model = schema.Model.GetRootAs(path.read_bytes(), 0)
        self.graph = self.model.Subgraphs(0)
        self.tensors = [self.graph.Tensors(i) for i in range(self.graph.TensorsLength())]
        self.names = [tensor.Name().decode() for tensor in self.tensors]

    def kind(self, op) -> str:
        code = self.model.OperatorCodes(op.OpcodeIndex())
        return schema.opcode2name(code.BuiltinCode())

    @property
    def operators(self) -> list:
        return [self.graph.Operators(i) for i in range(self.graph.OperatorsLength())]

    def kinds(self) -> Counter[str]:
        return Counter(self.kind(op) for op in self.operators)

    def integer_kinds(self) -> Counter[str]:
        """The operators whose first output is int8."""
        found = Counter()
        for op in self.operators:
            if self.tensors[op.Outputs(0)].Type() == schema.TensorType.INT8:
                found[self.kind(op)] += 1
        return found


class Net(nn.Module):
    """Residuals, a depthwise convolution, concatenation, pools, a gate and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.gate = nn.Conv2d(16, 16, 1)
        self.branch = nn.Conv2d(16, 16, 3, padding=2, dilation=2, groups=2)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 3, 2, 1)
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
    return converted(Net(), x)


@pytest.fixture(scope="module")
def report(quantized: nn.Module, x: Tensor, tmp_path_factory) -> qt.export.ExportReport:
    path = tmp_path_factory.mktemp("tflite") / "net.tflite"
    return qt.export.tflite(quantized, path, (x[:1],))


def test_every_layer_between_codes_is_computed_on_codes(report):
    file = File(report.path)
    kinds, integers = file.kinds(), file.integer_kinds()
    for kind, count in {
        "CONV_2D": 4,
        "DEPTHWISE_CONV_2D": 1,
        "MAX_POOL_2D": 1,
        "ADD": 1,
        "MUL": 2,  # the gate's, and a change of scale before the concatenation
        "CONCATENATION": 1,
        "MEAN": 2,
    }.items():
        assert (kinds[kind], integers[kind]) == (count, count), kind
    # The input, hardswish, sigmoid; these two, and input and weight of the last layer.
    assert (kinds["QUANTIZE"], kinds["DEQUANTIZE"]) == (3, 4)
    assert kinds["TRANSPOSE"] == 0


def test_the_file_is_verified_layer_by_layer(report):
    assert report.runtime.startswith("LiteRT")
    assert "XNNPACK" in report.runtime
    assert report.layers.compared >= 13
    assert report.layers.max_steps <= 1
    assert report.layers.differing < 0.001
    assert report.outputs[0].sqnr > 40


def test_weights_and_biases_are_codes_with_the_schemes_that_the_specification_wants(report):
    file = File(report.path)
    for op in file.operators:
        if file.kind(op) not in {"CONV_2D", "DEPTHWISE_CONV_2D"}:
            continue
        x, weight, bias = (file.tensors[op.Inputs(i)] for i in range(3))
        scales = [t.Quantization().ScaleAsNumpy() for t in (x, weight, bias)]
        axis = weight.Quantization().QuantizedDimension()
        assert axis == (3 if file.kind(op) == "DEPTHWISE_CONV_2D" else 0)
        assert len(scales[1]) == weight.Shape(axis) == 16
        assert not weight.Quantization().ZeroPointAsNumpy().any()
        assert bias.Type() == schema.TensorType.INT32
        np.testing.assert_allclose(scales[2], scales[0] * scales[1], rtol=1e-6)
        codes = file.model.Buffers(weight.Buffer()).DataAsNumpy().view(np.int8)
        assert codes.min() >= -127


def test_names_layouts_and_another_batch(report, quantized, x):
    interpreter = litert.Interpreter(str(report.path))
    (details,) = interpreter.get_input_details()
    assert details["name"] == "x"
    assert details["dtype"] is np.float32
    assert details["shape"].tolist() == [1, 16, 16, 3]
    assert details["shape_signature"].tolist() == [-1, 16, 16, 3]
    assert interpreter.get_output_details()[0]["name"] == "output"
    assert list(interpreter.get_signature_list()) == ["serving_default"]
    assert {"stem", "depthwise", "point", "point.branch", "branch"} <= set(File(report.path).names)
    run = qt.export.load("tflite", report.path)
    with torch.no_grad():
        for batch in (3, 1, 4):
            torch.testing.assert_close(run(x[:batch]), quantized(x[:batch]), atol=0.02, rtol=0)


class Maps(nn.Module):
    """Two maps, one of which is a layer's codes."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = functional.relu(self.features(features))
        return {"out": self.out(x), "features": x}


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
def test_maps_are_in_the_layout_that_is_asked_for(x, tmp_path, layout):
    quantized = converted(Maps(), x)
    path = tmp_path / "m.tflite"
    report = qt.export.tflite(quantized, path, (x,), layout=layout)
    interpreter = litert.Interpreter(str(path))
    shapes = [d["shape"].tolist() for d in interpreter.get_output_details()]
    image = [4, 3, 16, 16] if layout == "nchw" else [4, 16, 16, 3]
    assert interpreter.get_input_details()[0]["shape"].tolist() == image
    assert shapes[0] == ([4, 4, 14, 14] if layout == "nchw" else [4, 14, 14, 4])
    assert File(path).kinds()["TRANSPOSE"] == (3 if layout == "nchw" else 0)
    expected = quantized(x)
    for output, key in zip(qt.export.load("tflite", path)(x), ("out", "features")):
        torch.testing.assert_close(output, expected[key], atol=0.02, rtol=0)
    assert min(output.sqnr for output in report.outputs) > 40


def test_codes_of_other_presets_are_shifted(x, tmp_path):
    torch.manual_seed(0)
    unsigned = converted(Net(), x, "x86")
    assert unsigned.stem.quant_min == 0
    report = qt.export.tflite(unsigned, tmp_path / "m.tflite", (x,))
    assert report.layers.compared >= 13
    assert report.layers.differing < 0.001
    kinds = {t.Type() for t in File(report.path).tensors}
    assert schema.TensorType.INT8 in kinds
    per_tensor = converted(Net(), x, "qnnpack")
    assert qt.export.tflite(per_tensor, tmp_path / "q.tflite", (x,)).layers.differing < 0.001


def test_a_fixed_batch(quantized, x, tmp_path):
    path = tmp_path / "m.tflite"
    qt.export.tflite(quantized, path, (x,), verify=False, dynamic_batch=False)
    details = litert.Interpreter(str(path)).get_input_details()[0]
    assert details["shape_signature"].tolist() == [4, 16, 16, 3]


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft2(x).real


def test_an_operator_that_tflite_lacks_is_named_with_its_module(x, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Fourier())
    with pytest.raises(
        qt.export.UnsupportedError, match=r"aten\._fft_r2c.* in 1: .*nothing was written"
    ):
        qt.export.tflite(converted(model, x), tmp_path / "m.tflite", (x,))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_departs_is_not_left(quantized, x, tmp_path, monkeypatch):
    path = tmp_path / "m.tflite"
    path.write_text("old")
    activation = tflite_writer._activation
    monkeypatch.setattr(tflite_writer, "_activation", lambda name: activation("RELU_N1_TO_1"))
    with pytest.raises(qt.export.VerificationError, match="departs from the model first in stem"):
        qt.export.tflite(quantized, path, (x,))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_bad_input_is_refused(quantized, x, tmp_path):
    with pytest.raises(ValueError, match="layout 'hwcn': use one of nhwc, nchw"):
        qt.export.tflite(quantized, tmp_path / "m.tflite", (x,), layout="hwcn")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        qt.export.tflite(quantized, tmp_path / "no" / "m.tflite", (x,))
    with pytest.raises(IsADirectoryError, match="the path must name a file"):
        qt.export.tflite(quantized, tmp_path, (x,))
    with pytest.raises(TypeError, match="example_inputs must be a non-empty tuple"):
        qt.export.tflite(quantized, tmp_path / "m.tflite", ())
    assert os.listdir(tmp_path) == []


def test_the_target_is_listed():
    info = qt.export.targets()["tflite"]
    assert (info.suffix, info.preset) == (".tflite", "tflite")
    assert set(info.packages) == {"tflite", "flatbuffers", "ai-edge-litert"}


def conv(
    inputs: int = 8, outputs: int = 8, kernel: int | tuple[int, int] = 1, **options
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **options)


def turned(x: Tensor) -> Tensor:
    return x.view(-1, 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


class Own(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    ("layers", "kinds", "absent"),
    [
        # PyTorch pads equally at both ends, TFLite's SAME as little as it can.
        ([conv(3, 8, 3, stride=2, padding=1), conv()], {"PAD"}, set()),
        ([conv(3, 8, 3, padding=1), conv(8, 8, 5, stride=3)], set(), {"PAD"}),
        ([conv(3, 8, (3, 5), stride=2, padding=(1, 2)), conv()], {"PAD"}, set()),
        ([conv(3, 6, 3, groups=3), conv(6)], {"DEPTHWISE_CONV_2D"}, set()),
        ([conv(3), nn.AvgPool2d(3, 2, 1), conv()], {"DEPTHWISE_CONV_2D"}, {"AVERAGE_POOL_2D"}),
        ([conv(3), nn.AvgPool2d(3, 2, ceil_mode=True), conv()], {"BATCH_MATMUL"}, set()),
        ([conv(3), nn.AdaptiveAvgPool2d(5), conv()], {"BATCH_MATMUL"}, set()),
        ([conv(3), nn.MaxPool2d(3, 2, 1), conv()], {"MAX_POOL_2D", "PADV2"}, set()),
        (
            [conv(3), nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False), conv()],
            {"TRANSPOSE_CONV"},
            set(),
        ),
        (
            [conv(3), nn.ConvTranspose2d(8, 6, 3, 2, 1, 1, groups=2, dilation=2), conv(6)],
            {"TRANSPOSE_CONV", "CONCATENATION", "STRIDED_SLICE"},
            set(),
        ),
        ([conv(3), nn.ChannelShuffle(2), conv()], {"RESHAPE", "TRANSPOSE"}, set()),
        ([conv(3), Own(turned), conv()], {"RESHAPE", "TRANSPOSE"}, set()),
        ([conv(3), nn.PixelShuffle(2), conv(2)], {"RESHAPE", "TRANSPOSE"}, set()),
        ([conv(3), nn.Upsample(scale_factor=1.7), conv()], {"GATHER"}, {"RESIZE_NEAREST_NEIGHBOR"}),
        (
            [conv(3), nn.Upsample(scale_factor=2, mode="bilinear"), conv()],
            {"RESIZE_BILINEAR"},
            set(),
        ),
        (
            [conv(3), nn.Upsample(scale_factor=1.7, mode="bilinear"), conv()],
            {"BATCH_MATMUL"},
            set(),
        ),
        ([conv(3), nn.ReflectionPad2d(2), conv()], {"GATHER"}, set()),
        ([conv(3), nn.SiLU(), conv()], {"LOGISTIC"}, {"GATHER"}),
        ([conv(3), nn.Softplus(), conv()], {"GATHER"}, {"EXP"}),
        ([conv(3), nn.GELU(), conv()], {"GELU"}, {"GATHER"}),
        ([conv(3), nn.GroupNorm(2, 8), conv()], {"RSQRT"}, set()),
        ([conv(3, 4), nn.Flatten(), nn.Linear(576, 4)], {"TRANSPOSE", "RESHAPE"}, set()),
        (
            [conv(3), nn.Flatten(2), Own(lambda x: x.transpose(1, 2)), nn.Linear(8, 4)],
            {"RESHAPE"},
            {"TRANSPOSE"},
        ),
        ([nn.BatchNorm2d(3), nn.Softmax(1), conv(3)], {"SOFTMAX"}, set()),
    ],
    ids=lambda value: None if isinstance(value, set) else "-".join(type(m).__name__ for m in value),
)
def test_operators(layers, kinds, absent, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    model = nn.Sequential(*layers)
    report = qt.export.tflite(converted(model, x), tmp_path / "m.tflite", (x,))
    found = set(File(report.path).kinds())
    assert kinds <= found
    assert not absent & found
    assert report.layers.max_steps <= 1
    assert report.layers.differing < 0.01
    assert report.outputs[0].sqnr > 40


def test_operators_that_tflite_lacks_are_expressed_by_others(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8)
    model = nn.LSTM(8, 4, batch_first=True).eval()
    report = qt.export.tflite(converted(Own(lambda y: model(y)[0]), x), tmp_path / "m.tflite", (x,))
    assert {"FULLY_CONNECTED", "TANH", "LOGISTIC"} <= set(File(report.path).kinds())
    assert report.outputs[0].sqnr > 100
    assert "the batch size is fixed" in report.warnings[0]


def test_a_narrow_range_of_codes_is_clipped(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(conv(3), nn.ReLU(), conv(), nn.ReLU6(), conv())
    mapping = qt.low_bit_qconfig_mapping(model, "w4a4", method="observed", edge_bits=None)
    prepared = qt.prepare(model.eval(), mapping, (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    report = qt.export.tflite(qt.convert(prepared), tmp_path / "m.tflite", (x,))
    assert File(report.path).kinds()["MINIMUM"] >= 1
    assert report.layers.differing < 0.001
    assert report.outputs[0].sqnr > 40


def test_a_weight_that_tflite_does_not_take_is_refused(quantized, x, tmp_path):
    model = copy.deepcopy(quantized)
    model.point.weight[0, 0] = -128
    with pytest.raises(qt.export.UnsupportedError, match=r"in point: .*codes in \[-127, 127\]"):
        qt.export.tflite(model, tmp_path / "m.tflite", (x,))
    assert list(tmp_path.iterdir()) == []


def test_tokens_and_attention(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 16)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True)
    )
    report = qt.export.tflite(converted(model, x), tmp_path / "m.tflite", (x,))
    assert {"SOFTMAX", "BATCH_MATMUL", "RSQRT"} <= set(File(report.path).kinds())
    assert report.outputs[0].sqnr > 40
    run, y = qt.export.load("tflite", report.path), torch.randn(5, 6, 16)
    torch.testing.assert_close(run(x), converted(model, x)(x), atol=0.05, rtol=0)
    assert run(y).shape == (5, 6, 16)


@pytest.mark.parametrize("preset", ["tflite", "x86"])
def test_inputs_and_outputs_can_be_codes(x, tmp_path, preset):
    torch.manual_seed(0)
    model = converted(Net(), x, preset)
    report = qt.export.tflite(model, tmp_path / "m.tflite", (x,), integer=True)
    kinds = File(report.path).kinds()
    assert not {"QUANTIZE", "DEQUANTIZE"} & set(kinds)
    assert kinds["GATHER"] == 2
    interpreter = litert.Interpreter(str(report.path))
    for (details,) in (interpreter.get_input_details(), interpreter.get_output_details()):
        assert details["dtype"] is np.int8
    (signature,) = interpreter.get_signature_list().values()
    assert (signature["inputs"], signature["outputs"]) == (["x"], ["output"])
    assert report.layers.differing < 0.001
    assert report.outputs[0].max_steps < 3
    run = qt.export.load("tflite", report.path)
    torch.testing.assert_close(run(x), model(x), atol=0.02, rtol=0)


def test_codes_that_are_two_outputs_and_an_input_are_copied(x, tmp_path):
    torch.manual_seed(0)
    layer = conv(3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = functional.relu(self.layer(x))
            return y, x, y

    model = converted(Twice(), x)
    for integer in (False, True):
        path = tmp_path / f"{integer}.tflite"
        report = qt.export.tflite(model, path, (x,), integer=integer)
        assert min(output.sqnr for output in report.outputs) > 30
        assert len({d["index"] for d in litert.Interpreter(str(path)).get_output_details()}) == 3
