"""qtoolkit.quantization in eager mode: scripts for torch.ao.quantization, run with both."""

from __future__ import annotations

import copy

import pytest
import torch
from dropin import (
    BOTH,
    FloatFunctional,
    at_least_as_near,
    images,
    mobile_net,
    ours,
    quantized_layers,
    settled,
    sqnr,
)
from torch import nn

import qtoolkit as qt

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao warns of its own end


def static(tq, backend="x86"):
    model = mobile_net(tq)
    float_model = copy.deepcopy(model)
    model.fuse_model(tq)
    model.qconfig = tq.get_default_qconfig(backend)
    tq.prepare(model, inplace=True)
    str(model.features[1].conv)
    with torch.no_grad():
        for seed in range(4):
            model(images(seed))
    tq.convert(model, inplace=True)
    return float_model, model


@BOTH
@pytest.mark.parametrize("backend", ["x86", "fbgemm", "qnnpack", "onednn"])
def test_static_script_runs(tq, backend, tmp_path):
    float_model, model = static(tq, backend)
    x = images(9)
    assert sqnr(float_model(x), model(x)) > 15
    assert quantized_layers(model) == 11
    assert "ReLU" not in str(model.features[1].conv[0][2])
    torch.save(model.state_dict(), tmp_path / "temp.p")
    torch.save(float_model.state_dict(), tmp_path / "float.p")
    assert (tmp_path / "temp.p").stat().st_size < (tmp_path / "float.p").stat().st_size
    torch.jit.save(torch.jit.script(model), tmp_path / "scripted.pt")
    assert torch.equal(torch.jit.load(tmp_path / "scripted.pt")(x), model(x))
    assert torch.equal(torch.jit.trace(model, x)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_static_is_at_least_as_near_as_torch_ao():
    def script(tq):
        float_model, model = static(tq)
        return float_model(images(9)), model(images(9))

    at_least_as_near(script)


def qat(tq):
    model = mobile_net(tq).train()
    model.fuse_model(tq, is_qat=True)
    # As in the tutorial, before the model is prepared.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.qconfig = tq.get_default_qat_qconfig("x86")
    tq.prepare_qat(model, inplace=True)
    before = copy.deepcopy([p.detach() for p in optimizer.param_groups[0]["params"]])
    generator = torch.Generator().manual_seed(1)
    freeze = torch.nn.intrinsic.qat.freeze_bn_stats if tq is not ours else ours.freeze_bn_stats
    for epoch in range(4):
        loss = nn.functional.cross_entropy(
            model(images(epoch)), torch.randint(10, (8,), generator=generator)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 2:
            model.apply(tq.disable_observer)
            model.apply(freeze)
    moved = [not torch.equal(a, b) for a, b in zip(before, optimizer.param_groups[0]["params"])]
    simulated = copy.deepcopy(model).eval()
    return simulated, tq.convert(model.eval(), inplace=False), moved


@BOTH
def test_qat_script_runs(tq):
    simulated, model, moved = qat(tq)
    assert all(moved), "the optimizer holds other parameters than the model"
    assert quantized_layers(model) == 11
    assert sqnr(simulated(images(9)), model(images(9))) > 15
    torch.jit.script(model)


def test_qat_converts_to_what_was_trained():
    simulated, model, _ = qat(ours)
    assert sqnr(simulated(images(9)), model(images(9))) > 60


def test_switches_that_come_before_the_first_call_are_kept():
    model = mobile_net(ours).train()
    model.qconfig = ours.get_default_qat_qconfig("x86")
    ours.prepare_qat(model, inplace=True)
    model.apply(ours.disable_fake_quant)
    float_model = mobile_net(ours).train()
    torch.manual_seed(0)
    y = model(images(0))
    torch.manual_seed(0)
    assert sqnr(float_model(images(0)), y) > 100
    model.apply(ours.enable_fake_quant)
    torch.manual_seed(0)
    assert sqnr(float_model(images(0)), model(images(0))) < 60


class TwoLayers(nn.Module):
    def __init__(self, tq):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.dequant(torch.relu(self.conv(self.quant(x))))
        return self.fc(x.mean((2, 3)))


@BOTH
def test_module_with_qconfig_none_stays_in_float(tq):
    torch.manual_seed(0)
    model = TwoLayers(tq).eval()
    model.qconfig = tq.get_default_qconfig("x86")
    model.fc.qconfig = None
    prepared = tq.prepare(model)
    prepared(images(0))
    converted = tq.convert(prepared)
    assert type(converted.fc) is nn.Linear
    assert quantized_layers(converted) == 1
    assert type(model.conv) is nn.Conv2d
    assert sqnr(model(images(1)), converted(images(1))) > 20


@BOTH
def test_quant_wrapper(tq):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    model = tq.QuantWrapper(layers)
    tq.fuse_modules(model, [["module.0", "module.1"]], inplace=True)
    model.qconfig = tq.default_per_channel_qconfig
    prepared = tq.prepare(model)
    x = torch.randn(32, 16)
    prepared(x)
    converted = tq.convert(prepared)
    assert quantized_layers(converted) == 2
    assert sqnr(model(x), converted(x)) > 20


class Functionals(nn.Module):
    def __init__(self, tq):
        super().__init__()
        self.quant, self.dequant = tq.QuantStub(), tq.DeQuantStub()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)
        self.ff = FloatFunctional()
        self.ff2 = FloatFunctional()
        self.ff3 = FloatFunctional()

    def forward(self, x):
        x = self.quant(x)
        a, b = self.first(x), self.second(x)
        y = self.ff.add_relu(a, b)
        z = self.ff2.mul(a, b)
        return self.dequant(self.last(self.ff3.cat([y, z], dim=1)))


def functionals(tq):
    torch.manual_seed(0)
    model = Functionals(tq).eval()
    model.qconfig = tq.get_default_qconfig("fbgemm")
    prepared = tq.prepare(model)
    for seed in range(2):
        prepared(images(seed))
    return model, tq.convert(prepared)


@BOTH
def test_float_functional(tq):
    model, converted = functionals(tq)
    assert quantized_layers(converted) == 3
    assert sqnr(model(images(9)), converted(images(9))) > 15


def test_float_functional_computes_on_codes():
    _, converted = functionals(ours)
    kinds = {type(m).__name__ for m in converted.modules()}
    assert {"Add", "Mul", "Cat"} <= kinds, kinds


def test_float_functional_is_at_least_as_near_as_torch_ao():
    def script(tq):
        model, converted = functionals(tq)
        return model(images(9)), converted(images(9))

    at_least_as_near(script)


@BOTH
def test_calibration_in_inference_mode(tq):
    torch.manual_seed(0)
    model = tq.QuantWrapper(nn.Linear(8, 4)).eval()
    model.qconfig = tq.default_qconfig
    prepared = tq.prepare(model)
    x = torch.randn(8, 8)
    with torch.inference_mode():
        prepared(X=x)
    prepared(X=x)
    assert sqnr(model(x), tq.convert(prepared)(X=x)) > 20


@BOTH
def test_quantize_in_one_call(tq):
    torch.manual_seed(0)
    model = tq.QuantWrapper(nn.Linear(8, 4)).eval()
    model.qconfig = tq.default_qconfig
    data = [(torch.randn(8, 8), torch.zeros(8)) for _ in range(2)]
    converted = tq.quantize(model, tq.default_eval_fn, [data])
    assert quantized_layers(converted) == 1
    assert sqnr(model(data[0][0]), converted(data[0][0])) > 20


@BOTH
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_torchvision_quantizable_model(tq, name):
    models = pytest.importorskip("torchvision.models.quantization", reason="needs torchvision")
    torch.manual_seed(0)
    # Its fuse_model fuses with torch.ao's own classes.
    model = settled(getattr(models, name)(num_classes=10, quantize=False), size=32)
    float_model = copy.deepcopy(model)
    model.fuse_model()
    model.qconfig = tq.get_default_qconfig("x86")
    tq.prepare(model, inplace=True)
    with torch.no_grad():
        model(images(0))
    tq.convert(model, inplace=True)
    assert sqnr(float_model(images(1)), model(images(1))) > 10
    assert quantized_layers(model) == {"resnet18": 21, "mobilenet_v2": 53}[name]


def test_optimizer_trains_a_model_that_cannot_be_traced():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.first(x)
            return self.second(y) if float(y.detach().sum()) > 0 else self.second(-y)

    model = Branching()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.qconfig = ours.get_default_qat_qconfig("x86")
    ours.prepare_qat(model, inplace=True)
    model(torch.randn(4, 8)).square().sum().backward()
    assert all(p.grad is not None for p in optimizer.param_groups[0]["params"])
    assert quantized_layers(ours.convert(model)) == 2


def test_model_that_cannot_be_traced_is_quantized_in_parts():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Linear(8, 4)

        def forward(self, x):
            y = self.body(x).mean((2, 3))
            return self.head(y) if float(y.sum()) > 0 else self.head(-y)

    torch.manual_seed(0)
    model = Branching().eval()
    model.qconfig = ours.get_default_qconfig("x86")
    prepared = ours.prepare(model)
    prepared(images(0))
    converted = ours.convert(prepared)
    assert quantized_layers(converted) == 2
    assert sqnr(model(images(1)), converted(images(1))) > 20


def test_converted_model_works_with_the_rest_of_qtoolkit(tmp_path):
    float_model, model = static(ours)
    x = images(9)
    assert len([layer for layer in qt.explain(model).layers if not layer.reason]) >= 12
    graph = ours.to_qtoolkit(model)
    assert torch.equal(qt.compile(graph, (x,), tune=False)(x), model(x))
    qt.save(graph, tmp_path / "model.qt")
    assert torch.equal(qt.load(tmp_path / "model.qt")(x), model(x))
    assert qt.compare(float_model, graph, [x]).layers
    torch.save(model, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(again(x), model(x))


def test_state_dict_loads_into_a_model_converted_without_data():
    _, model = static(ours)
    again = mobile_net(ours)
    again.fuse_model(ours)
    again.qconfig = ours.get_default_qconfig("x86")
    ours.prepare(again, inplace=True, example_inputs=(images(0, 1),))
    with pytest.warns(UserWarning, match="no data has reached .*scale 1 and zero point 0"):
        ours.convert(again, inplace=True)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(images(9)), model(images(9)))


@BOTH
@pytest.mark.parametrize("training", [False, True])
def test_state_dict_loads_into_a_model_that_was_never_called(tq, training):
    """As PyTorch's documentation says how to load a quantized model."""
    kwargs = {"is_qat": True} if training else {}
    mode = "get_default_qat_qconfig" if training else "get_default_qconfig"
    prepare = tq.prepare_qat if training else tq.prepare

    def converted(calls):
        model = mobile_net(tq).train(training)
        model.fuse_model(tq, **kwargs)
        model.qconfig = getattr(tq, mode)("x86")
        prepare(model, inplace=True)
        for seed in range(calls):
            model(images(seed))
        return tq.convert(model.eval(), inplace=True)

    first, again = converted(2), converted(0)
    again.load_state_dict(first.state_dict())
    assert torch.equal(again(images(9)), first(images(9)))
    assert quantized_layers(again) == 11


def test_model_converted_without_data_warns():
    model = mobile_net(ours)
    model.qconfig = ours.get_default_qconfig("x86")
    with pytest.warns(UserWarning, match="never called.*load a state dict now"):
        converted = ours.convert(ours.prepare(model))
    with pytest.warns(UserWarning, match=r"scale 1 and zero point 0"):
        converted(images(0))
    assert quantized_layers(converted) == 11


@BOTH
def test_lone_layer_and_affine_weights(tq):
    # As in the documentation of QConfig.
    qconfig = tq.QConfig(
        activation=tq.MinMaxObserver.with_args(dtype=torch.quint8),
        weight=tq.default_observer.with_args(dtype=torch.qint8, quant_min=-128, quant_max=127),
    )
    torch.manual_seed(0)
    model = tq.QuantWrapper(nn.Linear(8, 4)).eval()
    model.qconfig = qconfig
    prepared = tq.prepare(model)
    x = torch.randn(32, 8)
    prepared(x)
    converted = tq.convert(prepared)
    assert quantized_layers(converted) == 1
    assert sqnr(model(x), converted(x)) > 25
    if tq is ours:
        layer = nn.Linear(8, 4)
        wanted = layer(x)
        layer.qconfig = qconfig
        ours.prepare(layer, inplace=True)
        layer(x)
        ours.convert(layer, inplace=True)
        assert sqnr(wanted, layer(x)) > 25
        assert not list(layer.parameters())


def test_errors_say_what_to_do():
    model = mobile_net(ours)
    with pytest.warns(UserWarning, match="None of the submodule got qconfig"):
        ours.prepare(model)
    model.qconfig = ours.get_default_qconfig("x86")
    with pytest.raises(ValueError, match="training mode: call model"):
        ours.prepare_qat(model)
    with pytest.raises(ValueError, match="needs the result of prepare"):
        ours.convert(model)
    prepared = ours.prepare(model)
    with pytest.raises(ValueError, match="prepared or converted already"):
        ours.prepare(prepared)
    with pytest.raises(ours.UnsupportedError, match="allow_list must be None; set"):
        ours.prepare(model, allow_list={nn.Linear})
    with pytest.raises(ValueError, match=r"unknown backend 'tpu'; use one of .*qnnpack"):
        ours.get_default_qconfig("tpu")
    wrong = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)).eval()
    with pytest.raises(NotImplementedError, match=r"Cannot fuse modules: \['BatchNorm2d'"):
        ours.fuse_modules(wrong, ["0", "1"])
    with pytest.raises(ValueError, match=r"0 is in training mode; call model.eval\(\)"):
        ours.fuse_modules(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), ["0", "1"])


def test_failed_first_call_can_be_repeated():
    model = mobile_net(ours)
    model.qconfig = ours.get_default_qconfig("x86")
    prepared = ours.prepare(model)
    with pytest.raises(RuntimeError, match="failed on the example inputs"):
        prepared(torch.randn(1, 5, 32, 32))
    prepared(images(0))
    assert quantized_layers(ours.convert(prepared)) == 11
