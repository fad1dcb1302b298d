"""The quantization of values before fused additions, which exports need and kernels do not."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import ResNet, batches, settle
from torch import Tensor, fx, nn

import qtoolkit as qt
from qtoolkit.nn import Conv1d, Conv2d
from qtoolkit.observers import HistogramObserver
from qtoolkit.saving.layers import make_quantized, quantized_options

SHAPE = (8, 1, 8, 8)
WEIGHT = qt.TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
BRANCH = ("branch_scale", "branch_zero_point")


class Residual1d(nn.Module):
    """Two residual additions of 1-D convolutions, one of them without batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 6, 3, padding=1)
        self.second = nn.Conv1d(6, 6, 3, padding=1)
        self.norm = nn.BatchNorm1d(6)
        self.third = nn.Conv1d(6, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (x + self.norm(self.second(x))).relu()
        x = x + self.third(x)
        return self.head(x.mean(2))


#: The network, its input's shape, and for each residual layer the float layer before the addition.
NETWORKS = [
    (ResNet, SHAPE, {"layer1.conv2": "layer1.bn2", "layer2.conv2": "layer2.bn2"}),
    (Residual1d, (8, 4, 12), {"second": "norm", "third": "third"}),
]


def mapping(activation: qt.TensorSpec) -> qt.QConfigMapping:
    return qt.QConfigMapping().set_global(qt.QConfig(activation, WEIGHT))


def prepared(model: nn.Module, shape: tuple[int, ...], spec: qt.TensorSpec | None = None):
    data = batches(shape)
    result = qt.prepare(model, None if spec is None else mapping(spec), example_inputs=(data[0],))
    return qt.calibrate(result, data, progress=False)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return qt.convert(prepared(settle(ResNet(), SHAPE), SHAPE))


def residual_layers(model: nn.Module) -> dict[str, nn.Module]:
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Conv1d | Conv2d)}
    adding = {name: layer for name, layer in layers.items() if layer.residual_scale is not None}
    others = [layer for name, layer in layers.items() if name not in adding]
    assert all(layer.branch_scale is layer.branch_zero_point is None for layer in others)
    return adding


class BeforeAddition(fx.Interpreter):
    """Collects what a layer gives to the addition that reads it, and whether a ReLU follows."""

    def __init__(self, model: nn.Module, layer: str) -> None:
        super().__init__(fx.symbolic_trace(model))
        (node,) = (node for node in self.module.graph.nodes if str(node.target) == layer)
        (self.addition,) = node.users
        (reader,) = self.addition.users
        self.layer, self.relu = node, "relu" in str(reader.target)
        self.values: list[tuple[Tensor, Tensor]] = []

    def run_node(self, n: fx.Node) -> Tensor:
        if n is self.addition:
            (other,) = (arg for arg in n.args if arg is not self.layer)
            # The addition is in place.
            self.values.append((self.env[self.layer].clone(), self.env[other].clone()))
        return super().run_node(n)


def before_additions(model: nn.Module, shape: tuple[int, ...], name: str) -> list[Tensor]:
    """What a layer of the float model gives, over the calibration data; before a ReLU no less than
    makes a difference to it."""
    run = BeforeAddition(model, name)
    with torch.no_grad():
        for x in batches(shape):
            run.run(x)
    if not run.relu:
        return [branch for branch, _ in run.values]
    return [torch.maximum(branch, -residual.relu()) for branch, residual in run.values]


def saturating(layer: nn.Module) -> tuple[float, float]:
    """Beyond these the output is its least or greatest code, whatever is added."""
    residual = 255 * float(layer.residual_scale)
    least = -float(layer.residual_scale) * int(layer.residual_zero_point)
    low = 0.0 if layer.relu else -float(layer.output_scale) * int(layer.output_zero_point)
    high = float(layer.output_scale) * (255 - int(layer.output_zero_point))
    return low - (least + residual), high - least


def error(x: Tensor, scale: Tensor, zero_point: Tensor) -> float:
    """Mean squared error of 8-bit codes."""
    codes = (torch.round(x / scale) + zero_point).clamp(0, 255)
    return float(((codes - zero_point) * scale - x).double().square().mean())


@pytest.mark.parametrize(("kind", "shape", "layers"), NETWORKS)
@pytest.mark.parametrize(
    ("spec", "low", "high"),
    [
        (qt.TensorSpec(observer="minmax"), 0, 255),
        (qt.TensorSpec("int8", observer="minmax"), -128, 127),
        (qt.TensorSpec("int8", symmetric=True, observer="minmax"), -127, 127),
        (qt.TensorSpec("uint4", observer="minmax"), 0, 255),  # 8 bits are kept anyway
    ],
)
def test_the_range_before_an_addition_is_that_of_the_float_layer(
    kind, shape, layers, spec, low, high
):
    model = settle(kind(), shape)
    quantized = residual_layers(qt.convert(prepared(model, shape, spec)))
    assert quantized.keys() == layers.keys()
    for name, layer in quantized.items():
        values = torch.cat(before_additions(model, shape, layers[name])).double()
        least, greatest = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
        if spec.symmetric:
            scale, zero_point = max(-least, greatest) / 127, 0
        else:
            scale = (greatest - least) / (high - low)
            zero_point = low - round(least / scale)
        # Folding the batch norm rounds differently.
        assert float(layer.branch_scale) == pytest.approx(scale, rel=1e-5)
        assert int(layer.branch_zero_point) == zero_point
        assert layer.branch_scale.dtype == torch.float32
        assert layer.branch_zero_point.dtype == torch.int32


