"""Models as users write them: the quantized one computes what the float one does."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt


def conv(i: int = 3, o: int = 8, k: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def quantize(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def check(model: nn.Module, shape=(4, 3, 16, 16), least: float = 25, factor: float = 1.0):
    """Quantizes after training and for training; both must stay close to the float model."""
    if factor == 1.0:
        settle(model, shape)
    model.eval()
    data = [factor * x for x in batches(shape)]
    with torch.no_grad():
        expected = model(data[0].clone())
    quantized = quantize(model, data)
    with torch.no_grad():
        assert sqnr(expected, quantized(data[0].clone())) > least
    qat = qt.prepare_qat(model, example_inputs=(data[0].clone(),))
    for x in data:
        qat(x.clone())
    qt.convert(qat)(data[0].clone())
    return quantized


def module(function, **children: nn.Module) -> nn.Module:
    """A module with these children whose forward is the function."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, child in children.items():
                self.add_module(name, child)

        def forward(self, x: Tensor) -> Tensor:
            return function(self, x)

    return Model()


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.name: layer.reason for layer in qt.explain(model).float_layers}


# --- in-place operators -------------------------------------------------------------------------


def residual_unit(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    out = m.relu(x)  # in place: x changes too
    out = m.a(out)
    out = m.relu(out)
    return m.last(m.b(out) + x)


def relu_function(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    y = functional.relu_(x)
    return m.a(x) + m.b(y)


def multiply(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    y = x
    x.mul_(2)
    return m.a(y) + x


def silu(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    y = functional.silu(x, inplace=True)
    return m.a(x) + m.b(y)


def iadd_with_alias(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    y = x
    x += m.a(x)
    return m.b(y)


def on_a_view(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    functional.relu_(x.view(x.size(0), -1))
    return m.a(x)


def assigned(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    x[:, 0] = 0
    return m.a(x)


@pytest.mark.parametrize(
    "function",
    [residual_unit, relu_function, multiply, silu, iadd_with_alias, on_a_view, assigned],
    ids=lambda f: f.__name__,
)
def test_inplace_operators(function):
    children = {"first": conv(), "a": conv(8), "b": conv(8), "last": conv(8)}
    check(module(function, relu=nn.ReLU(inplace=True), **children))


# --- layers that are not what their type says ---------------------------------------------------


class Tripled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return functional.conv2d(x, self.weight * 3, self.bias, self.stride, self.padding)


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(x, 0.5) if x.sum() < 1e9 else x


class Shifted(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1 if x.sum() < 1e9 else x


@pytest.mark.parametrize("layer", [Tripled(8, 8, 3, padding=1), Leaky(), Shifted()])
def test_a_subclass_with_its_own_forward_keeps_it(layer):
    model = check(nn.Sequential(conv(), copy.deepcopy(layer), conv(8)))
    assert "1" in reasons(model)


def test_a_layer_with_a_hook_keeps_it():
    for index in range(3):
        model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8))
        model[index].register_forward_hook(lambda module, args, output: output * 2)
        quantized = check(model)
        if index == 0:
            assert reasons(quantized)["0"] == "it has forward hooks"


def test_a_parametrized_weight_stays():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(conv()), nn.BatchNorm2d(8), nn.ReLU(), conv(8)
    )
    data = batches((4, 3, 16, 16))
    model.eval()
    quantized = quantize(model, data)
    assert sqnr(model(data[0]), quantized(data[0])) > 25
    assert "parametrized" in reasons(quantized)["0"]


def test_a_batch_norm_without_statistics_stays():
    check(nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8)))


def test_batch_norm_after_linear_over_three_dimensions_is_not_folded():
    model = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    check(copy.deepcopy(model), (32, 8, 16))
    check(copy.deepcopy(model), (32, 16))
    check(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(5), nn.Linear(8, 4)), (32, 5, 16))


def test_max_pooling_with_indices():
    def forward(m, x):
        y, _ = m.pool(m.first(x))
        return m.last(y)

    pool = nn.MaxPool2d(2, return_indices=True)
    check(module(forward, first=conv(), pool=pool, last=conv(8)))


# --- tensors in other forms ---------------------------------------------------------------------


def test_views_of_float_results():
    check(module(lambda m, x: torch.sigmoid(m.c(x)).view(x.size(0), -1), c=conv()), least=20)
    check(module(lambda m, x: m.c(x).view(x.size(0), -1), c=conv()))
    quantized = check(module(lambda m, x: m.c(x), c=conv()))
    assert quantized(torch.randn(4, 3, 16, 16)).view(4, -1).shape == (4, 8 * 256)


def test_the_output_of_an_lstm():
    lstm = nn.LSTM(6, 8, batch_first=True)
    check(module(lambda m, x: m.fc(m.lstm(x)[0]), lstm=lstm, fc=nn.Linear(8, 4)), (4, 5, 6))


def test_inputs_in_a_dict():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, inputs: dict[str, Tensor]) -> Tensor:
            return self.c(inputs["image"])

    model = Model().eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = qt.prepare(model, example_inputs=({"image": x},))
    qt.calibrate(prepared, [({"image": x},)], progress=False)
    assert sqnr(model({"image": x}), qt.convert(prepared)({"image": x})) > 25


def test_parameters_that_forward_reads_itself():
    check(module(lambda m, x: m.c(x.to(m.c.weight.dtype)), c=conv()))
    check(module(lambda m, x: m.c(x) * m.c.weight.square().sum(), c=conv()))
    tied = module(
        lambda m, x: functional.linear(m.l(x), m.l.weight.t()) + x, l=nn.Linear(12, 12, bias=False)
    )
    check(tied, (8, 12))


def test_a_layer_called_with_a_keyword():
    assert not reasons(check(module(lambda m, x: m.c(input=x), c=conv())))


def test_two_inputs_of_an_untraceable_model():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            if a.sum() > 1e9:
                a = a * 2
            return self.c(a) + self.c(b)

    model = Model().eval()
    x, y = torch.randn(2, 2, 3, 8, 8)
    prepared = qt.prepare(model, example_inputs=(x, y))
    qt.calibrate(prepared, [(x, y, torch.zeros(2))], progress=False)
    quantized = qt.convert(prepared)
    assert sqnr(model(x, y), quantized(x, y)) > 25
    result = qt.compare(model, quantized, [(x, y)], progress=False)
    assert [layer.name for layer in result.layers] == ["c"]
    assert result.layers[0].sqnr > 25
    with pytest.raises(TypeError, match="2 input"):
        qt.calibrate(prepared, [x], progress=False)


def test_a_scripted_child():
    model = nn.Sequential(conv(), torch.jit.script(conv(8, 8))).eval()
    data = batches((2, 3, 8, 8))
    assert sqnr(model(data[0]), quantize(model, data)(data[0])) > 25


def test_random_layers_do_not_stop_capture():
    class Noise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 0.01 * torch.randn_like(x)

    model = nn.Sequential(conv(), Noise(), conv(8)).eval()
    quantized = quantize(model, batches((2, 3, 8, 8)))
    assert isinstance(quantized.get_submodule("0"), qt.nn.Conv2d)


@pytest.mark.parametrize("factor", [1e-8, 1e-15, 1e8])
def test_tiny_and_huge_values_keep_their_precision(factor):
    model = nn.Sequential(conv(bias=False), nn.ReLU(), conv(8, bias=False))
    torch.manual_seed(0)
    check(model, factor=factor)
    with torch.no_grad():
        model[2].weight *= factor
    check(model, factor=factor)


# --- layers that are called more than once ------------------------------------------------------


def repeated(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)
    for _ in range(4):
        x = functional.relu(m.d(x)) / 2
    return x


def test_a_layer_called_often_is_stored_once(tmp_path):
    model = settle(module(repeated, first=conv(), d=conv(8)), (4, 3, 16, 16))
    data = batches((4, 3, 16, 16))
    quantized = quantize(model, data)
    layers = [m for m in quantized.modules() if isinstance(m, qt.nn.Conv2d)]
    assert len(layers) == 5
    assert len({layer.weight.data_ptr() for layer in layers}) == 2
    report = qt.export.torchscript(quantized, tmp_path / "m.pt", (data[0],))
    assert report.max_difference == 0.0


@pytest.mark.parametrize("prepare", [qt.prepare, qt.prepare_qat])
def test_a_layer_called_often_has_one_name_in_a_checkpoint(prepare):
    model = settle(module(repeated, first=conv(), d=conv(8)), (4, 3, 16, 16))
    prepared = prepare(model, example_inputs=(torch.randn(4, 3, 16, 16),))
    keys = {key for key in prepared.state_dict() if key.endswith(("weight", "bias"))}
    assert keys == set(model.state_dict())
    other = prepare(
        settle(module(repeated, first=conv(), d=conv(8)), (4, 3, 16, 16), seed=5),
        example_inputs=(torch.randn(4, 3, 16, 16),),
    )
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(other.d.weight, model.d.weight)


# --- state --------------------------------------------------------------------------------------


def relu6_beside(m: nn.Module, x: Tensor) -> Tensor:
    return m.last(torch.cat([m.relu6(m.c(x)), m.d(x)], 1))


def test_the_bound_of_a_relu6_follows_a_loaded_scale():
    def make(factor: float) -> tuple[nn.Module, list[Tensor]]:
        model = module(relu6_beside, c=conv(), d=conv(), relu6=nn.ReLU6(), last=conv(16, 4))
        settle(model, (4, 3, 16, 16))
        data = [factor * x for x in batches((4, 3, 16, 16))]
        return quantize(model, data), data

    (a, data), (b, _) = make(8.0), make(0.1)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(data[0]), b(data[0]))


