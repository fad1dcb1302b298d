"""The searches of ranges, each against a slow and obvious one."""

import math

import pytest
import torch
from op_reference import PATHS, forced_path

from qtoolkit import ops
from qtoolkit.observers import (
    EntropyObserver,
    HistogramObserver,
    MSEObserver,
    PercentileObserver,
    PerChannelMSEObserver,
    make_observer,
)
from qtoolkit.observers.base import range_to_qparams
from qtoolkit.qconfig import TensorSpec


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def laplace(n):
    u = torch.rand(2, n, generator=torch.Generator().manual_seed(3))
    return torch.log(u[0] / u[1])


DATA = {
    "normal": randn(20000),
    "relu": randn(20000).relu(),
    "relu6": (randn(20000) * 4).clamp(0, 6),
    "uniform": torch.rand(20000, generator=torch.Generator().manual_seed(1)),
    "laplace": laplace(20000),
    "shifted": randn(20000) + 5,
    "negative": -randn(20000).abs(),
    "few values": randn(200),
    "tails": torch.cat([randn(20000), randn(200, seed=1) * 20]),
    "one outlier": torch.cat([randn(20000), torch.tensor([60.0])]),
    "two values": torch.tensor([-1.0, 3.0]),
    "sparse": torch.cat([torch.zeros(20000), randn(50)]),
}
SPECS = {
    "uint8": TensorSpec(),
    "int8 symmetric": TensorSpec("int8", symmetric=True),
    "uint4": TensorSpec("uint4"),
    "int4 symmetric": TensorSpec("int4", symmetric=True),
}


def histogram_of(x, bins):
    return torch.histc(x, bins).long(), x.min(), x.max()


def floats(pair):
    return [value.item() for value in pair]


# --- least squares over ranges of bins ------------------------------------------------------------


def squared_error(counts, first, last, levels):
    """Squared error of one range, by its definition: the integral over each bin, piece by piece."""
    cell = (last - first + 1) / levels
    edges = torch.arange(counts.numel() + 1, dtype=torch.float64) - first

    def integral(x):  # of the squared distance to the centre of the cell, from the range's start
        index = (x / cell).floor().clamp(0, levels - 1)
        return index * cell**3 / 12 + ((x - (index + 0.5) * cell) ** 3 + (cell / 2) ** 3) / 3

    return ((integral(edges[1:]) - integral(edges[:-1])) * counts).sum().item()


def sampled_error(counts, first, last, levels, samples=256):
    """The same with evenly spaced values of every bin."""
    x = (torch.arange(counts.numel() * samples, dtype=torch.float64) + 0.5) / samples
    cell = (last - first + 1) / levels
    index = ((x - first) / cell).floor().clamp(0, levels - 1)
    square = (x - (first + (index + 0.5) * cell)).square().reshape(-1, samples).mean(1)
    return (square * counts).sum().item()


def greedy_range(counts, levels):
    """The search one small step and one candidate at a time."""
    cumulative = counts.cumsum(0).tolist()
    total = cumulative[-1]
    whole = (start, end) = (0, counts.numel() - 1)
    lower, upper, lowest = 0.0, 1.0, float("inf")
    while lower < upper:
        left, right = start, end
        while left < end and cumulative[left] < (lower + 1e-5) * total:
            left += 1
        while right > start and cumulative[right] > (upper - 1e-5) * total:
            right -= 1
        moved = (left, end) if left - start > end - right else (start, right)
        if left - start > end - right:
            lower += 1e-5
        else:
            upper -= 1e-5
        if moved == (start, end):
            continue
        error = squared_error(counts, *moved, levels)
        if error > lowest:
            break
        (start, end), lowest = moved, error
    return (start, end) if lowest < squared_error(counts, *whole, levels) else whole


@pytest.mark.parametrize("levels", [4, 16, 255])
@pytest.mark.parametrize("bounds", [(0, 63), (5, 40), (20, 21), (0, 10), (63, 63)])
def test_the_tests_squared_error_is_the_integral(bounds, levels):
    counts = torch.histc(randn(1000), 64).long()
    expected = sampled_error(counts, *bounds, levels)
    assert squared_error(counts, *bounds, levels) == pytest.approx(expected, rel=5e-3)


def bins_of(pair, counts, low, high):
    """First and last bin of a range that ends where bins do."""
    width = (high.double() - low.double()) / counts.numel()
    first, end = ((value.double() - low.double()) / width for value in pair)
    assert abs(first - first.round()) < 1e-2
    assert abs(end - end.round()) < 1e-2
    return int(first.round()), int(end.round()) - 1


@pytest.mark.parametrize("levels", [16, 256])
@pytest.mark.parametrize("data", DATA)
def test_l2_search_is_the_greedy_one(data, levels):
    histogram = histogram_of(DATA[data], 512)
    assert bins_of(ops.range_l2(*histogram, levels), *histogram) == greedy_range(
        histogram[0], levels
    )


