"""Observers: ranges, scale and zero point, state, and errors that name the module."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.ao.quantization import observer as ao

from qtoolkit.observers import (
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    make_observer,
    register_observer,
    registered_observers,
)
from qtoolkit.qconfig import TensorSpec

EPS = torch.finfo(torch.float32).eps
SMALLEST = 2.0**-100
PER_TENSOR = (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    HistogramObserver,
    PercentileObserver,
    MSEObserver,
    EntropyObserver,
)
PER_CHANNEL = (PerChannelMinMaxObserver, PerChannelMSEObserver)
ALL = (*PER_TENSOR, *PER_CHANNEL)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(observer, *batches):
    for batch in batches:
        observer(batch)
    return observer


def assert_same_qparams(observer, reference):
    """Equal scale and zero point to a torch.ao observer's, which come as [1] for one tensor."""
    scale, zero_point = observer.calculate_qparams()
    expected_scale, expected_zero_point = reference.calculate_qparams()
    assert torch.equal(scale, expected_scale.reshape(scale.shape))
    assert torch.equal(zero_point, expected_zero_point.to(torch.int32).reshape(scale.shape))


# --- what every observer does -------------------------------------------------------------------


@pytest.mark.parametrize("cls", ALL)
def test_returns_the_tensor_itself_and_dtypes_of_qparams(cls):
    observer = cls()
    x = randn(4, 3, 5)
    assert observer(x) is x
    scale, zero_point = observer.calculate_qparams()
    shape = (4,) if cls in PER_CHANNEL else ()
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert scale.shape == zero_point.shape == shape


@pytest.mark.parametrize("cls", ALL)
def test_gradient_passes_and_no_graph_is_kept(cls):
    x = randn(4, 3).requires_grad_()
    observer = cls()
    observer(x * 2).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert not any(buffer.requires_grad for buffer in observer.buffers())


@pytest.mark.parametrize("cls", ALL)
def test_error_without_data_names_the_module_and_the_remedy(cls):
    with pytest.raises(RuntimeError, match=r"'layer1\.conv'.*qt\.calibrate"):
        cls(name="layer1.conv").calculate_qparams()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("cls", ALL)
def test_non_finite_data_is_an_error_that_names_the_module(cls, value):
    x = randn(4, 6)
    observer = observed(cls(name="block.fc"), x)
    before = copy.deepcopy(observer.state_dict())
    bad = x.clone()
    bad[2, 3] = value
    with pytest.raises(ValueError, match=r"'block\.fc'.*NaN or Inf"):
        observer(bad)
    assert all(torch.equal(v, before[k]) for k, v in observer.state_dict().items())


@pytest.mark.parametrize("cls", [MinMaxObserver, MovingAverageMinMaxObserver])
def test_non_finite_statistics_are_found_when_qparams_are_calculated(cls):
    observer = observed(cls(name="stem"), randn(5))
    observer.max_val.fill_(float("nan"))  # as an accelerator records it without a check
    with pytest.raises(ValueError, match=r"'stem'.*NaN or Inf"):
        observer.calculate_qparams()


@pytest.mark.parametrize(
    "x", [torch.ones(3, dtype=torch.int8), torch.ones(3, dtype=torch.bool), [1.0], None]
)
def test_data_that_is_not_float_is_a_type_error(x):
    with pytest.raises(TypeError, match="'fc': needs a float tensor"):
        MinMaxObserver(name="fc")(x)