def test_by_default_the_range_before_an_addition_has_the_least_squared_error(resnet):
    model = settle(ResNet(), SHAPE)
    for name, layer in residual_layers(resnet).items():
        observer = HistogramObserver()
        values = before_additions(model, SHAPE, name.replace("conv2", "bn2"))
        for value in values:
            observer(value)
        scale, zero_point = observer.calculate_qparams()
        assert float(layer.branch_scale) == pytest.approx(float(scale), rel=0.01)
        assert abs(int(layer.branch_zero_point) - int(zero_point)) <= 1
        whole = qt.observers.MinMaxObserver()
        whole(torch.cat(values))
        found = error(torch.cat(values), layer.branch_scale, layer.branch_zero_point)
        assert found <= 1.01 * error(torch.cat(values), *whole.calculate_qparams())


def test_before_a_relu_the_codes_reach_no_lower_than_changes_the_result():
    model = settle(ResNet(), SHAPE)
    spec = qt.TensorSpec(observer="minmax")
    for name, layer in residual_layers(qt.convert(prepared(model, SHAPE, spec))).items():
        run = BeforeAddition(model, name.replace("conv2", "bn2"))
        with torch.no_grad():
            run.run(torch.cat(batches(SHAPE)))
        ((branch, residual),) = run.values
        step, zero_point = float(layer.branch_scale), int(layer.branch_zero_point)
        # Finer than of the whole range, and nothing that the ReLU lets through is clipped.
        assert step < 0.95 * float(branch.max() - branch.min()) / 255
        coded = ((branch / step).round() + zero_point).clamp(0, 255).sub(zero_point) * step
        error = (coded + residual).relu() - (branch + residual).relu()
        assert float(error.abs().max()) <= 0.501 * step


def test_observing_it_changes_no_other_number():
    model = settle(ResNet(), SHAPE)
    data = batches(SHAPE)
    expected = qt.convert(prepared(model, SHAPE))
    without = qt.prepare(model, None, example_inputs=(data[0],))
    for module in without.modules():
        if "(before the addition)" in getattr(module, "name", ""):
            module.freeze()
    without = qt.convert(qt.calibrate(without, data, progress=False))
    state = without.state_dict()
    assert state.keys() == expected.state_dict().keys()
    differing = {k for k, v in expected.state_dict().items() if not torch.equal(state[k], v)}
    assert differing
    assert all(name.endswith(BRANCH) for name in differing)
    x = batches(SHAPE, seed=5)[0]
    bits = without(x)
    for run in (expected, torch.jit.script(expected), qt.compile(expected, (x,)), without):
        assert torch.equal(run(x), bits)


def test_the_range_survives_script_pickle_and_copies(resnet):
    states = [
        torch.jit.script(copy.deepcopy(resnet)).state_dict(),
        pickle.loads(pickle.dumps(resnet)).state_dict(),
        copy.deepcopy(resnet).state_dict(),
        copy.deepcopy(resnet).half().state_dict(),
    ]
    for name, layer in residual_layers(resnet).items():
        for state in states:
            assert torch.equal(state[f"{name}.branch_scale"], layer.branch_scale)
            assert torch.equal(state[f"{name}.branch_zero_point"], layer.branch_zero_point)


def test_a_checkpoint_says_what_is_known_of_the_range(resnet):
    state = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    older = {name: tensor for name, tensor in state.items() if not name.endswith(BRANCH)}
    model = copy.deepcopy(resnet)
    model.load_state_dict(older)
    assert all(layer.branch_scale is None for layer in residual_layers(model).values())
    assert model.state_dict().keys() == older.keys()
    model.load_state_dict(state)
    for name, layer in residual_layers(model).items():
        assert torch.equal(layer.branch_scale, state[f"{name}.branch_scale"])
        assert torch.equal(layer.branch_zero_point, state[f"{name}.branch_zero_point"])
    model.load_state_dict({"conv1.bias": state["conv1.bias"]}, strict=False)
    assert all(layer.branch_scale is not None for layer in residual_layers(model).values())


def test_layers_pickled_without_the_range_load(resnet):
    layer = copy.deepcopy(residual_layers(resnet)["layer1.conv2"])
    for name in BRANCH:
        del layer._buffers[name]
    loaded = pickle.loads(pickle.dumps(layer))
    assert loaded.branch_scale is None
    assert loaded.branch_zero_point is None
    torch.jit.script(loaded)