@pytest.mark.parametrize("counts", [[5], [0, 7, 0], [1, 0, 0, 0, 1], [10**9, 0, 1]])
@pytest.mark.parametrize("search", [ops.range_l2, ops.range_kl])
def test_searches_end_on_sparse_histograms(search, counts):
    low, high = search(torch.tensor(counts), torch.tensor(-1.0), torch.tensor(2.0), 256)
    assert -1 <= low <= high <= 2


# --- divergence -----------------------------------------------------------------------------------


def divergence(counts, first, last, levels):
    """KL(P || Q) of one range with the two distributions written out."""
    inside = counts[first : last + 1].double()
    p = inside.clone()
    if not inside.any():
        return math.inf
    occupied = inside.nonzero().flatten()
    p[occupied[0]] += counts[:first].sum()
    p[occupied[-1]] += counts[last + 1 :].sum()
    q = torch.zeros_like(p)
    n = last - first + 1
    for g in range(levels):
        group = slice(n * g // levels, n * (g + 1) // levels)
        occupied = inside[group] > 0
        if occupied.any():
            q[group] = torch.where(occupied, inside[group].sum() / occupied.sum(), 0.0)
    p, q = p / p.sum(), q / q.sum()
    some = p > 0
    return (p[some] * (p[some] / q[some]).log()).sum().item()


def divergences(counts, zero_bin, levels):
    """The divergence of every range that is tried."""
    counts = counts.clone()
    neighbours = counts[max(zero_bin - 1, 0) : zero_bin + 2].clone()
    neighbours[min(zero_bin, 1)] = 0
    counts[zero_bin] = min(counts[zero_bin], neighbours.max())
    found = {}
    for half in range(counts.numel()):
        first, last = max(0, zero_bin - half), min(counts.numel() - 1, zero_bin + half)
        if last - first + 1 >= levels or (first, last) == (0, counts.numel() - 1):
            found[first, last] = divergence(counts, first, last, levels)
    return found


@pytest.mark.parametrize("levels", [16, 61])
@pytest.mark.parametrize("data", DATA)
def test_kl_search_finds_the_least_divergence(data, levels):
    counts, low, high = histogram = histogram_of(DATA[data], 150)
    zero_bin = int((-low / ((high - low) / 150)).clamp(0, 149))
    expected = divergences(counts, zero_bin, levels)
    found = bins_of(ops.range_kl(*histogram, levels), *histogram)
    assert expected[found] <= min(expected.values()) + 1e-12


def test_entropy_takes_tails_off_and_zeros_do_not_count():
    x = torch.cat([randn(20000).relu(), torch.tensor([40.0])])
    observer = EntropyObserver()
    observer(x)
    low, high = floats(observer.value_range())
    assert low == 0.0
    assert 2.5 < high < 8.0  # at least 256 bins of 2048
    more_zeros = EntropyObserver()
    more_zeros(torch.cat([x, torch.zeros(100000)]))
    assert floats(more_zeros.value_range()) == [low, high]


# --- least squares over scales --------------------------------------------------------------------


def error_of(x, weight, low, high, spec):
    scale, zero_point = range_to_qparams(low, high, spec)
    y = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.quant_min, spec.quant_max)
    return ((x - y).double().square() * weight).sum().item()


def candidates(low, high, symmetric, apart):
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    parts = [torch.tensor(part / 100) for part in range(100, 0, -1)]
    if symmetric:
        most = torch.maximum(-low, high)
        return [(torch.maximum(low, -most * p), torch.minimum(high, most * p)) for p in parts]
    if apart and low < 0 < high:
        return [(low * p, high * other) for p in parts for other in parts]
    return [(low * p, high * p) for p in parts]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("data", ["normal", "relu", "tails", "shifted"])
def test_mse_search_finds_the_least_error_of_all_candidates(data, spec):
    spec = SPECS[spec]
    bins = 64
    counts, low, high = histogram = histogram_of(DATA[data], bins)
    width = high / bins - low / bins
    centres = low + width * (torch.arange(bins) + 0.5)
    if low <= 0 <= high:
        centres[int((-low / width).clamp(0, bins - 1))] = 0.0
    errors = [
        error_of(centres, counts, *candidate, spec)
        for candidate in candidates(low, high, spec.symmetric, apart=True)
    ]
    found = ops.range_mse(*histogram, spec.quant_min, spec.quant_max, spec.symmetric)
    assert error_of(centres, counts, *found, spec) <= min(errors) * (1 + 1e-9)


def test_of_equal_candidates_the_widest_is_taken():
    histogram = torch.tensor([3, 0, 0, 0]), torch.tensor(0.0), torch.tensor(5.0)
    assert floats(ops.range_mse(*histogram, 0, 255, False)) == [0.0, 5.0]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("spec", ["int4 symmetric", "uint4"])
