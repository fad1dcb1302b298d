"""min_max and histogram against torch."""

import math

import pytest
import torch
from op_reference import PATHS, forced_path, seeded

from qtoolkit import ops


def values(shape):
    return torch.randn(shape, generator=seeded(4))


@pytest.mark.parametrize("shape", [(), (1,), (17,), (3, 5, 7), (2, 3, 4, 5), (100_003,)], ids=str)
def test_min_max_equals_torch(shape):
    x = values(shape)
    low, high = ops.min_max(x)
    assert low.shape == high.shape == ()
    assert torch.equal(low, x.min())
    assert torch.equal(high, x.max())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("ch_axis", [0, 1, 2, 3, -1, -3])
def test_min_max_per_channel_equals_torch(ch_axis, memory_format):
    x = values((70, 40, 5, 6)).contiguous(memory_format=memory_format)
    low, high = ops.min_max_per_channel(x, ch_axis)
    others = [d for d in range(4) if d != ch_axis % 4]
    assert torch.equal(low, x.amin(others))
    assert torch.equal(high, x.amax(others))


@pytest.mark.parametrize("shape", [(1, 50_000), (50_000, 1), (1, 1), (3,)], ids=str)
def test_min_max_per_channel_of_thin_shapes(shape):
    x = values(shape)
    low, high = ops.min_max_per_channel(x, 0)
    assert torch.equal(low, x.reshape(shape[0], -1).amin(1))
    assert torch.equal(high, x.reshape(shape[0], -1).amax(1))


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    x = values((7, 1031))
    with forced_path("min_max", path):
        assert torch.equal(torch.stack(ops.min_max(x)), torch.stack([x.min(), x.max()]))
    with forced_path("min_max", path):
        assert torch.equal(ops.min_max_per_channel(x, 0)[0], x.amin(1))
    with forced_path("histogram", path):
        counts = ops.histogram(x, 37, -2.0, 1.5)
    assert torch.equal(counts, expected_histogram(x, 37, -2.0, 1.5))


@pytest.mark.parametrize("at", [0, 31_337, 99_999])
def test_nan_is_reported_wherever_it_is(at):
    x = values((100_000,))
    x[at] = math.nan
    assert all(result.isnan() for result in ops.min_max(x))
    low, high = ops.min_max_per_channel(x.view(10, 10_000), 0)
    assert low.isnan().tolist() == high.isnan().tolist() == [at // 10_000 == c for c in range(10)]


def test_infinities_are_values():
    x = torch.tensor([1.0, math.inf, -math.inf])
    assert [float(v) for v in ops.min_max(x)] == [-math.inf, math.inf]


def expected_histogram(x, bins, lower, upper):
    x = x.flatten()
    lower_f, upper_f = torch.tensor(lower), torch.tensor(upper)
    x = x[(x >= lower_f) & (x <= upper_f)]
    places = ((x - lower_f) * (bins / (upper_f - lower_f))).long().clamp(max=bins - 1)
    return torch.bincount(places, minlength=bins)


@pytest.mark.parametrize("bins", [1, 10, 2048])
@pytest.mark.parametrize(("lower", "upper"), [(-1.0, 1.0), (-10.0, 10.0), (0.25, 0.5)])
def test_histogram_counts(bins, lower, upper):
    x = values((90_001,))
    counts = ops.histogram(x, bins, lower, upper)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, expected_histogram(x, bins, lower, upper))
    assert counts.sum() == ((x >= lower) & (x <= upper)).sum()


def test_histogram_puts_the_upper_end_into_the_last_bin_and_skips_nan():
    x = torch.tensor([0.0, 1.0, 1.0001, -0.0001, math.nan, math.inf, 0.5])
    assert ops.histogram(x, 2, 0.0, 1.0).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    x = values((50,)).to(dtype)
    low, high = ops.min_max(x)
    assert low.dtype == torch.float32
    assert torch.equal(torch.stack([low, high]), torch.stack([x.min(), x.max()]).float())


def test_no_gradient_flows():
    x = values((50,)).requires_grad_()
    assert not ops.min_max(x)[0].requires_grad
    assert not ops.min_max_per_channel(x, 0)[1].requires_grad
