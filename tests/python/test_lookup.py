"""Functions of one value as tables: activations and arithmetic with numbers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import batches, settle, sqnr
from torch import nn
from torch.nn import functional as F

import qtoolkit as qt
from qtoolkit.nn import QParams
from qtoolkit.nn.lookup import Lookup, tabulate


class Around(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 8, 3)
        self.function = function
        self.b = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def quantize(model: nn.Module, data: list, qat: bool = False) -> nn.Module:
    if qat:
        prepared = qt.prepare_qat(model, None, (data[0],))
        for x in data:
            prepared(x).sum().backward()
        return qt.convert(prepared.eval())
    prepared = qt.prepare(model, None, (data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def lookups(model: nn.Module) -> list[Lookup]:
    return [m for m in model.modules() if isinstance(m, Lookup)]


def qparams(scale: float, zero_point: int, signed: bool = False) -> QParams:
    limits = (-128, 127) if signed else (0, 255)
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), *limits)


@pytest.mark.parametrize("signed", [False, True])
def test_a_table_holds_the_quantized_function_of_every_code(signed):
    input, output = qparams(0.05, -20 if signed else 100, signed), qparams(0.004, 3)
    table = tabulate(torch.sigmoid, input=input, output=output)
    codes = torch.arange(*((-128, 128) if signed else (0, 256)))
    real = (codes - input.zero_point).float() * 0.05
    expected = torch.round(torch.sigmoid(real) * (1 / torch.tensor(0.004))).add(3).clamp(0, 255)
    assert torch.equal(table[codes], expected.to(torch.uint8))


def test_a_table_holds_the_zero_point_for_nan_and_clamps_infinities():
    input = qparams(1.0, 128)
    table = tabulate(lambda x: torch.log(x), input=input, output=qparams(0.1, 50))
    assert table[0] == 50  # log of -128
    assert table[128] == 0  # log of 0
    assert table[129] == 50


MODULES = [
    nn.Sigmoid(),
    nn.Tanh(),
    nn.SiLU(inplace=True),
    nn.Mish(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.Hardswish(inplace=True),
    nn.Hardsigmoid(),
    nn.LeakyReLU(0.2),
    nn.ELU(0.7),
    nn.CELU(1.3),
    nn.SELU(),
    nn.Softplus(2.0),
    nn.Softsign(),
    nn.Softshrink(0.3),
    nn.Hardshrink(0.3),
    nn.LogSigmoid(),
    nn.Tanhshrink(),
    nn.Threshold(0.1, -0.5),
    nn.Hardtanh(-0.5, 0.7),
]
FUNCTIONS = {
    "torch.sigmoid": torch.sigmoid,
    "x.sigmoid": lambda x: x.sigmoid(),
    "F.sigmoid": F.sigmoid,
    "torch.tanh": torch.tanh,
    "x.tanh": lambda x: x.tanh(),
    "F.silu": lambda x: F.silu(x, inplace=True),
    "F.mish": F.mish,
    "F.gelu": F.gelu,
    "F.gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "F.hardswish": F.hardswish,
    "F.hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "F.leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "F.elu": lambda x: F.elu(x, alpha=0.7),
    "F.celu": F.celu,
    "F.selu": F.selu,
    "F.softplus": lambda x: F.softplus(x, 2),
    "F.hardtanh": lambda x: F.hardtanh(x, -0.5, 0.7),
    "x.clamp": lambda x: x.clamp(-0.5, max=0.7),
    "torch.abs": torch.abs,
    "x.abs": lambda x: x.abs(),
    "-x": lambda x: -x,
    "x + 3": lambda x: x + 3,
    "3 - x": lambda x: 3 - x,
    "x - 3": lambda x: torch.sub(x, 3),
    "0.5 * x": lambda x: 0.5 * x,
    "x.mul": lambda x: x.mul(-2),
    "x / 6": lambda x: x / 6,
}


def check_function(model: nn.Module, qat: bool = False) -> Lookup:
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data, qat)
    assert not qt.explain(quantized).float_layers
    (lookup,) = lookups(quantized)
    with torch.no_grad():
        reference = model if not qat else quantized
        assert sqnr(reference(data[0]), quantized(data[0])) > 28
    return lookup


@pytest.mark.parametrize("function", MODULES, ids=repr)
def test_modules_become_tables(function):
    model = settle(Around(copy.deepcopy(function)), (4, 4, 8, 8))
    lookup = check_function(model)
    assert lookup.kind() == f"Lookup({type(function).__name__})"
    assert lookup.source == "function"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods_become_tables(name):
    check_function(settle(Around(FUNCTIONS[name]), (4, 4, 8, 8)))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: 6 / (x + 20),
        lambda x: torch.div(x, 6, rounding_mode="floor"),
        lambda x: torch.add(x, 3, alpha=2),
        lambda x: x.exp(),
        lambda x: x.clamp(min=-0.5),
    ],
)
def test_other_functions_stay_in_float(function):
    model = settle(Around(function), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    assert len(qt.explain(quantized).float_layers) >= 1
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 20


def test_clamping_to_positive_values_is_fused_as_relu():
    model = settle(Around(lambda x: x.clamp(0, 6)), (4, 4, 8, 8))
    quantized = quantize(model, batches((4, 4, 8, 8)))
    assert not lookups(quantized)
    assert quantized.a.relu
    assert quantized.a.upper == 6


def test_functions_in_a_row_become_one_table():
    model = settle(Around(lambda x: F.relu6(x + 3) / 6), (4, 4, 8, 8))
    assert check_function(model).function == "add 3, ReLU6, div 6"
    assert check_function(model, qat=True).function == "add 3, ReLU6, div 6"


def test_a_value_between_functions_that_others_read_is_kept():
    model = settle(
        Around(lambda x: torch.cat([x.sigmoid(), x.sigmoid().tanh()], 1)[:, 4:12]), (4, 4, 8, 8)
    )
    quantized = quantize(model, batches((4, 4, 8, 8)))
    assert sorted(m.function for m in lookups(quantized)) == ["Sigmoid", "Sigmoid, Tanh"]


def test_a_qat_model_converts_to_its_own_values():
    model = settle(Around(nn.SiLU()), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    qat = qt.prepare_qat(model, None, (data[0],))
    for x in data:
        qat(x).sum().backward()
    qat.eval()
    quantized = qt.convert(qat)
    assert len(lookups(quantized)) == 1
    with torch.no_grad():
        assert sqnr(qat(data[0]), quantized(data[0])) > 60


def test_paths_copies_pickles_and_scripts_give_the_same_bits(tmp_path):
    from qtoolkit import _C

    model = settle(Around(nn.GELU()), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    expected = quantized(data[0])
    assert torch.equal(copy.deepcopy(quantized)(data[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(data[0]), expected)
    qt.export.torchscript(quantized, tmp_path / "m.pt", example_inputs=(data[0],))
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(data[0]), expected)
    assert torch.equal(quantized.half().float()(data[0]), expected)
    try:
        for path in _C.cpu_paths():
            _C.force_path(path)
            assert torch.equal(quantized(data[0]), expected), path
    finally:
        _C.force_path(None)


def test_a_function_of_float_values_stays_in_float():
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x):
            return self.b(F.gelu(self.norm(self.a(x))))

    quantized = quantize(settle(Norm(), (4, 8)), batches((4, 8)))
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert reasons["gelu"] == "a float layer makes its input"
    assert not lookups(quantized)


def test_a_function_that_only_float_layers_read_stays_in_float():
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 8, 3)

        def forward(self, x):
            return torch.sigmoid(self.a(x))

    quantized = quantize(settle(Ends(), (4, 4, 8, 8)), batches((4, 4, 8, 8)))
    assert not lookups(quantized)
    assert quantized.a.output_scale is None


def test_a_type_is_kept_in_float_by_its_qconfig():
    mapping = qt.get_default_qconfig_mapping("x86").set_module_type(nn.SiLU, None)
    model = settle(Around(F.silu), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    prepared = qt.prepare(model, mapping, (data[0],))
    qt.calibrate(prepared, data, progress=False)
    assert not lookups(qt.convert(prepared))


def lowest(layer: nn.Module) -> float:
    """The least real number that a layer's output codes can be."""
    return float(layer.output_scale * (layer.quant_min - layer.output_zero_point))