def test_mse_per_channel_searches_each_channel(spec, axis):
    spec = SPECS[spec]
    weight = randn(5, 300, seed=2) * torch.tensor([[1.0], [10.0], [0.1], [0.0], [1.0]])
    weight[4] = weight[4].abs()
    x = weight if axis == 0 else weight.T
    bounds = ops.range_mse_per_channel(x, axis, spec.quant_min, spec.quant_max, spec.symmetric)
    for row, low, high in zip(weight, *bounds):
        errors = [
            error_of(row, 1.0, *candidate, spec)
            for candidate in candidates(row.min(), row.max(), spec.symmetric, apart=False)
        ]
        assert error_of(row, 1.0, low, high, spec) <= min(errors) * (1 + 1e-9)


def test_mse_per_channel_reports_what_is_not_finite():
    x = randn(3, 8)
    x[1, 5] = math.inf
    low, high = ops.range_mse_per_channel(x, 0, -7, 7, True)
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, False]


def test_mse_observers_lose_less_than_others_at_4_bits():
    x = laplace(50000)

    def error(observer):
        observer(x)
        spec = observer.spec
        scale, zero_point = observer.calculate_qparams()
        y = torch.fake_quantize_per_tensor_affine(
            x, scale, zero_point, spec.quant_min, spec.quant_max
        )
        return (x - y).square().mean()

    spec = TensorSpec("int4", symmetric=True, observer="mse")
    assert error(MSEObserver(spec)) < 0.5 * error(
        make_observer(TensorSpec("int4", symmetric=True, observer="minmax"))
    )
    assert error(MSEObserver(spec)) < error(HistogramObserver(spec))


def test_widest_of_several_weights_counts():
    observer = PerChannelMSEObserver(
        TensorSpec("int4", "per_channel", symmetric=True, observer="per_channel_mse")
    )
    weights = [randn(3, 100, seed=seed) * (1 + seed) for seed in range(2)]
    for weight in weights:
        observer(weight)
    found = [ops.range_mse_per_channel(weight, 0, -7, 7, True) for weight in weights]
    assert torch.equal(observer.max_val, torch.maximum(found[0][1], found[1][1]))


# --- percentiles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99, 100.0])
@pytest.mark.parametrize("data", [name for name in DATA if name != "sparse"])
def test_percentile_is_the_quantile_to_a_bin(data, percentile):
    x = DATA[data]
    observer = PercentileObserver(percentile=percentile)
    for batch in x.chunk(2):
        observer(batch)
    outside = (1 - percentile / 100) / 2
    ordered = x.sort().values
    width = (ordered[-1] - ordered[0]) / observer.bins
    count = outside * x.numel()
    low, high = observer.value_range()
    # Between the value that as many as `count` lie below, and the one after it.
    nearest = ordered[max(math.ceil(count - 1e-6) - 1, 0)], ordered[min(int(count), x.numel() - 1)]
    assert nearest[0] - 2 * width <= low <= nearest[1] + 2 * width
    nearest = (
        ordered[-1 - min(int(count), x.numel() - 1)],
        ordered[-max(math.ceil(count - 1e-6), 1)],
    )
    assert nearest[0] - 2 * width <= high <= nearest[1] + 2 * width
    if percentile == 100.0:
        assert (low, high) == (ordered[0], ordered[-1])


@pytest.mark.parametrize("percentile", [0.0, 100.1, -1.0])
def test_percentile_must_be_one(percentile):
    with pytest.raises(ValueError, match="percentile must be above 0"):
        PercentileObserver(percentile=percentile)


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_every_path_finds_the_same_range(path):
    histogram = histogram_of(DATA["tails"], 333)
    expected = [ops.range_l2(*histogram, 16), ops.range_mse(*histogram, -7, 7, True)]
    with forced_path("cell_errors", path):
        assert ops.range_l2(*histogram, 16) == expected[0]
    with forced_path("scale_errors", path):
        assert ops.range_mse(*histogram, -7, 7, True) == expected[1]


@pytest.mark.parametrize("name", ["histogram", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0])
def test_a_constant_is_its_own_range(name, value):
    observer = make_observer(TensorSpec(observer=name))
    for size in (3, 100):
        observer(torch.full((size,), value))
    assert floats(observer.value_range()) == [value, value]


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-0.3, 1.01), (-100.0, 3.0), (0.0, 7e30)])
def test_a_wider_histogram_is_that_of_the_parts_of_bins(bounds):
    counts = torch.randint(0, 1000, (50,), generator=torch.Generator().manual_seed(0))
    lower, upper = bounds
    expected = torch.zeros_like(counts)
    for index, count in enumerate(counts.tolist()):
        for part in range(16):
            value = (index + (part + 0.5) / 16) / 50
            target = int((value - lower) / ((upper - lower) / 50) + 1e-12)
            expected[target] += count * (part + 1) // 16 - count * part // 16
    found = ops.rebin_histogram(counts, 0.0, 1.0, lower, upper)
    assert torch.equal(found, expected)
    assert found.sum() == counts.sum()