def test_a_prepared_model_with_shared_ranges_survives_pickle():
    model = module(lambda m, x: m.e(torch.cat([m.c(x), m.d(x)], 1)), c=conv(), d=conv(), e=conv(16))
    settle(model, (4, 3, 16, 16))
    data = batches((4, 3, 16, 16))
    prepared = qt.prepare(nn.Sequential(model), example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    again = pickle.loads(pickle.dumps(prepared))
    assert torch.equal(qt.convert(again)(data[0]), qt.convert(prepared)(data[0]))


@pytest.mark.parametrize("change", ["half", "double", "bfloat16"])
def test_scales_keep_their_dtype(change):
    data = batches((4, 3, 16, 16))
    quantized = quantize(nn.Sequential(conv(), nn.ReLU(), conv(8)).eval(), data)
    expected = quantized(data[0])
    assert torch.equal(getattr(quantized, change)()(data[0]), expected)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_copies_of_a_qat_model(use_buffers):
    model = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(8))
    qat = qt.prepare_qat(model, example_inputs=(torch.randn(2, 3, 8, 8),))
    average = torch.optim.swa_utils.AveragedModel(qat, use_buffers=use_buffers)
    for _ in range(2):
        qat(torch.randn(2, 3, 8, 8))
        average.update_parameters(qat)
    assert torch.isfinite(average.module(torch.randn(2, 3, 8, 8))).all()


