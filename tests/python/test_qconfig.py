"""TensorSpec, QConfig, QConfigMapping and the presets."""

import dataclasses
import json
import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qtoolkit as qt
from qtoolkit.observers import make_observer
from qtoolkit.qconfig import (
    QConfig,
    QConfigMapping,
    TensorSpec,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)

ACTIVATION = TensorSpec()
WEIGHT = TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
A = QConfig(ACTIVATION, WEIGHT)
B = QConfig(TensorSpec("int8", symmetric=True, observer="minmax"), WEIGHT)
C = QConfig(None, WEIGHT)
TARGETS = ("x86", "fbgemm", "qnnpack", "tensorrt", "openvino", "tflite")

specs = st.builds(
    TensorSpec,
    format=st.sampled_from(["uint8", "int8", "int4"]),
    axis=st.integers(0, 4),
    symmetric=st.booleans(),
    observer=st.sampled_from(["minmax", "moving_average", "histogram"]),
) | st.builds(
    TensorSpec,
    observer=st.just("histogram"),
    observer_options=st.dictionaries(st.just("bins"), st.integers(2, 9)),
)
qconfigs = st.none() | st.builds(QConfig, st.none() | specs, st.none() | specs | st.just(WEIGHT))
names = st.text(min_size=1, max_size=8)


@st.composite
def mappings(draw):
    mapping = QConfigMapping().set_global(draw(qconfigs))
    for name in draw(st.lists(names, max_size=3)):
        mapping = mapping.set_module_type(name, draw(qconfigs))
    for name in draw(st.lists(names, max_size=3)):
        mapping = mapping.set_module_name(name, draw(qconfigs))
    return mapping


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format": "float7"}, ValueError, "unknown number format 'float7'"),
        ({"granularity": "per_group"}, ValueError, "per_group, and no other, needs a group_size"),
        ({"granularity": "per_row"}, ValueError, "unknown granularity 'per_row'"),
        ({"axis": -1}, ValueError, "axis"),
        ({"axis": 1.0}, TypeError, "axis must be an int"),
        ({"axis": True}, TypeError, "axis must be an int"),
        ({"group_size": 32}, ValueError, "group_size"),
        ({"symmetric": 1}, TypeError, "symmetric must be a bool"),
        ({"observer": "median"}, ValueError, "unknown observer 'median': use one of .*histogram"),
        ({"observer": ["minmax"]}, ValueError, "unknown observer"),
        ({"granularity": "per_channel"}, ValueError, "'histogram' is for granularity per_tensor"),
        ({"observer": "per_channel_minmax"}, ValueError, "is for granularity per_channel"),
        ({"observer_options": {"bin": 8}}, ValueError, "no option 'bin'; it has bins"),
        ({"observer_options": {"bins": "8"}}, TypeError, "option 'bins' must be a number"),
        ({"observer_options": 8}, TypeError, "must be a dict of names and numbers, got 8"),
    ],
)
def test_tensor_spec_rejects(fields, error, message):
    with pytest.raises(error, match=message):
        TensorSpec(**fields)


def test_options_reach_the_observer():
    options = {"percentile": 90.0, "bins": 64}
    spec = TensorSpec(observer="percentile", observer_options=options)
    assert spec == TensorSpec(observer="percentile", observer_options=tuple(options.items())[::-1])
    assert hash(spec) != hash(TensorSpec(observer="percentile"))
    assert spec.to_dict()["observer_options"] == options
    assert "observer_options" not in TensorSpec().to_dict()
    observer = make_observer(spec)
    assert (observer.percentile, observer.bins) == (90.0, 64)
    assert observer.histogram.shape == (64,)
    with pytest.raises(ValueError, match="percentile must be above 0"):
        make_observer(dataclasses.replace(spec, observer_options={"percentile": 0.0}))


def test_symmetric_int8_leaves_the_lowest_code_out():
    assert (WEIGHT.quant_min, WEIGHT.quant_max) == (-127, 127)
    assert (TensorSpec("int8").quant_min, TensorSpec("int8").quant_max) == (-128, 127)
    assert (ACTIVATION.quant_min, ACTIVATION.quant_max) == (0, 255)


