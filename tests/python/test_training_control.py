"""Switching parts of a QAT model by name, and following a schedule."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import digits, trained
from torch import nn

import qtoolkit as qt
from qtoolkit.nn.qat.batch_norm import _FreezableBatchNorm

X = torch.randn(2, 1, 8, 8)


def prepared() -> nn.Module:
    return qt.prepare_qat(trained(), example_inputs=(X,))


def quantizers(model: nn.Module) -> dict[str, qt.FakeQuantize]:
    return {k: m for k, m in model.named_modules() if isinstance(m, qt.FakeQuantize)}


def batch_norms(model: nn.Module) -> dict[str, _FreezableBatchNorm]:
    return {k: m for k, m in model.named_modules() if isinstance(m, _FreezableBatchNorm)}


def frozen(model: nn.Module) -> set[str]:
    return {m.name for m in quantizers(model).values() if not m.observing}


def flags(model: nn.Module) -> dict[str, tuple]:
    state = {k: (m.observing, m.fake_quantizing) for k, m in quantizers(model).items()}
    return state | {k: (bool(m.frozen), m.training) for k, m in batch_norms(model).items()}


def test_patterns_choose_layers_as_in_a_mapping():
    model = prepared()
    assert qt.freeze_observers(model, "layer1") is model
    names = {m.name for m in quantizers(model).values()}
    assert frozen(model) == {name for name in names if name.startswith("layer1.")}
    assert "layer1.conv1.weight" in frozen(model)
    qt.freeze_observers(model, "layer1", frozen=False)
    assert frozen(model) == set()
    qt.freeze_observers(model, "*.weight")
    assert frozen(model) == {name for name in names if name.endswith(".weight")}
    qt.freeze_observers(model)
    assert frozen(model) == names


def test_a_layer_s_name_stands_for_its_weight_and_its_float_input():
    model = prepared()
    qt.disable_fake_quant(model, "conv1")
    off = {m.name for m in quantizers(model).values() if not m.fake_quantizing}
    assert off == {"conv1 (input)", "conv1", "conv1.weight"}
    qt.enable_fake_quant(model, "conv1.weight")
    off = {m.name for m in quantizers(model).values() if not m.fake_quantizing}
    assert off == {"conv1 (input)", "conv1"}
    qt.disable_fake_quant(model, "x_fake_quantize")  # a module's own name does as well
    assert not model.x_fake_quantize.fake_quantizing


def test_the_value_of_a_fused_relu_is_known_by_the_relu_s_name():
    model = prepared()
    qt.disable_fake_quant(model, "relu")
    off = {name for name, m in quantizers(model).items() if not m.fake_quantizing}
    assert off == {"relu_fake_quantize"}


def test_a_model_with_fake_quantization_off_computes_in_float():
    model = prepared()
    x = digits()[1][0][0]
    qt.calibrate(model, [x], progress=False)
    qt.disable_fake_quant(model.eval())
    assert torch.allclose(model(x), trained()(x), atol=1e-4)
    assert not torch.allclose(qt.enable_fake_quant(model)(x), trained()(x), atol=1e-4)


def test_batch_norms_freeze_and_thaw_by_name():
    model = prepared()
    qt.freeze_bn(model, "layer2.bn*")
    held = {name for name, m in batch_norms(model).items() if not m.training}
    assert held == {"layer2.bn1", "layer2.bn2"}
    before = {name: m.running_mean.clone() for name, m in batch_norms(model).items()}
    model(X)
    for name, module in batch_norms(model).items():
        assert torch.equal(module.running_mean, before[name]) == (name in held), name
    qt.freeze_bn(model, "layer2", frozen=False)
    assert all(m.training for m in batch_norms(model).values())


def test_thawed_batch_norms_follow_the_mode_of_the_model():
    model = qt.freeze_bn(prepared()).eval()
    qt.freeze_bn(model, frozen=False)
    assert not any(m.training for m in batch_norms(model).values())
    model.train()
    assert all(m.training for m in batch_norms(model).values())


class Task(nn.Module):
    """What a training framework wraps around a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = prepared()


def test_names_count_from_the_prepared_model_whatever_holds_it():
    task = Task()
    qt.freeze_observers(task, "layer1.conv1")
    assert frozen(task) == {"layer1.conv1", "layer1.conv1.weight"}


@pytest.mark.parametrize(
    ("function", "pattern", "message"),
    [
        (qt.freeze_observers, "layer1.conv3", "freeze_observers: no quantized value .*conv1"),
        (qt.enable_fake_quant, "classifier", "no quantized value of this model fits 'classifier'"),
        (qt.disable_fake_quant, "lay", "there are .*'layer"),
        (qt.freeze_bn, "bn", "no batch norm of this model fits 'bn'; .* such as 'bn1'"),
        (qt.freeze_bn, "conv1", "no batch norm"),
    ],
)
def test_a_pattern_that_fits_nothing_names_what_there_is(function, pattern, message):
    with pytest.raises(ValueError, match=message):
        function(prepared(), pattern)


def test_a_pattern_must_be_a_name():
    with pytest.raises(TypeError, match="pattern must be a name, got None"):
        qt.freeze_bn(prepared(), None)


