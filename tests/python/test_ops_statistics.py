"""Extremes and histograms against torch, of every layout and type, and without a copy."""

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


# --- layouts ------------------------------------------------------------------------------------


def strided(dtype=torch.float32):
    """Tensors of all kinds of strides."""
    x = values((6, 5, 70, 9)).to(dtype)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 2),
        "permuted": x.permute(3, 1, 0, 2),
        "sliced inside": x[..., 1:8],
        "every other": x[..., ::2],
        "sliced rows": x[:, 1:4, ::3],
        "channels_last, sliced": x.to(memory_format=torch.channels_last)[:, 1:4],
        "expanded": x[:, :1].expand(6, 4, 70, 9),
        "expanded outside": x[:1].expand(3, 5, 70, 9),
        "expanded everywhere": x[0, 0, 0, 0].expand(3, 4, 2, 5),
        "overlapping": x.as_strided((50, 3, 4, 20), (1, 2, 3, 4)),
        "offset": x.flatten()[7:].view(-1)[: 5 * 3 * 7 * 4].view(5, 3, 7, 4),
        "one element": x[:1, :1, :1, :1],
        "one channel": x[:, :1],
        "thin": x[:, :, :, :1],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", strided())
def test_every_layout(layout, dtype):
    x = strided(dtype)[layout]
    plain = x.clone(memory_format=torch.contiguous_format).float()
    assert [v.item() for v in ops.min_max(x)] == [plain.min().item(), plain.max().item()]
    counts = expected_histogram(plain, 50, -1.5, 2.0)
    assert torch.equal(ops.histogram(x, 50, -1.5, 2.0), counts)
    both = ops.histogram_min_max(x, 50, -1.5, 2.0)
    assert torch.equal(both[0], counts)
    assert [v.item() for v in both[1:]] == [plain.min().item(), plain.max().item()]
    for axis in range(x.dim()):
        others = [d for d in range(4) if d != axis]
        low, high = ops.min_max_per_channel(x, axis)
        assert torch.equal(low, plain.amin(others))
        assert torch.equal(high, plain.amax(others))
        for size in (1, 4, 100):
            low, high = ops.min_max_per_group(x, size, axis)
            groups = plain.split(size, axis)
            assert torch.equal(low, torch.cat([g.amin(axis, keepdim=True) for g in groups], axis))
            assert torch.equal(high, torch.cat([g.amax(axis, keepdim=True) for g in groups], axis))


@pytest.mark.parametrize("channels", [2, 3, 64, 100, 5000])
@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_channels_side_by_side(channels, rows):
    x = values((rows, channels))
    x[rows // 2, channels // 3] = math.nan
    low, high = ops.min_max_per_channel(x, 1)
    for result, expected in ((low, x.amin(0)), (high, x.amax(0))):
        assert result.isnan().sum() == 1
        assert torch.equal(result.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree_on_layouts(path):
    for x in strided().values():
        expected = [*ops.min_max_per_channel(x, 1), *ops.histogram_min_max(x, 9, -1.0, 1.0)]
        with forced_path("min_max", path):
            found = [*ops.min_max_per_channel(x, 1), *ops.histogram_min_max(x, 9, -1.0, 1.0)]
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


def operators(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.name for event in profile.events()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "every other", "expanded"])
def test_nothing_is_copied(layout, dtype):
    x = strided(dtype)[layout]

    def run():
        ops.min_max(x)
        ops.min_max_per_channel(x, 1)
        ops.histogram_min_max(x, 50, -1.5, 2.0)

    found = operators(run)
    assert "qtoolkit::histogram_min_max" in found
    assert not {name for name in found if name.startswith("aten::")} - {
        "aten::empty",
        "aten::fill_",
        "aten::select",
        "aten::as_strided",
    }


def test_histogram_min_max_sees_what_lies_outside_and_nan():
    x = torch.tensor([-3.0, 0.1, 0.9, 7.0])
    counts, low, high = ops.histogram_min_max(x, 2, 0.0, 1.0)
    assert (counts.tolist(), low.item(), high.item()) == ([1, 1], -3.0, 7.0)
    x[2] = math.nan
    counts, low, high = ops.histogram_min_max(x, 2, 0.0, 1.0)
    assert counts.tolist() == [1, 0]
    assert low.isnan()
    assert high.isnan()