@pytest.mark.parametrize("value", [ACTIVATION, A, QConfigMapping().set_global(A)])
def test_values_are_frozen_and_hashable(value):
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)
    assert hash(value) == hash(dataclasses.replace(value))


@given(specs)
def test_tensor_spec_round_trips_through_json(spec):
    assert TensorSpec.from_json(spec.to_json()) == spec
    assert TensorSpec.from_json(json.loads(spec.to_json())) == spec


@given(mappings())
def test_mapping_round_trips_through_json(mapping):
    again = QConfigMapping.from_json(mapping.to_json())
    assert again == mapping
    assert again.to_json() == mapping.to_json()


@pytest.mark.parametrize(
    ("cls", "text", "message"),
    [
        (TensorSpec, '{"formt": "int8"}', r"TensorSpec: unknown keys \['formt'\]"),
        (TensorSpec, "[1]", "expected a JSON object"),
        (TensorSpec, '{"format": ', "not valid JSON"),
        (QConfig, '{"activation": null}', r"QConfig: missing keys \['weight'\]"),
        (QConfig, '{"activation": null, "weight": null, "bias": 1}', "unknown keys"),
        (QConfigMapping, '{"globl": null}', r"QConfigMapping: unknown keys \['globl'\]"),
        (QConfigMapping, '{"module_name": {"fc": null}}', "list of"),
        (QConfigMapping, '{"module_type": [["Conv2d"]]}', "list of"),
    ],
)
def test_from_json_names_what_is_wrong(cls, text, message):
    with pytest.raises(ValueError, match=message):
        cls.from_json(text)


def test_qconfig_rejects_what_is_not_a_spec():
    with pytest.raises(TypeError, match="weight must be a TensorSpec"):
        QConfig(ACTIVATION, "int8")
    with pytest.raises(ValueError, match="per tensor"):
        QConfig(WEIGHT, WEIGHT)


def test_set_methods_return_new_mappings():
    empty = QConfigMapping()
    with_global = empty.set_global(A)
    with_type = with_global.set_module_type(nn.Linear, B)
    with_name = with_type.set_module_name("fc", None)
    assert len({empty, with_global, with_type, with_name}) == 4
    assert empty.qconfig_for("fc", nn.Linear) is None
    assert with_global.qconfig_for("fc", nn.Linear) == A
    assert with_type.qconfig_for("fc", nn.Linear) == B
    assert with_name.qconfig_for("fc", nn.Linear) is None
    assert with_name.qconfig_for("fc2", nn.Linear) == B
    assert with_name.qconfig_for("conv", nn.Conv2d) == A


def test_the_last_setting_that_applies_counts():
    mapping = QConfigMapping().set_module_name("layer*", A).set_module_name("layer1.*", B)
    assert mapping.qconfig_for("layer1.0", nn.Conv2d) == B
    assert mapping.qconfig_for("layer2.0", nn.Conv2d) == A
    again = mapping.set_module_name("layer*", C)
    assert again.qconfig_for("layer1.0", nn.Conv2d) == C
    assert [pattern for pattern, _ in again.module_names] == ["layer1.*", "layer*"]


def test_the_last_setting_of_a_type_counts_under_any_of_its_names():
    mapping = QConfigMapping().set_module_type("Conv2d", A).set_module_type(nn.Conv2d, B)
    assert mapping.qconfig_for("conv", nn.Conv2d) == B
    assert mapping.set_module_type("Conv2d", C).qconfig_for("conv", nn.Conv2d) == C


@pytest.mark.parametrize(
    ("pattern", "name", "applies"),
    [
        ("fc", "fc", True),
        ("fc", "fc1", False),
        ("fc", "head.fc", False),
        ("*.conv1", "layer1.0.conv1", True),
        ("layer1", "layer1.0.conv1", True),
        ("layer1", "layer10.conv1", False),
        ("layer[12].*", "layer2.0", True),
        ("FC", "fc", False),
    ],
)
def test_names_match_as_shell_patterns_and_hold_for_children(pattern, name, applies):
    mapping = QConfigMapping().set_global(B).set_module_name(pattern, A)
    assert mapping.qconfig_for(name, nn.Conv2d) == (A if applies else B)


