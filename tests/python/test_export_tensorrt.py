"""ONNX files for TensorRT: what they hold, the rules they are checked against, and engines."""

from __future__ import annotations

import copy
import ctypes
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.export import tensorrt_engine
from qtoolkit.export.tensorrt_rules import RULES, violations

_WHY = "needs the extra: pip install 'qtoolkit[onnx]'"
onnx = pytest.importorskip("onnx", reason=_WHY)
onnxruntime = pytest.importorskip("onnxruntime", reason=_WHY)
pytest.importorskip("onnxscript", reason=_WHY)


class Net(nn.Module):
    """Residual blocks, one with a convolution in its skip connection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 1, stride=2)
        self.b = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(12, 6, 2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.stem(x)), 2)
        x = functional.relu(self.a(x) + x)
        x = functional.relu(self.b(x) + self.down(x))
        x = functional.relu6(self.up(x))
        return self.head(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def converted(model: nn.Module, x: Tensor, mapping: Any = "tensorrt") -> nn.Module:
    if isinstance(mapping, str):
        mapping = qt.get_default_qconfig_mapping(mapping)
    prepared = qt.prepare(model.eval(), mapping, (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def quantized(x) -> nn.Module:
    torch.manual_seed(0)
    return converted(Net(), x)


@pytest.fixture(scope="module")
def report(quantized, x, tmp_path_factory) -> qt.export.ExportReport:
    return qt.export.tensorrt(quantized, tmp_path_factory.mktemp("trt") / "m.onnx", (x,))


def makers(graph: Any) -> dict[str, Any]:
    return {name: node for node in graph.node for name in node.output}


def test_codes_are_int8_without_zero_point_and_biases_are_floats(report):
    assert qt.export.check_tensorrt(report.path) == []
    model = onnx.load(report.path)
    assert model.opset_import[0].version == 20
    constants = {t.name: t for t in model.graph.initializer}
    zero_points = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear"}
    assert {constants[name].data_type for name in zero_points} == {onnx.TensorProto.INT8}
    assert not any(onnx.numpy_helper.to_array(constants[name]).any() for name in zero_points)
    for layer in ("stem", "a", "b", "down", "up"):
        assert constants[f"{layer}.weight"].data_type == onnx.TensorProto.INT8
        assert constants[f"{layer}.bias"].data_type == onnx.TensorProto.FLOAT
    axes = {n.input[0]: n.attribute[0].i for n in model.graph.node
            if n.op_type == "DequantizeLinear" and n.attribute}  # fmt: skip
    assert (axes["stem.weight"], axes["up.weight"]) == (0, 1)


def test_a_residual_is_quantized_and_nothing_stands_between_convolution_and_addition(report):
    graph = onnx.load(report.path).graph
    made = makers(graph)
    additions = [node for node in graph.node if node.op_type == "Add"]
    assert len(additions) == 2
    for node in additions:
        assert sorted(made[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in made:
            assert made[node.input[0]].op_type not in ("Clip", "QuantizeLinear")


def test_the_report_says_what_was_and_what_was_not_verified(report):
    assert report.layers.compared >= 9
    assert report.layers.max_steps <= 1
    assert report.outputs[0].sqnr > 30
    assert "ONNX Runtime" in report.runtime
    assert "optimizations off" in report.runtime
    why = tensorrt_engine.why_no_engine()
    assert any(why in note and "no engine was built" in note for note in report.warnings) == bool(
        why
    )


def test_a_model_with_asymmetric_activations_is_refused_by_name(x, tmp_path):
    quantized = converted(Net(), x, "x86")
    with pytest.raises(qt.export.UnsupportedError, match=r"x_quantize has uint8 .*\"tensorrt\""):
        qt.export.tensorrt(quantized, tmp_path / "m.onnx", (x,))
    with pytest.raises(qt.export.UnsupportedError, match="int8 codes with zero point -"):
        qt.export.tensorrt(converted(Net(), x, "tflite"), tmp_path / "m.onnx", (x,))
    assert list(tmp_path.iterdir()) == []


def test_codes_of_fewer_bits_are_clipped_in_float(x, tmp_path):
    activation = qt.TensorSpec("int4", symmetric=True)
    weight = qt.TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
    mapping = qt.QConfigMapping().set_global(qt.QConfig(activation, weight))
    report = qt.export.tensorrt(converted(Net(), x, mapping), tmp_path / "m.onnx", (x,))
    graph = onnx.load(report.path).graph
    made = makers(graph)
    clips = [node for node in graph.node if node.op_type == "Clip"]
    assert clips
    assert not any(
        n.input[0] in made and made[n.input[0]].op_type == "QuantizeLinear" for n in clips
    )
    assert report.layers.max_steps <= 1


def test_what_tensorrt_would_refuse_is_not_written(tmp_path):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.det(self.conv(x))

    x = torch.randn(2, 3, 6, 6)
    with pytest.raises(qt.export.UnsupportedError, match=r"would refuse .*Det .*no importer"):
        qt.export.tensorrt(converted(Odd(), x), tmp_path / "m.onnx", (x,))
    assert list(tmp_path.iterdir()) == []


def _initializer(model: Any, name: str) -> Any:
    return next(t for t in model.graph.initializer if t.name == name)


def _node(model: Any, name: str) -> Any:
    return next(n for n in model.graph.node if n.name == name)


def _maker(model: Any, value: str) -> Any:
    return makers(model.graph)[value]


def _replace(model: Any, name: str, array: Any) -> None:
    _initializer(model, name).CopyFrom(onnx.numpy_helper.from_array(array, name))


def _scaled(factor: float) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        scale = _initializer(model, "stem.scale")
        _replace(model, "stem.scale", onnx.numpy_helper.to_array(scale) * factor)

    return change


def _zero_point(value: int, dtype: torch.dtype, *shape: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        array = torch.full(shape, value, dtype=dtype).numpy()
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, "zero"))
        _node(model, "stem/QuantizeLinear").input[2] = "zero"

    return change


def _without_zero_point(model: Any) -> None:
    del _node(model, "stem/QuantizeLinear").input[2]


def _computed_scale(model: Any) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Abs", ["stem.scale"], ["computed"], "abs"))
    _node(model, "stem/QuantizeLinear").input[1] = "computed"


def _scales_of_activation(model: Any) -> None:
    _replace(model, "stem.scale", torch.ones(8).numpy())


def _wrong_axis(model: Any) -> None:
    node = _node(model, "up.weight/DequantizeLinear")
    node.attribute[0].i = 0
    _replace(model, "up.weight_scale", torch.ones(12).numpy())


def _wrong_size(model: Any) -> None:
    _replace(model, "a.weight_scale", torch.ones(7).numpy())


def _pool_of_codes(model: Any) -> None:
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    pool.input[0] = "stem"


def _computed_bias(model: Any) -> None:
    model.graph.node.insert(0, onnx.helper.make_node("Abs", ["a.bias"], ["computed"], "abs"))
    _node(model, "a/Conv").input[2] = "computed"


def _float_weight(model: Any) -> None:
    weight = torch.ones(8, 8, 3, 3).numpy()
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "float"))
    _node(model, "a/Conv").input[1] = "float"


def _addition(model: Any, layer: str) -> Any:
    output = _node(model, f"{layer}/Conv").output[0]
    return next(n for n in model.graph.node if n.op_type == "Add" and output in n.input)


def _float_residual(model: Any) -> None:
    addition = _addition(model, "b")
    index = 1 - list(addition.input).index(_node(model, "b/Conv").output[0])
    addition.input[index] = _node(model, "down/Conv").output[0]


def _quantized_branch(model: Any) -> None:
    addition, output = _addition(model, "b"), _node(model, "b/Conv").output[0]
    parameters = list(_node(model, "b/QuantizeLinear").input[1:])
    place = list(model.graph.node).index(addition)
    for kind, source, made in (("Quantize", output, "q"), ("Dequantize", "q", "dq")):
        node = onnx.helper.make_node(f"{kind}Linear", [source, *parameters], [made], made)
        model.graph.node.insert(place + (kind == "Dequantize"), node)
    addition = next(n for n in model.graph.node if n.name == addition.name)
    addition.input[list(addition.input).index(output)] = "dq"


def _opset(version: int) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        model.opset_import[0].version = version

    return change


def _custom_operator(model: Any) -> None:
    _maker(model, _node(model, "stem/QuantizeLinear").input[0]).domain = "com.example"


def _dilated_pool(model: Any) -> None:
    pool = next(n for n in model.graph.node if n.op_type == "MaxPool")
    pool.attribute.append(onnx.helper.make_attribute("dilations", [2, 2]))
    for attribute in [a for a in pool.attribute[:-1] if a.name == "dilations"]:
        pool.attribute.remove(attribute)


@pytest.mark.parametrize(
    ("change", "rule", "operator", "module"),
    [
        (_zero_point(0, torch.uint8), "format", "QuantizeLinear", "stem"),
        (_without_zero_point, "format", "QuantizeLinear", "stem"),
        (_zero_point(3, torch.int8), "zero point", "QuantizeLinear", "stem"),
        (_zero_point(0, torch.int8, 2), "sizes", "QuantizeLinear", "stem"),
        (_scaled(-1), "scale", "QuantizeLinear", "stem"),
        (_scaled(float("inf")), "scale", "QuantizeLinear", "stem"),
        (_computed_scale, "scale", "QuantizeLinear", "stem"),
        (_scales_of_activation, "activation", "QuantizeLinear", "stem"),
        (_wrong_axis, "axis", "DequantizeLinear", "up.weight"),
        (_wrong_size, "sizes", "DequantizeLinear", "a.weight"),
        (_pool_of_codes, "codes", "MaxPool", "max_pool2d_1"),
        (_computed_bias, "bias", "Conv", "a"),
        (_float_weight, "weighted layer", "Conv", "a"),
        (_float_residual, "residual", "Add", "b"),
        (_quantized_branch, "residual", "Add", "b"),
        (_opset(9), "opset", "", ""),
        (_opset(21), "newest parser", "", ""),
        (_custom_operator, "operator", "Relu", "stem"),
        (_dilated_pool, "operator", "MaxPool", "max_pool2d_1"),
    ],
)  # fmt: skip
def test_each_rule_finds_the_node_that_breaks_it(report, change, rule, operator, module):
    model = onnx.load(report.path)
    assert violations(model) == []
    change(model)
    found = [v for v in violations(model) if v.rule == rule]
    assert found, [str(v) for v in violations(model)]
    assert (found[0].operator, found[0].module) == (operator, module)
    assert found[0].blocks == (rule not in ("weighted layer", "residual", "newest parser"))
    assert RULES[rule].source in str(found[0])


def test_the_checker_takes_any_file_and_refuses_what_is_none(report, x, tmp_path):
    other = qt.export.onnx(converted(Net(), x, "x86"), tmp_path / "x86.onnx", (x,), verify=False)
    rules = {violation.rule for violation in qt.export.check_tensorrt(other.path)}
    assert {"format", "zero point", "bias", "residual"} <= rules
    with pytest.raises(FileNotFoundError, match="absent"):
        qt.export.check_tensorrt(tmp_path / "absent.onnx")
    for damaged in (b"no model", b"", report.path.read_bytes()[:-7]):
        (tmp_path / "bad.onnx").write_bytes(damaged)
        with pytest.raises(ValueError, match="no valid ONNX file"):
            qt.export.check_tensorrt(tmp_path / "bad.onnx")


def _floats(address: int, shape: tuple[int, ...]) -> Tensor:
    """The memory at an address."""
    count = int(torch.tensor(shape).prod())
    array = (ctypes.c_float * count).from_address(address)
    return torch.frombuffer(array, dtype=torch.float32).reshape(shape)


def fake_tensorrt(change: Callable[[Tensor], Tensor], built: list[Any]) -> types.ModuleType:
    """A ``tensorrt`` of the calls that an engine needs, which computes in ONNX Runtime."""
    trt = types.ModuleType("tensorrt")
    kinds = ["FLOAT", "HALF", "INT8", "INT32", "INT64", "BOOL", "UINT8"]

    class Network:
        path = ""

        def get_input(self, index: int) -> Any:
            value = onnxruntime.InferenceSession(self.path).get_inputs()[index]
            shape = tuple(size if isinstance(size, int) else -1 for size in value.shape)
            return types.SimpleNamespace(name=value.name, shape=shape)

    class Parser:
        num_errors = 1

        def __init__(self, network: Network, logger: Any) -> None:
            self.network = network

        def parse_from_file(self, path: str) -> bool:
            self.network.path = path
            return not built or built[0] != "refuse"

        def get_error(self, index: int) -> Any:
            return types.SimpleNamespace(desc=lambda: "no such operator")

    class Builder:
        def __init__(self, logger: Any) -> None: ...

        def create_network(self, flags: int) -> Network:
            assert flags == 1 << 1
            return Network()

        def create_builder_config(self) -> Any:
            ignore = lambda *args: None  # noqa: E731
            return types.SimpleNamespace(clear_flag=ignore, add_optimization_profile=ignore)

        def create_optimization_profile(self) -> Any:
            return types.SimpleNamespace(set_shape=lambda *shapes: built.append(shapes))

        def build_serialized_network(self, network: Network, config: Any) -> Any:
            return network.path

    class Context:
        def __init__(self, path: str) -> None:
            self.session = onnxruntime.InferenceSession(path)
            self.shapes: dict[str, tuple[int, ...]] = {}
            self.addresses: dict[str, int] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> None:
            self.shapes[name] = shape

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return (next(iter(self.shapes.values()))[0], 5)

        def set_tensor_address(self, name: str, address: int) -> None:
            self.addresses[name] = address

        def execute_async_v3(self, stream: int) -> bool:
            feeds = {n: _floats(self.addresses[n], s).numpy() for n, s in self.shapes.items()}
            for value, result in zip(self.session.get_outputs(), self.session.run(None, feeds)):
                memory = _floats(self.addresses[value.name], result.shape)
                memory.copy_(change(torch.from_numpy(result)))
            return True

    class Engine:
        def __init__(self, path: str) -> None:
            self.path = path
            session = onnxruntime.InferenceSession(path)
            self.inputs = [value.name for value in session.get_inputs()]
            self.names = self.inputs + [value.name for value in session.get_outputs()]
            self.num_io_tensors = len(self.names)

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> str:
            return "in" if name in self.inputs else "out"

        def get_tensor_dtype(self, name: str) -> str:
            return "FLOAT"

        def create_execution_context(self) -> Context:
            return Context(self.path)

    class Logger:
        ERROR = 0

        def __init__(self, level: int) -> None: ...

    trt.__dict__.update(
        __version__="10.0",
        __spec__=types.SimpleNamespace(name="tensorrt"),
        Logger=Logger,
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=lambda logger: types.SimpleNamespace(deserialize_cuda_engine=Engine),
        NetworkDefinitionCreationFlag=types.SimpleNamespace(STRONGLY_TYPED=1),
        BuilderFlag=types.SimpleNamespace(TF32=0),
        TensorIOMode=types.SimpleNamespace(INPUT="in", OUTPUT="out"),
        DataType=types.SimpleNamespace(**{kind: kind for kind in kinds}),
    )
    return trt


def _install(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> list[Any]:
    built: list[Any] = []
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(change, built))
    for module in (tensorrt_engine, sys.modules["qtoolkit.export.tensorrt"]):
        monkeypatch.setattr(module, "why_no_engine", lambda: "")
    monkeypatch.setattr(tensorrt_engine, "_on_device", lambda tensor: tensor.contiguous())
    monkeypatch.setattr(tensorrt_engine, "_run", lambda context: context.execute_async_v3(0))
    return built


def test_where_tensorrt_is_installed_an_engine_is_built_and_verified(
    quantized, x, tmp_path: Path, monkeypatch
):
    built = _install(monkeypatch, lambda output: output)
    report = qt.export.tensorrt(quantized, tmp_path / "m.onnx", (x[:2],))
    assert "TensorRT 10.0" in report.runtime
    assert not any("no engine" in note for note in report.warnings)
    assert built == [("x", (1, 3, 16, 16), (2, 3, 16, 16), (2, 3, 16, 16))]
    run = qt.export.load("tensorrt", report.path)
    assert run.version.startswith("TensorRT")
    with torch.no_grad():
        torch.testing.assert_close(run(x), quantized(x), atol=0.02, rtol=0.1)
    assert run(x[:1]).shape == (1, 5)
    assert len(built) == 2  # a smaller batch needs no other engine
    run(torch.cat([x, x]))
    assert built[-1][2] == (8, 3, 16, 16)


def test_an_engine_that_computes_something_else_leaves_no_file(
    quantized, x, tmp_path: Path, monkeypatch
):
    _install(monkeypatch, lambda output: output.flip(1))
    with pytest.raises(qt.export.VerificationError, match="output 0 of the tensorrt file"):
        qt.export.tensorrt(quantized, tmp_path / "m.onnx", (x,))
    built = _install(monkeypatch, lambda output: output)
    built.append("refuse")
    with pytest.raises(qt.export.VerificationError, match=r"parser refuses .* no such operator"):
        qt.export.tensorrt(copy.deepcopy(quantized), tmp_path / "m.onnx", (x,))
    assert list(tmp_path.iterdir()) == []