def highest(layer: nn.Module) -> float:
    return float(layer.output_scale * (layer.quant_max - layer.output_zero_point))


def test_the_range_before_hardswish_begins_at_minus_three():
    model = settle(Around(nn.Hardswish()), (4, 4, 8, 8))
    with torch.no_grad():
        model.a.weight *= 3
    data = batches((4, 4, 8, 8))
    quantized = quantize(model, data)
    assert model.a(data[0]).min() < -6
    assert -3 - float(quantized.a.output_scale) < lowest(quantized.a) < -2.9
    assert highest(quantized.a) > 6
    # Training has its own range.
    qat = quantize(model, data, qat=True)
    assert lowest(qat.a) < -6


def test_the_range_is_kept_where_another_layer_reads_it():
    class Both(Around):
        def forward(self, x):
            y = self.a(x)
            return self.b(self.function(y) + y)

    model = settle(Both(nn.Hardswish()), (4, 4, 8, 8))
    with torch.no_grad():
        model.a.weight *= 3
    assert lowest(quantize(model, batches((4, 4, 8, 8))).a) < -6


def test_a_positive_factor_changes_the_scale_alone():
    model = settle(Around(lambda x: x * 3 / 7), (4, 4, 8, 8))
    data = batches((4, 4, 8, 8))
    (lookup,) = lookups(quantize(model, data))
    assert torch.equal(lookup.table, torch.arange(256).to(torch.uint8))
    assert torch.allclose(lookup.output_scale, lookup.input_scale * 3 / 7)