# --- messages -----------------------------------------------------------------------------------


def test_a_model_that_is_not_float32_is_refused_by_name():
    with pytest.raises(ValueError, match=r"0\.weight is torch\.bfloat16"):
        qt.prepare(nn.Sequential(conv()).bfloat16(), example_inputs=(torch.randn(1, 3, 8, 8),))


def test_the_mapping_must_be_one():
    with pytest.raises(TypeError, match="QConfigMapping"):
        qt.prepare(conv(), "x86", (torch.randn(1, 3, 8, 8),))
    with pytest.raises(TypeError, match="QConfigMapping"):
        qt.prepare(conv(), (torch.randn(1, 3, 8, 8),), (torch.randn(1, 3, 8, 8),))


def test_a_name_that_no_layer_has_is_warned_of():
    mapping = qt.get_default_qconfig_mapping().set_module_name("layer9", None)
    with pytest.warns(UserWarning, match="layer9"):
        qt.prepare(nn.Sequential(conv()), mapping, (torch.randn(1, 3, 8, 8),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = qt.get_default_qconfig_mapping().set_module_name("0", None)
        qt.prepare(nn.Sequential(conv()), named, (torch.randn(1, 3, 8, 8),))


def test_a_bias_of_nan_names_the_layer():
    model = nn.Sequential(conv(), nn.ReLU(), conv(8)).eval()
    with torch.no_grad():
        model[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"2\.bias"):
        quantize(model, batches((2, 3, 8, 8)))


def test_a_prepared_model_that_has_seen_no_data_is_not_exported(tmp_path):
    x = torch.randn(1, 3, 8, 8)
    prepared = qt.prepare(nn.Sequential(conv()), example_inputs=(x,))
    with pytest.raises(RuntimeError, match=r"has seen no data: run qt\.calibrate"):
        qt.export.torchscript(prepared, tmp_path / "m.pt", (x,))


def test_a_converted_model_is_not_calibrated():
    data = batches((2, 3, 8, 8))
    quantized = quantize(nn.Sequential(conv()).eval(), data)
    with pytest.raises(ValueError, match="converted already"):
        qt.calibrate(quantized, data, progress=False)


def test_export_to_a_folder_or_no_name(tmp_path):
    data = batches((2, 3, 8, 8))
    quantized = quantize(nn.Sequential(conv()).eval(), data)
    for path in ("", tmp_path):
        with pytest.raises(IsADirectoryError, match="must name a file"):
            qt.export.torchscript(quantized, path, (data[0],))


def test_an_addition_that_broadcasts_only_at_another_batch_size():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(x) + m.d(x[:1])

    model = settle(module(forward, c=conv(), d=conv()), (4, 3, 16, 16))
    model = nn.Sequential(model, nn.ReLU(), conv(8))
    data = batches((1, 3, 16, 16))
    quantized = quantize(model, data)
    x = batches((4, 3, 16, 16))[0]
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > 20


def test_a_layer_whose_sums_could_overflow_stays_in_float():
    quantized = check(nn.Sequential(nn.Linear(70000, 3), nn.ReLU(), nn.Linear(3, 2)), (2, 70000))
    assert "overflow" in reasons(quantized)["0"]
