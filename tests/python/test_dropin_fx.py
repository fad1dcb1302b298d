"""qtoolkit.quantization in FX mode: scripts for torch.ao.quantization, run with both."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from dropin import (
    BOTH,
    at_least_as_near,
    images,
    mobile_net,
    ours,
    quantized_layers,
    settled,
    sqnr,
    torch_ao,
)
from torch import nn
from torch.nn import functional

import qtoolkit as qt

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.ao warns of its own end


def fx_of(tq):
    return importlib.import_module(f"{tq.__name__}.quantize_fx")


class BasicBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + x)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(BasicBlock(8), BasicBlock(8))
        self.layer2 = nn.Sequential(BasicBlock(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 10)
        self.note = "kept"

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.pool(x), 1))


def res_net():
    torch.manual_seed(0)
    return settled(ResNet())


def static(tq, mapping=None, model=None, **kwargs):
    quantize_fx = fx_of(tq)
    model = res_net() if model is None else model
    mapping = tq.get_default_qconfig_mapping("x86") if mapping is None else mapping
    to_quantize = copy.deepcopy(model).eval()
    prepared = quantize_fx.prepare_fx(to_quantize, mapping, (images(0),), **kwargs)
    with torch.no_grad():
        for seed in range(4):
            prepared(images(seed))
    return model, quantize_fx.convert_fx(prepared)


@BOTH
def test_static_script_runs(tq, tmp_path):
    model, converted = static(tq)
    x = images(9)
    assert sqnr(model(x), converted(x)) > 15
    assert quantized_layers(converted) == 8
    torch.jit.save(torch.jit.script(converted), tmp_path / "scripted.pt")
    assert torch.equal(torch.jit.load(tmp_path / "scripted.pt")(x), converted(x))
    # As in the tutorial: a state dict is loaded into a model that was converted without data.
    torch.save(converted.state_dict(), tmp_path / "state.pth")
    quantize_fx = fx_of(tq)
    mapping = tq.get_default_qconfig_mapping("x86")
    again = quantize_fx.convert_fx(quantize_fx.prepare_fx(res_net(), mapping, (images(0),)))
    again.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=False))
    assert torch.equal(again(x), converted(x))


@pytest.mark.parametrize("backend", ["x86", "qnnpack"])
def test_static_is_at_least_as_near_as_torch_ao(backend):
    def script(tq):
        model, converted = static(tq, tq.get_default_qconfig_mapping(backend))
        return model(images(9)), converted(images(9))

    at_least_as_near(script)


def qat(tq):
    quantize_fx = fx_of(tq)
    mapping = tq.get_default_qat_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_qat_fx(res_net().train(), mapping, (images(0),))
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(1)
    for epoch in range(4):
        target = torch.randint(10, (8,), generator=generator)
        loss = functional.cross_entropy(prepared(images(epoch)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch == 2:
            prepared.apply(tq.disable_observer)
    prepared.eval()
    floats = copy.deepcopy(prepared)
    floats.apply(tq.disable_fake_quant)
    return floats, quantize_fx.convert_fx(prepared)


@BOTH
def test_qat_script_runs(tq):
    floats, converted = qat(tq)
    assert quantized_layers(converted) == 8
    assert sqnr(floats(images(9)), converted(images(9))) > 15


def test_qat_is_at_least_as_near_as_torch_ao():
    def script(tq):
        floats, converted = qat(tq)
        return floats(images(9)), converted(images(9))

    at_least_as_near(script)


def float_layers(model):
    found = set()
    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            # torch.ao's fused layers hold theirs.
            parent = model.get_submodule(name.rpartition(".")[0])
            fused = "intrinsic" in type(parent).__module__
            found.add(name.rpartition(".")[0] if fused else name)
    return found


MAPPINGS = {
    "object_type": (
        lambda tq, q: tq.QConfigMapping().set_global(q).set_object_type(nn.Linear, None),
        {"fc"},
    ),
    "module_name": (
        lambda tq, q: tq.QConfigMapping().set_global(q).set_module_name("layer1", None),
        {"layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"},
    ),
    "inner name before outer": (
        lambda tq, q: (
            tq.QConfigMapping()
            .set_global(q)
            .set_module_name("layer1.0.conv1", q)
            .set_module_name("layer1", None)
        ),
        {"layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"},
    ),
    "regex": (
        lambda tq, q: (
            tq.QConfigMapping()
            .set_global(q)
            .set_module_name_regex(r"layer.*conv2", None)
            .set_module_name_regex(r"layer", q)
        ),
        {"layer1.0.conv2", "layer1.1.conv2", "layer2.0.conv2"},
    ),
    "name before regex": (
        lambda tq, q: (
            tq.QConfigMapping()
            .set_global(q)
            .set_module_name("layer2.0.conv2", q)
            .set_module_name_regex(r".*conv2", None)
        ),
        {"layer1.0.conv2", "layer1.1.conv2"},
    ),
    "order": (
        lambda tq, q: (
            tq.QConfigMapping()
            .set_global(q)
            .set_module_name_object_type_order("layer1.1", nn.Conv2d, 1, None)
        ),
        {"layer1.1.conv2"},
    ),
    "only some": (lambda tq, q: tq.QConfigMapping().set_module_name("fc", q), None),
    "dict": (
        lambda tq, q: {"": q, "module_name": [("layer1", None), ("layer2", None)]},
        None,
    ),
}


@BOTH
@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings(tq, name):
    make, expected = MAPPINGS[name]
    mapping = make(tq, tq.get_default_qconfig("x86"))
    if isinstance(mapping, dict) and tq is not ours:
        mapping = tq.QConfigMapping.from_dict(mapping)
    model, converted = static(tq, mapping)
    if expected is None:
        assert quantized_layers(converted) == {"only some": 1, "dict": 2}[name]
    else:
        assert float_layers(converted) == expected
    assert sqnr(model(images(9)), converted(images(9))) > 15


def test_nth_addition_of_a_module_stays_in_float():
    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
            self.d = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.a(x)
            x = torch.add(x, self.b(x))
            x = x + self.c(x)
            return self.d(x)

    mapping = ours.get_default_qconfig_mapping("x86")
    mapping.set_module_name_object_type_order("", torch.add, 1, None)
    _, converted = static(ours, mapping, Sums().eval())
    floats = [layer.name for layer in qt.explain(converted).float_layers]
    assert floats == ["add_1"]


def test_name_of_a_module_applies_to_functions_that_it_calls():
    mapping = ours.get_default_qconfig_mapping("x86").set_module_name("layer1.0", None)
    _, converted = static(ours, mapping)
    floats = {layer.name for layer in qt.explain(converted).float_layers}
    assert {"layer1.0.conv1", "layer1.0.conv2", "add"} <= floats
    assert "add_1" not in floats
    assert "add_2" not in floats


class Opaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(x) if float(x.sum()) > 1e9 else self.linear(x) + 1


class WithOpaque(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.opaque, self.last = nn.Linear(8, 8), Opaque(), nn.Linear(8, 8)
        self.attribute = {"labels": ["a", "b"]}

    def forward(self, x):
        return self.last(self.opaque(self.first(x)))


@BOTH
@pytest.mark.parametrize("by", ["name", "class", "config"])
def test_non_traceable_module_and_preserved_attributes(tq, by):
    quantize_fx = fx_of(tq)
    custom = {
        "name": {"non_traceable_module_name": ["opaque"]},
        "class": {"non_traceable_module_class": [Opaque]},
    }
    if by == "config":
        config = importlib.import_module(f"{tq.__name__}.fx.custom_config")
        prepare_custom = (
            config.PrepareCustomConfig()
            .set_non_traceable_module_names(["opaque"])
            .set_preserved_attributes(["attribute"])
        )
        convert_custom = config.ConvertCustomConfig().set_preserved_attributes(["attribute"])
    else:
        prepare_custom = custom[by] | {"preserved_attributes": ["attribute"]}
        convert_custom = {"preserved_attributes": ["attribute"]}
    torch.manual_seed(0)
    model = WithOpaque().eval()
    x = torch.randn(16, 8)
    mapping = tq.get_default_qconfig_mapping("x86")
    prepared = quantize_fx.prepare_fx(
        model, mapping, (x,), prepare_custom_config=prepare_custom, backend_config=None
    )
    assert prepared.attribute == model.attribute
    prepared(x)
    converted = quantize_fx.convert_fx(prepared, convert_custom_config=convert_custom)
    assert converted.attribute == model.attribute
    assert quantized_layers(converted) == 2
    assert type(converted.opaque.linear) is nn.Linear
    assert sqnr(model(x), converted(x)) > 20


@BOTH
def test_quantized_input_and_output(tq):
    quantize_fx = fx_of(tq)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 8)
    custom = {"input_quantized_idxs": [0], "output_quantized_idxs": [0]}
    prepared = quantize_fx.prepare_fx(
        model, tq.get_default_qconfig_mapping("x86"), (x,), prepare_custom_config=custom
    )
    prepared(x)
    converted = quantize_fx.convert_fx(prepared)
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 255
    codes = torch.quantize_per_tensor(x, scale, round(-low / scale), torch.quint8)
    assert sqnr(model(x), converted(codes).dequantize()) > 20


def test_fuse_fx():
    model = res_net()
    quantize_fx = fx_of(ours)
    fused = quantize_fx.fuse_fx(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert sqnr(model(images(0)), fused(images(0))) > 80
    with pytest.raises(ValueError, match=r"evaluation mode: call model.eval\(\)"):
        quantize_fx.fuse_fx(copy.deepcopy(model).train())


@pytest.mark.parametrize("kind", ["qconfig", "mapping"])
def test_torch_aos_own_objects_are_taken(kind):
    if kind == "mapping":
        mapping = torch_ao.get_default_qconfig_mapping("x86").set_module_name("fc", None)
    else:
        qconfig = torch_ao.QConfig(
            activation=torch_ao.MinMaxObserver.with_args(dtype=torch.quint8, reduce_range=True),
            weight=torch_ao.default_per_channel_weight_observer,
        )
        mapping = ours.QConfigMapping().set_global(qconfig).set_module_name("fc", None)
    model, converted = static(ours, mapping)
    assert quantized_layers(converted) == 7
    assert type(converted.fc) is nn.Linear
    assert sqnr(model(images(9)), converted(images(9))) > 15


def test_stubs_in_a_model_change_nothing():
    model = mobile_net(torch_ao)
    _, converted = static(ours, None, model)
    assert quantized_layers(converted) == 11
    assert sqnr(model(images(9)), converted(images(9))) > 20


def test_errors_say_what_to_use():
    quantize_fx = fx_of(ours)
    model, x = res_net(), (images(0),)
    mapping = ours.get_default_qconfig_mapping("x86")

    class Custom(nn.Module):
        pass

    refused = {"float_to_observed_custom_module_class": {"static": {Custom: Custom}}}
    with pytest.raises(ours.UnsupportedError, match="keep the module in float with QConfigMapping"):
        quantize_fx.prepare_fx(model, mapping, x, prepare_custom_config=refused)
    with pytest.raises(ValueError, match="unknown key 'typo'; use one of"):
        quantize_fx.prepare_fx(model, mapping, x, prepare_custom_config={"typo": []})
    with pytest.raises(ours.UnsupportedError, match="recipes with equalization"):
        quantize_fx.prepare_fx(model, mapping, x, None, mapping)
    with pytest.raises(ours.UnsupportedError, match=r"other runtimes are for qtoolkit\.export"):
        quantize_fx.prepare_fx(model, mapping, x, backend_config={"name": "mine"})
    with pytest.raises(ValueError, match="needs the result of prepare_fx"):
        quantize_fx.convert_fx(model)
    with pytest.raises(ours.UnsupportedError, match=r"qtoolkit\.export"):
        quantize_fx.convert_to_reference_fx(model)
    with pytest.raises(ValueError, match="qconfig_dict has unknown keys"):
        quantize_fx.prepare_fx(model, {"module_type": []}, x)