@pytest.mark.parametrize("cls", ALL)
def test_empty_tensor_is_an_error_that_shows_its_shape(cls):
    with pytest.raises(ValueError, match=r"'fc'.*\(0, 3\)"):
        cls(name="fc")(torch.empty(0, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", ALL)
def test_other_float_dtypes_count_as_float32(cls, dtype):
    x = randn(4, 100).to(dtype)
    scale, zero_point = observed(cls(), x).calculate_qparams()
    expected_scale, expected_zero_point = observed(cls(), x.float()).calculate_qparams()
    assert torch.equal(scale, expected_scale)
    assert torch.equal(zero_point, expected_zero_point)


@pytest.mark.parametrize("cls", ALL)
def test_layout_does_not_matter(cls):
    x = randn(4, 6, 5, 7)
    expected = observed(cls(), x).calculate_qparams()
    wide = torch.stack([x, x + 100], dim=-1)
    for view in (x.to(memory_format=torch.channels_last), wide[..., 0]):
        actual = observed(cls(), view).calculate_qparams()
        assert all(torch.equal(a, e) for a, e in zip(actual, expected))


@pytest.mark.parametrize("cls", ALL)
def test_frozen_observer_records_nothing(cls):
    observer = observed(cls(), randn(4, 5))
    expected = observer.calculate_qparams()[0].clone()
    observer.freeze()
    observer(randn(4, 5) * 100)
    assert torch.equal(observer.calculate_qparams()[0], expected)
    observer.unfreeze()
    observer(randn(4, 5) * 100)
    assert (observer.calculate_qparams()[0] > expected).all()


@pytest.mark.parametrize("cls", ALL)
def test_reset_forgets(cls):
    observer = observed(cls(), randn(4, 5) * 100)
    observer.reset()
    with pytest.raises(RuntimeError, match="no data"):
        observer.calculate_qparams()
    expected = observed(cls(), randn(4, 5)).calculate_qparams()
    assert torch.equal(observed(observer, randn(4, 5)).calculate_qparams()[0], expected[0])


@pytest.mark.parametrize("cls", ALL)
def test_works_in_inference_mode_and_after_it(cls):
    observer = cls()
    with torch.inference_mode():
        observer(randn(4, 50))
    observer(randn(4, 50) * 2)
    expected = observed(cls(), randn(4, 50), randn(4, 50) * 2).calculate_qparams()
    assert torch.equal(observer.calculate_qparams()[0], expected[0])


# --- state --------------------------------------------------------------------------------------


def through_state_dict(observer):
    fresh = type(observer)(observer.spec)
    fresh.load_state_dict(observer.state_dict(), strict=True)
    return fresh


def through_file(observer):
    file = io.BytesIO()
    torch.save(observer.state_dict(), file)
    file.seek(0)
    fresh = type(observer)(observer.spec)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


COPIES = {
    "state_dict": through_state_dict,
    "file": through_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda observer: pickle.loads(pickle.dumps(observer)),
}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("cls", ALL)
def test_a_copy_goes_on_where_the_original_was(cls, how, frozen):
    original = observed(cls(), randn(4, 50), randn(4, 50, seed=1) * 2)
    if frozen:
        original.freeze()
    copied = COPIES[how](original)
    assert copied.enabled is not frozen
    for observer in (original, copied):
        observer(randn(4, 50, seed=2) * 4)
    for actual, expected in zip(copied.calculate_qparams(), original.calculate_qparams()):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("cls", ALL)
def test_a_float_checkpoint_loads_with_strict(cls):
    linear = nn.Linear(3, 2)
    prepared = nn.Sequential(nn.Linear(3, 2))
    prepared.add_module("observer", observed(cls(), randn(4, 5)))
    expected = prepared.observer.calculate_qparams()
    checkpoint = {f"0.{key}": value for key, value in linear.state_dict().items()}
    prepared.load_state_dict(checkpoint, strict=True)
    assert torch.equal(prepared[0].weight, linear.weight)
    assert torch.equal(prepared.observer.calculate_qparams()[0], expected[0])


def test_a_checkpoint_with_a_part_of_the_state_missing_is_an_error():
    state = observed(HistogramObserver(), randn(100)).state_dict()
    del state["histogram"]
    with pytest.raises(RuntimeError, match="histogram"):
        HistogramObserver().load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cls", ALL)
def test_statistics_stay_float32_when_the_model_is_cast(cls, dtype):
    observer = observed(cls(), randn(4, 50) * 1e6)
    expected = observer.calculate_qparams()
    nn.Sequential(observer).to(dtype)
    for actual, before in zip(observer.calculate_qparams(), expected):
        assert torch.equal(actual, before)


def test_moves_to_another_device():
    assert MinMaxObserver().to("meta").min_val.device.type == "meta"


# --- scale and zero point -----------------------------------------------------------------------


RANGES = [
    (0.0, 0.0),
    (3.0, 3.0),
    (-3.0, -3.0),
    (1e-40, 1e-39),
    (-1e-20, 1e-20),
    (-3e38, 3e38),
    (0.0, 3.4e38),
    (5.0, 6.0),
    (-6.0, -5.0),
    (-1.0, 2.0),
]


@pytest.mark.parametrize(
    "spec", [("uint8", False), ("uint8", True), ("int8", False), ("int8", True)]
)
@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize(
    "observer", ["minmax", "moving_average", "histogram", "percentile", "mse", "entropy"]
)
def test_every_range_gives_a_valid_scale_and_represents_zero(observer, bounds, spec):
    spec = TensorSpec(spec[0], symmetric=spec[1], observer=observer)
    scale, zero_point = observed(make_observer(spec), torch.tensor(bounds)).calculate_qparams()
    assert torch.isfinite(scale)
    assert scale >= SMALLEST
    assert torch.isfinite(1 / scale)
    assert spec.quant_min <= zero_point <= spec.quant_max
    if spec.symmetric:
        assert zero_point == (128 if spec.format == "uint8" else 0)


floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@settings(max_examples=200)
@given(st.lists(floats, min_size=1, max_size=6))
def test_affine_minmax_equals_torch_ao(values):
    x = torch.tensor(values)
    # torch.ao has no scale below epsilon: what is smaller becomes zero.
    assume(max(float(x.max()), 0.0) - min(float(x.min()), 0.0) > 256 * EPS)
    reference = observed(ao.MinMaxObserver(dtype=torch.quint8), x)
    assert_same_qparams(observed(MinMaxObserver(), x), reference)
    reference = observed(ao.MinMaxObserver(dtype=torch.qint8), x)
    signed = MinMaxObserver(TensorSpec("int8", observer="minmax"))
    assert_same_qparams(observed(signed, x), reference)


@settings(max_examples=100)
@given(st.lists(floats, min_size=1, max_size=6))
def test_symmetric_minmax_divides_the_largest_magnitude_by_127(values):
    x = torch.tensor(values)
    observer = MinMaxObserver(TensorSpec("int8", symmetric=True, observer="minmax"))
    scale, zero_point = observed(observer, x).calculate_qparams()
    size = x.abs().max() / 127
    assert scale == (EPS if size == 0 else max(size, torch.tensor(SMALLEST)))
    assert zero_point == 0


def test_symmetric_uint8_equals_torch_ao():
    x = randn(1000) * 3
    observer = MinMaxObserver(TensorSpec("uint8", symmetric=True, observer="minmax"))
    reference = ao.MinMaxObserver(dtype=torch.quint8, qscheme=torch.per_tensor_symmetric)
    assert_same_qparams(observed(observer, x), observed(reference, x))


def test_minmax_covers_all_batches():
    observer = observed(MinMaxObserver(), randn(10), randn(10, seed=1) * 5, randn(10, seed=2))
    everything = torch.cat([randn(10), randn(10, seed=1) * 5, randn(10, seed=2)])
    assert (observer.min_val, observer.max_val) == torch.aminmax(everything)


def test_moving_average_equals_torch_ao():
    batches = [randn(100, seed=seed) * (1 + seed) for seed in range(6)]
    reference = ao.MovingAverageMinMaxObserver(averaging_constant=0.01, dtype=torch.quint8)
    assert_same_qparams(
        observed(MovingAverageMinMaxObserver(), *batches), observed(reference, *batches)
    )


def test_moving_average_weighs_the_newest_batch():
    observer = MovingAverageMinMaxObserver(averaging_constant=0.25)
    observed(observer, torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 5.0]))
    assert (observer.min_val, observer.max_val) == (-1.5, 2.0)
    for constant in (0.0, 1.5):
        with pytest.raises(ValueError, match="averaging_constant"):
            MovingAverageMinMaxObserver(averaging_constant=constant)


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (10, 17), (5, 1), (6, 1, 3, 3)])
def test_per_channel_equals_torch_ao_on_weights(shape):
    weight = randn(*shape)
    reference = ao.PerChannelMinMaxObserver(
        dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127
    )
    assert_same_qparams(observed(PerChannelMinMaxObserver(), weight), observed(reference, weight))


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_per_channel_takes_any_axis(axis):
    x = randn(3, 4, 5, 6)
    observer = observed(PerChannelMinMaxObserver(ch_axis=axis), x, x * 2)
    others = tuple(i for i in range(4) if i != axis)
    assert torch.equal(observer.min_val, x.amin(others) * 2)
    assert torch.equal(observer.max_val, x.amax(others) * 2)