class Block(nn.Module):
    pass


@pytest.mark.parametrize(
    ("setting", "asked", "applies"),
    [
        (nn.Conv2d, nn.Conv2d, True),
        ("Conv2d", nn.Conv2d, True),
        ("torch.nn.Conv2d", nn.Conv2d, True),
        ("torch.nn.modules.conv.Conv2d", nn.Conv2d, True),
        (nn.Conv2d, "Conv2d", True),
        (nn.Conv2d, nn.Conv1d, False),
        ("onv2d", nn.Conv2d, False),
        (nn.Conv2d, nn.ConvTranspose2d, False),
        (Block, Block, True),
        ("Block", Block, True),
        ("add", "add", True),
        (operator.add, "add", True),
        ("add", operator.add, True),
        (torch.add, "add", True),
        ("add", "cat", False),
    ],
)
def test_types_match_by_class_name_and_function(setting, asked, applies):
    mapping = QConfigMapping().set_module_type(setting, A)
    assert mapping.qconfig_for("any", asked) == (A if applies else None)


def test_set_methods_reject_wrong_arguments():
    with pytest.raises(TypeError, match="expected a QConfig or None"):
        QConfigMapping().set_global(ACTIVATION)
    with pytest.raises(TypeError, match="expected a module type"):
        QConfigMapping().set_module_type(3, A)
    with pytest.raises(TypeError, match="pattern"):
        QConfigMapping().set_module_name(nn.Linear, A)


@pytest.mark.parametrize(
    ("target", "activation", "symmetric", "granularity"),
    [
        ("x86", "uint8", False, "per_channel"),
        ("fbgemm", "uint8", False, "per_channel"),
        ("openvino", "uint8", False, "per_channel"),
        ("qnnpack", "uint8", False, "per_tensor"),
        ("tensorrt", "int8", True, "per_channel"),
        ("tflite", "int8", False, "per_channel"),
    ],
)
def test_presets(target, activation, symmetric, granularity):
    ptq = get_default_qconfig_mapping(target).qconfig_for("conv", nn.Conv2d)
    assert (ptq.activation.format, ptq.activation.symmetric) == (activation, symmetric)
    assert ptq.activation.observer == "histogram"
    assert (ptq.weight.format, ptq.weight.symmetric, ptq.weight.axis) == ("int8", True, 0)
    assert ptq.weight.granularity == granularity
    qat = get_default_qat_qconfig_mapping(target).qconfig_for("conv", nn.Conv2d)
    assert qat.weight == ptq.weight
    assert qat.activation == dataclasses.replace(ptq.activation, observer="moving_average")


@pytest.mark.parametrize("target", TARGETS)
def test_presets_round_trip_through_json(target):
    mapping = get_default_qconfig_mapping(target)
    assert QConfigMapping.from_json(mapping.to_json()) == mapping


def test_unknown_preset_lists_the_targets():
    with pytest.raises(ValueError, match=r"'arm'.*x86, fbgemm"):
        get_default_qconfig_mapping("arm")


def test_the_models_inputs_can_be_quantized_otherwise():
    symmetric = qt.TensorSpec("uint8", symmetric=True)
    mapping = qt.get_default_qconfig_mapping().set_module_type("input", qt.QConfig(symmetric, None))
    assert qt.QConfigMapping.from_dict(mapping.to_dict()).input_spec() == symmetric
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for known, middle in [(mapping, 128), (qt.get_default_qconfig_mapping(), 0)]:
        prepared = qt.prepare(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), known, (x,))
        layer = qt.convert(qt.calibrate(prepared, [(x,)], progress=False)).get_submodule("0")
        assert int(layer.input_zero_point) == middle
