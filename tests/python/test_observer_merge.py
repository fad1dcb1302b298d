"""`merge`: what two observers saw becomes one state."""

import copy

import pytest
import torch

from qtoolkit.observers import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    PerGroupMinMaxObserver,
    make_observer,
    registered_observers,
)
from qtoolkit.qconfig import TensorSpec

ALL_DATA = ["minmax", "histogram", "percentile", "mse", "entropy"]


def spec_of(name):
    """A spec that the observer takes."""
    if name.startswith("per_channel"):
        return TensorSpec("int8", "per_channel", 1, symmetric=True, observer=name)
    if name.startswith("per_group"):
        return TensorSpec("int4", "per_group", group_size=4, symmetric=True, observer=name)
    return TensorSpec(observer=name)


def batch(seed, scale=1.0):
    return torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(seed)) * scale


def observer_of(name, *batches):
    observer = make_observer(spec_of(name), "layer")
    for x in batches:
        observer(x)
    return observer


def assert_same_state(observer, expected):
    states = observer.state_dict(), expected.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize("name", registered_observers())
def test_merging_with_one_that_saw_nothing_changes_nothing(name):
    seen = observer_of(name, batch(0), batch(1, 3.0))
    before = copy.deepcopy(seen)
    seen.merge(observer_of(name))
    assert_same_state(seen, before)
    fresh = observer_of(name)
    fresh.merge(seen)
    assert_same_state(fresh, before)
    assert_same_state(seen, before)
    fresh(batch(2, 10.0))  # has a state of its own
    assert_same_state(seen, before)


@pytest.mark.parametrize("name", ["minmax", "per_channel_minmax", "per_group_minmax",
                                  "per_channel_mse"])  # fmt: skip
def test_ranges_of_all_data_are_those_of_one_observer(name):
    first, second = observer_of(name, batch(0)), observer_of(name, batch(1, 2.0), batch(2))
    first.merge(second)
    assert_same_state(first, observer_of(name, batch(0), batch(1, 2.0), batch(2)))


@pytest.mark.parametrize("name", ["histogram", "percentile", "mse", "entropy"])
def test_histograms_with_one_range_add_up(name):
    batches = [batch(seed).clamp(-1, 1) for seed in range(3)]
    first, second = observer_of(name, batches[0]), observer_of(name, *batches[1:])
    first.merge(second)
    assert_same_state(first, observer_of(name, *batches))


def test_histograms_with_other_ranges_lose_no_count_and_move_none_far():
    parts = [torch.linspace(-1, 1, 1001), torch.linspace(0, 9, 2001)]
    first, second = (observer_of("histogram", part) for part in parts)
    both = observer_of("histogram", torch.cat(parts))
    first.merge(second)
    assert (first.min_val, first.max_val) == (both.min_val, both.max_val)
    assert first.histogram.sum() == both.histogram.sum()
    until, expected = first.histogram.cumsum(0), both.histogram.cumsum(0)
    assert (until[1:] >= expected[:-1]).all()
    assert (until[:-1] <= expected[1:]).all()
    for merged, alone in zip(first.calculate_qparams(), both.calculate_qparams()):
        assert merged.item() == pytest.approx(alone.item(), rel=0.01)


def test_moving_averages_become_their_mean():
    first = MovingAverageMinMaxObserver()
    second = MovingAverageMinMaxObserver()
    first(torch.tensor([-1.0, 2.0]))
    second(torch.tensor([-3.0, 3.0]))
    first.merge(second)
    assert (first.min_val, first.max_val) == (-2.0, 2.5)


SETTINGS = [
    (MinMaxObserver(), MinMaxObserver(TensorSpec("int8", observer="minmax")), "spec"),
    (HistogramObserver(), HistogramObserver(bins=100), "bins: this one has 2048, the other 100"),
    (PercentileObserver(), PercentileObserver(percentile=99.0), "percentile"),
    (
        MovingAverageMinMaxObserver(),
        MovingAverageMinMaxObserver(averaging_constant=0.5),
        "averaging_constant",
    ),
    (PerChannelMinMaxObserver(), PerChannelMinMaxObserver(ch_axis=1), "spec"),
    (PerGroupMinMaxObserver(), PerGroupMinMaxObserver(axis=0), "axis"),
]


@pytest.mark.parametrize(("observer", "other", "message"), SETTINGS)
def test_other_settings_are_an_error_that_names_them(observer, other, message):
    observer = copy.deepcopy(observer)
    observer.name = "block.conv"
    with pytest.raises(ValueError, match=f"'block.conv': cannot merge another {message}"):
        observer.merge(other)


def test_other_observers_and_shapes_are_errors():
    with pytest.raises(TypeError, match="'layer': a MinMaxObserver cannot merge HistogramObserver"):
        observer_of("minmax").merge(HistogramObserver())
    with pytest.raises(TypeError, match="PerChannelMinMaxObserver cannot merge PerChannelMSE"):
        PerChannelMinMaxObserver().merge(PerChannelMSEObserver())
    observer = observer_of("per_channel_minmax", batch(0))
    before = copy.deepcopy(observer)
    with pytest.raises(ValueError, match=r"'layer': .*ranges of shape \[5\], the other \[4\]"):
        observer.merge(observer_of("per_channel_minmax", batch(1)[:, :4]))
    assert_same_state(observer, before)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_group_observer_takes_any_axis(axis):
    spec = TensorSpec("int4", "per_group", group_size=4, symmetric=True,
                      observer="per_group_minmax")  # fmt: skip
    observer = PerGroupMinMaxObserver(spec, axis=axis)
    batches = batch(0), batch(1, 2.0)
    for x in batches:
        observer(x)
    groups = torch.maximum(*batches).split(4, axis)
    expected = torch.cat([group.amax(axis, keepdim=True) for group in groups], axis)
    assert torch.equal(observer.max_val, expected)
    assert observer.calculate_qparams()[0].shape == expected.shape


def test_per_group_observer_names_an_axis_that_is_not_there():
    observer = PerGroupMinMaxObserver(axis=3, name="fc")
    with pytest.raises(ValueError, match=r"'fc': axis 3 is out of range .*\(3, 5, 10\)"):
        observer(batch(0))


@pytest.mark.parametrize("name", ALL_DATA)
def test_batches_of_varying_size_are_all_of_the_data(name):
    batches = [batch(seed)[:size].clamp(-1, 1) for seed, size in enumerate((1, 3, 2))]
    whole = observer_of(name, torch.cat(batches))
    for one, other in zip(observer_of(name, *batches).calculate_qparams(),
                          whole.calculate_qparams()):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", ALL_DATA)
def test_skipping_leaves_the_state_and_names_the_layer(name):
    observer = observer_of(name, batch(0))
    observer.on_nonfinite = "skip"
    before = copy.deepcopy(observer)
    bad = batch(1, 5.0)
    bad[0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match="'layer'.*is skipped"):
        observer(bad)
    assert_same_state(observer, before)
