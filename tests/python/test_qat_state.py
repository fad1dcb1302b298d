"""State of QAT models with every fake-quantize method: checkpoints, copies, averages, compiling."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from low_bit import A8, MAPPINGS, W8, activation, mapping_of, train_steps, weight
from networks import ResNet, batches, digits, settle
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import qtoolkit as qt
from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.qconfig import QConfigMapping

X = torch.randn(2, 1, 8, 8)


def prepared(mapping: QConfigMapping | str, seed: int = 0) -> nn.Module:
    mapping = MAPPINGS[mapping] if isinstance(mapping, str) else mapping
    return qt.prepare_qat(settle(ResNet(), (8, 1, 8, 8), seed), mapping, example_inputs=(X,))


def output(model: nn.Module) -> torch.Tensor:
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model(digits()[1][0][0])


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_float_checkpoint_loads_strictly_and_a_learned_scale_begins_with_it(name):
    other = settle(ResNet(), (8, 1, 8, 8), seed=5)
    fresh = prepared(name)
    fresh.load_state_dict(other.state_dict(), strict=True)
    expected = qt.prepare_qat(other, MAPPINGS[name], example_inputs=(X,))
    x = digits()[0][0][0]
    assert torch.equal(fresh(x), expected(x))


@pytest.mark.parametrize("name", MAPPINGS)
def test_training_resumes_from_a_checkpoint_exactly(name):
    first = prepared(name)
    train_steps(first, 2)
    checkpoint = copy.deepcopy(first.state_dict())
    second = prepared(name, seed=3)
    second.load_state_dict(checkpoint, strict=True)
    assert train_steps(first, 3) == train_steps(second, 3)
    assert torch.equal(output(first), output(second))


@pytest.mark.parametrize("name", ["observed", "lsq+", "pact"])
def test_training_resumes_from_a_file_read_with_weights_only(name, tmp_path):
    first = prepared(name)
    train_steps(first, 2)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = prepared(name, seed=3)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert torch.equal(output(first), output(second))


@pytest.mark.parametrize(
    ("saved", "loaded", "message"),
    [
        (mapping_of(A8, W8), "lsq", r"'conv1.weight_fake_quant'.*int8.*there and .*int4.*'lsq'"),
        (
            "lsq",
            mapping_of(A8, W8),
            r"'conv1.weight_fake_quant'.*'lsq'.*there and .*int8.*'observed'",
        ),
        (
            mapping_of(A8, weight("int4", granularity="per_tensor", observer="minmax")),
            mapping_of(A8, weight("int4")),
            r"'conv1.weight_fake_quant'.*per_tensor.*there and .*per_channel",
        ),
        (
            mapping_of(A8, weight("int4", symmetric=False, method="lsq")),
            mapping_of(A8, weight("int4", method="lsq")),
            r"symmetric=False.*there and .*symmetric=True",
        ),
    ],
)
def test_a_checkpoint_of_another_mapping_is_an_error_that_names_both_specs(saved, loaded, message):
    first = prepared(saved)
    first(digits()[0][0][0])
    with pytest.raises(ValueError, match=rf"of another mapping: .*{message}"):
        prepared(loaded).load_state_dict(first.state_dict())


@pytest.mark.parametrize("method", ["observed", "lsq"])
def test_a_checkpoint_with_other_channels_is_an_error(method):
    spec = weight("int4", method=method)
    first = FakeQuantize(spec, "conv")
    first(torch.randn(4, 3))
    second = FakeQuantize(spec, "conv")
    second(torch.randn(5, 3))
    with pytest.raises(ValueError, match=r"scale has shape \(4,\) there and \(5,\) here"):
        second.load_state_dict(first.state_dict())


@pytest.mark.parametrize("name", MAPPINGS)
def test_deepcopy_and_pickle_go_on_as_the_original(name):
    qat = prepared(name)
    train_steps(qat, 1)
    copies = [copy.deepcopy(qat), pickle.loads(pickle.dumps(qat))]
    losses = train_steps(qat, 2)
    for other in copies:
        assert train_steps(other, 2) == losses
        assert torch.equal(output(other), output(qat))


@pytest.mark.parametrize(
    ("use_buffers", "when"),
    [(False, "before data"), (True, "before data"), (True, "after data")],
)
@pytest.mark.parametrize("name", MAPPINGS)
def test_an_average_that_sees_one_model_is_that_model(name, use_buffers, when):
    qat = prepared(name)
    if when == "after data":
        train_steps(qat, 1)
    average = AveragedModel(qat, multi_avg_fn=get_ema_multi_avg_fn(0.999), use_buffers=use_buffers)
    train_steps(qat, 2)
    for _ in range(3):
        average.update_parameters(qat)
    expected, actual = output(qat), output(average.module)
    if when == "before data":
        assert torch.allclose(actual, expected, rtol=1e-3, atol=1e-3)
    assert torch.isfinite(actual).all()


def test_the_average_of_buffers_keeps_the_zero_point_with_its_scale():
    qat = prepared(mapping_of(A8, W8))
    average = AveragedModel(qat, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        qat(torch.randn(8, 1, 8, 8, generator=generator) + step / 10)
        average.update_parameters(qat)
    average.eval()
    quantizer = average.module.x_fake_quantize
    low = -quantizer.scale * quantizer.zero_point
    assert torch.allclose(low, quantizer.observer.min_val, atol=float(quantizer.scale))
    # torch's rule for integers, p * 0.9 + q * 0.1 rounded down, is stuck far away.
    assert abs(int(quantizer.zero_point) - int(qat.x_fake_quantize.zero_point)) < 20


@pytest.mark.parametrize("name", ["observed", "lsq", "lsq+", "pact", "twn"])
def test_a_compiled_model_trains_alike(name):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.bn = nn.BatchNorm2d(4)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(torch.relu(self.bn(self.conv(x))).mean((2, 3)))

    qat = qt.prepare_qat(settle(Net(), (8, 1, 8, 8)), MAPPINGS[name], example_inputs=(X,))
    x = batches((8, 1, 8, 8), 3)
    qat(x[0])
    reference = copy.deepcopy(qat)
    compiled = torch.compile(qat, backend="aot_eager")
    for batch in x:
        y = compiled(batch)
        y.square().sum().backward()
        expected = reference(batch)
        expected.square().sum().backward()
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)
    for (key, parameter), other in zip(qat.named_parameters(), reference.parameters()):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("name", MAPPINGS)
def test_frozen_it_keeps_its_parameters_and_learned_ones_get_no_gradient(name):
    qat = prepared(name)
    train_steps(qat, 2)
    qt.freeze_observers(qat)
    before = {k: v.clone() for k, v in qat.state_dict().items() if "fake_quant" in k}
    train_steps(qat, 2)
    for key, value in qat.state_dict().items():
        if "fake_quant" in key:
            assert torch.equal(value, before[key]), key
    qt.freeze_observers(qat, frozen=False)
    train_steps(qat, 2)
    assert any(not torch.equal(qat.state_dict()[key], value) for key, value in before.items())


def test_frozen_without_data_is_an_error_that_names_the_layer():
    qat = prepared("lsq")
    qt.freeze_observers(qat)
    with pytest.raises(RuntimeError, match=r"conv1.*has seen no data"):
        qat(X)


# --- data that is not finite --------------------------------------------------------------------


def poisoned(value: float) -> torch.Tensor:
    x = digits()[0][1][0].clone()
    x[0, 0, 3, 3] = value
    return x


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["observed", "lsq", "lsq+", "pact", "fp8", "nvfp4"])
@pytest.mark.filterwarnings("ignore:.*NaN or Inf")
def test_a_bad_batch_leaves_the_ranges_as_they_are(name, value):
    qat = prepared(name)
    qat(digits()[0][0][0])
    qt.freeze_bn(qat)
    before = {k: v.clone() for k, v in qat.state_dict().items()}
    y = qat(poisoned(value))
    assert not torch.isfinite(y[0]).all() or value == float("inf")
    for key, state in qat.state_dict().items():
        same = torch.equal(state, before[key])
        # An infinity is clamped like any value beyond the range, so layers behind see numbers.
        assert same or (value == float("inf") and "x_fake_quantize" not in key), key
    for state in qat.state_dict().values():
        assert torch.isfinite(state.float()).all()


@pytest.mark.parametrize("name", ["observed", "lsq", "pact"])
@pytest.mark.filterwarnings("ignore:.*NaN or Inf")
def test_a_first_batch_that_is_bad_passes_as_in_float_and_is_warned_of_once(name):
    qat = prepared(name)
    with pytest.warns(UserWarning, match=r"conv1 \(input\)'.*NaN or Inf"):
        y = qat(poisoned(float("nan")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat(poisoned(float("nan")))
    assert torch.isnan(y[0]).all()
    assert not qat.x_fake_quantize.ready
    losses = train_steps(qat, 3)
    assert qat.x_fake_quantize.ready
    assert torch.isfinite(torch.tensor(losses[-1])) or qat.bn1.running_mean.isnan().any()


@pytest.mark.parametrize("name", ["observed", "lsq", "lsq+", "pact", "fp8"])
@pytest.mark.parametrize("first", [True, False])
def test_on_request_a_bad_batch_is_an_error_that_names_the_layer(name, first):
    model = settle(ResNet(), (8, 1, 8, 8))
    qat = qt.prepare_qat(model, MAPPINGS[name], example_inputs=(X,), on_nonfinite="error")
    if not first:
        qat(digits()[0][0][0])
    with pytest.raises(ValueError, match=r"'conv1 \(input\)'.*NaN or Inf"):
        qat(poisoned(float("nan")))


def test_an_unknown_policy_is_an_error():
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .*skip.*error.*'ignore'"):
        qt.prepare_qat(ResNet(), None, (X,), on_nonfinite="ignore")


def test_a_weight_that_is_not_finite_is_an_error_in_convert():
    qat = prepared(mapping_of(activation("uint8"), weight("int4")))
    qat(digits()[0][0][0])
    with torch.no_grad():
        qat.fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"fc\.weight holds NaN or Inf"):
        qt.convert(qat)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("steps", [(pickled, copy.deepcopy), (copy.deepcopy, pickled, pickled)])
@pytest.mark.parametrize("kind", ["qat", "ptq", "converted"])
def test_copies_of_pickles_and_pickles_of_copies_stay_what_they_are(kind, steps):
    x = digits()[0][0][0]
    float_model = settle(ResNet(), (8, 1, 8, 8))
    prepare = qt.prepare_qat if kind == "qat" else qt.prepare
    model = qt.calibrate(prepare(float_model, None, (X,)), [x], progress=False)
    model = qt.convert(model) if kind == "converted" else model
    other = model
    for make in steps:
        other = make(other)
    assert qt.explain(other) == qt.explain(model)
    if kind != "converted":
        assert torch.equal(qt.convert(other)(x), qt.convert(model)(x))
    if kind == "qat":
        qt.freeze_bn(other)


def test_convert_takes_an_average_and_names_what_another_module_holds():
    qat = prepared(mapping_of(A8, W8))
    x = digits()[0][0][0]
    qat(x)
    assert torch.equal(qt.convert(AveragedModel(qat))(x), qt.convert(qat)(x))
    with pytest.raises(ValueError, match=r"this Sequential holds one: pass its \.0"):
        qt.convert(nn.Sequential(qat))