def test_files_keep_the_range(resnet, tmp_path):
    qt.save(resnet, tmp_path / "m.qt")
    layers = residual_layers(qt.load(tmp_path / "m.qt"))
    assert layers.keys() == residual_layers(resnet).keys()
    for name, layer in residual_layers(resnet).items():
        assert torch.equal(layers[name].branch_scale, layer.branch_scale)
        assert torch.equal(layers[name].branch_zero_point, layer.branch_zero_point)


def test_files_without_the_range_load(resnet):
    layer = residual_layers(resnet)["layer1.conv2"]
    older = {name: tensor for name, tensor in layer._buffers.items() if name not in BRANCH}
    loaded = make_quantized("Conv2d", quantized_options(layer), older)
    assert loaded.branch_scale is None
    assert loaded.branch_zero_point is None
    assert torch.equal(loaded.weight, layer.weight)


def test_a_calibrated_model_is_converted_after_pickling_too():
    calibrated = prepared(settle(ResNet(), SHAPE), SHAPE)
    expected = qt.convert(calibrated).state_dict()
    actual = qt.convert(pickle.loads(pickle.dumps(calibrated))).state_dict()
    assert "layer1.conv2.branch_scale" in actual
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_a_calibrated_checkpoint_without_the_range_loads_and_converts():
    calibrated = prepared(settle(ResNet(), SHAPE), SHAPE)
    model = qt.prepare(settle(ResNet(), SHAPE), None, example_inputs=(batches(SHAPE)[0],))
    older = {k: v for k, v in calibrated.state_dict().items() if "conv2_observer" not in k}
    assert older.keys() < calibrated.state_dict().keys()
    model.load_state_dict(older)
    layer = residual_layers(qt.convert(model))["layer1.conv2"]
    low, high = saturating(layer)
    assert float(layer.branch_scale) == pytest.approx((high - low) / 255, rel=1e-5)


# --- quantization-aware training ------------------------------------------------------------------


def trained_qat(model: nn.Module, shape: tuple[int, ...], spec: qt.TensorSpec) -> nn.Module:
    data = batches(shape)
    qat = qt.prepare_qat(model, mapping(spec), example_inputs=(data[0],))
    for x in data:
        qat(x)
    return qat


@pytest.mark.parametrize(("factor", "deviations_count"), [(1.0, 4), (0.01, 0), (100.0, None)])
def test_after_training_the_range_before_an_addition_follows_from_batch_norm(
    factor, deviations_count
):
    qat = trained_qat(settle(ResNet(), SHAPE), SHAPE, qt.TensorSpec(observer="moving_average"))
    norm = qat.get_submodule("layer2.bn2")
    with torch.no_grad():
        norm.weight.mul_(factor)
    layer = residual_layers(qt.convert(qat))["layer2.conv2"]
    low, high = saturating(layer)
    gamma, beta = norm.weight.detach().abs(), norm.bias.detach()
    if deviations_count is not None:
        spread = deviations_count * gamma
        low = max(low, min(low / 2, float((beta - spread).min())))
        high = min(high, max(high / 2, float((beta + spread).max())))
    assert float(layer.branch_scale) == pytest.approx((high - low) / 255, rel=1e-5)
    assert int(layer.branch_zero_point) == round(-low / float(layer.branch_scale))


def test_after_training_without_batch_norm_nothing_is_clipped_that_could_matter():
    qat = trained_qat(Residual1d(), (8, 4, 12), qt.TensorSpec(observer="moving_average"))
    layer = residual_layers(qt.convert(qat))["third"]
    low, high = saturating(layer)
    assert float(layer.branch_scale) == pytest.approx((high - low) / 255, rel=1e-5)

    def output(branch: Tensor, residual: Tensor) -> Tensor:
        value = branch + layer.residual_scale * (residual - layer.residual_zero_point)
        codes = torch.round(value / layer.output_scale) + layer.output_zero_point
        return codes.clamp(0, 255)

    branch = torch.linspace(3 * low, 3 * high, 301)
    residual = torch.arange(256).unsqueeze(1)
    assert torch.equal(output(branch, residual), output(branch.clamp(low, high), residual))


def test_training_observes_nothing_before_additions():
    example = batches(SHAPE)[0]
    qat = qt.prepare_qat(settle(ResNet(), SHAPE), None, example_inputs=(example,))
    assert "before the addition" not in str(qt.explain(qat))
    prepared = qt.prepare(settle(ResNet(), SHAPE), None, example_inputs=(example,))
    assert str(qt.explain(prepared)).count("before the addition") == 2


def test_learned_low_bit_activations_keep_8_bits_before_additions():
    spec = qt.TensorSpec("uint4", method="lsq+")
    layers = residual_layers(qt.convert(trained_qat(settle(ResNet(), SHAPE), SHAPE, spec)))
    layer = layers["layer1.conv2"]
    # Wider than the output's 15 steps, and yet finer.
    assert 0 < float(layer.branch_scale) < float(layer.output_scale)
    assert 0 < int(layer.branch_zero_point) < 255