def test_a_model_without_batch_norms_has_none_to_freeze():
    model = qt.prepare_qat(nn.Sequential(nn.Linear(4, 4)), example_inputs=(torch.randn(2, 4),))
    qt.freeze_bn(model)
    with pytest.raises(ValueError, match=r"no batch norm of this model fits '0'$"):
        qt.freeze_bn(model, "0")


SCHEDULE = qt.QATSchedule(start_observers=1, start_fake_quant=3, freeze_bn=5, freeze_observers=6)


def test_a_schedule_switches_at_its_steps():
    model = prepared()
    seen = []
    for step in range(8):
        SCHEDULE(model, step)
        SCHEDULE(model, step)  # changes nothing
        (values,) = {(m.observing, m.fake_quantizing) for m in quantizers(model).values()}
        (statistics,) = {m.training for m in batch_norms(model).values()}
        seen.append((*values, statistics))
        model(X)
    first = [(False, False, True), (True, False, True), (True, False, True)]
    rest = [(True, True, True)] * 2 + [(True, True, False)] + [(False, True, False)] * 2
    assert seen == first + rest


@pytest.mark.parametrize("step", range(8))
def test_a_schedule_that_begins_in_the_middle_gives_the_state_of_that_step(step):
    running, jumping = prepared(), prepared()
    schedule = copy.deepcopy(SCHEDULE)
    for earlier in range(step + 1):
        schedule(running, earlier)
    pickle.loads(pickle.dumps(SCHEDULE))(jumping, step)
    assert flags(running) == flags(jumping)


def test_a_schedule_counts_by_itself_and_resumes():
    model, resumed = prepared(), prepared()
    first = copy.deepcopy(SCHEDULE)
    for _ in range(4):
        first.step(model)
    second = copy.deepcopy(SCHEDULE)
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        first.step(model)
        second.step(resumed)
    assert first.state_dict() == second.state_dict() == {"step": 6}
    assert flags(model) == flags(resumed)
    assert not resumed.bn1.training


def test_training_with_a_schedule_resumes_from_a_checkpoint_exactly():
    def some(model: nn.Module, schedule: qt.QATSchedule, steps: range) -> list[float]:
        optimizer = torch.optim.SGD(model.parameters(), 0.005)
        losses = []
        for step in steps:
            schedule.step(model)
            x, y = digits()[0][step]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model, schedule = prepared(), copy.deepcopy(SCHEDULE)
    some(model, schedule, range(4))
    checkpoint = copy.deepcopy([model.state_dict(), schedule.state_dict()])
    resumed, again = prepared(), copy.deepcopy(SCHEDULE)
    resumed.load_state_dict(checkpoint[0])
    again.load_state_dict(checkpoint[1])
    assert some(model, schedule, range(4, 9)) == some(resumed, again, range(4, 9))
    assert flags(model) == flags(resumed)


def test_a_schedule_leaves_what_the_user_switched_between_its_steps():
    model = prepared()
    schedule = qt.QATSchedule(freeze_observers=5)
    schedule(model, 0)
    qt.disable_fake_quant(model, "fc")
    qt.freeze_bn(model, "bn1")
    for step in range(1, 7):
        schedule(model, step)
        assert not model.fc.weight_fake_quant.fake_quantizing
        assert not model.bn1.training
    assert frozen(model) == {m.name for m in quantizers(model).values()}


def test_a_schedule_serves_several_models_in_turn():
    first, second = prepared(), prepared()
    for step in range(7):
        SCHEDULE(first, step)
        SCHEDULE(second, step)
    assert flags(first) == flags(second)
    assert frozen(first)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"start_observers": 5}, "start_fake_quant=0 comes before start_observers=5"),
        ({"freeze_observers": 0}, "freeze_observers=0 must come after start_observers=0"),
        (
            {"start_observers": 5, "start_fake_quant": 5, "freeze_observers": 5},
            "freeze_observers=5 must come after start_observers=5",
        ),
        ({"start_fake_quant": -1}, "start_fake_quant is -1"),
        ({"freeze_bn": -3}, "freeze_bn is -3"),
    ],
)
def test_a_schedule_out_of_order_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        qt.QATSchedule(**arguments)


@pytest.mark.parametrize("value", [1.5, True, "3"])
def test_a_schedule_counts_in_ints(value):
    with pytest.raises(TypeError, match="freeze_bn must be an int or None"):
        qt.QATSchedule(freeze_bn=value)
    with pytest.raises(TypeError, match="start_observers must be an int, got"):
        qt.QATSchedule(start_observers=value)


def test_a_schedule_needs_a_qat_model_and_a_step():
    with pytest.raises(ValueError, match=r"QATSchedule needs the result of qt\.prepare_qat"):
        SCHEDULE(trained(), 0)
    with pytest.raises(ValueError, match="steps count from 0, got -1"):
        SCHEDULE(prepared(), -1)


def test_explain_shows_each_tensor_of_a_prepared_model_once():
    model = prepared()
    shown = [layer.name for layer in qt.explain(model).layers if "fake-quantize" in layer.kernel]
    assert sorted(shown) == sorted(m.name for m in quantizers(model).values())
    assert not any("observed" in layer.kernel for layer in qt.explain(model).layers)