def test_per_channel_errors_name_axis_and_channels():
    observer = PerChannelMinMaxObserver(ch_axis=2, name="conv")
    with pytest.raises(ValueError, match=r"'conv': axis 2 is out of range.*\(3, 4\)"):
        observer(randn(3, 4))
    observer(randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"'conv': got channels: \[6\] .* had \[5\]"):
        observer(randn(3, 4, 6))


def test_a_dead_channel_has_a_valid_scale():
    weight = randn(4, 5)
    weight[2] = 0
    scale, _ = observed(PerChannelMinMaxObserver(), weight).calculate_qparams()
    assert scale[2] == EPS


# --- registry -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "cls"),
    [
        (TensorSpec(observer="minmax"), MinMaxObserver),
        (TensorSpec(observer="moving_average"), MovingAverageMinMaxObserver),
        (TensorSpec(observer="histogram"), HistogramObserver),
        (TensorSpec(observer="percentile"), PercentileObserver),
        (TensorSpec(observer="mse"), MSEObserver),
        (TensorSpec(observer="entropy"), EntropyObserver),
        (
            TensorSpec("int8", "per_channel", 1, symmetric=True, observer="per_channel_minmax"),
            PerChannelMinMaxObserver,
        ),
    ],
)
def test_make_observer(spec, cls):
    observer = make_observer(spec, "conv1")
    assert type(observer) is cls
    assert (observer.spec, observer.name) == (spec, "conv1")
    assert spec.observer in registered_observers()


def test_an_observer_rejects_another_granularity():
    with pytest.raises(ValueError, match=r"MinMaxObserver 'fc' is for granularity per_tensor"):
        MinMaxObserver(PerChannelMinMaxObserver.default_spec(), name="fc")


def test_a_registered_observer_is_available_by_name(monkeypatch):
    monkeypatch.setattr("qtoolkit.observers.registry._OBSERVERS", {})

    @register_observer("unit")
    class UnitObserver(Observer):
        def observe(self, x):
            self.min_val.fill_(-1.0)
            self.max_val.fill_(1.0)

    observer = observed(make_observer(TensorSpec(observer="unit")), randn(3))
    assert observer.calculate_qparams()[0] == torch.tensor(2.0) / 255
    with pytest.raises(ValueError, match="'unit' is registered already"):

        @register_observer("unit")
        class Other(Observer):
            pass


def test_an_average_that_would_overflow_leaves_the_range_as_it_is():
    observer = MovingAverageMinMaxObserver(averaging_constant=0.5)
    observed(observer, torch.tensor([-3e38, 0.0]))
    before = observer.min_val.clone(), observer.max_val.clone()
    observed(observer, torch.tensor([2e38, 3e38]))
    assert (observer.min_val, observer.max_val) == before
    observed(observer, torch.tensor([-1.0, 1.0]))
    assert (observer.min_val.item(), observer.max_val.item()) == (before[0].item() / 2, 0.5)
