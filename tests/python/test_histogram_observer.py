"""HistogramObserver: agreement with torch.ao, counts that are never lost, and the range search."""

import pytest
import torch
from torch.ao.quantization import observer as ao

from qtoolkit.observers import HistogramObserver, MinMaxObserver
from qtoolkit.observers.histogram import UNITS_PER_VALUE
from qtoolkit.qconfig import TensorSpec


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts_of(observer):
    assert (observer.histogram % UNITS_PER_VALUE == 0).all()
    return observer.histogram // UNITS_PER_VALUE


def observed(observer, *batches):
    for batch in batches:
        observer(batch)
    return observer


def laplace(n, seed):
    u = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    return torch.log(u[0] / u[1])


DATA = {
    "normal": [randn(20000, seed=s) for s in range(3)],
    "relu": [randn(20000, seed=s).relu() for s in range(3)],
    "relu6": [(randn(20000, seed=s) * 4).clamp(0, 6) for s in range(3)],
    "uniform": [torch.rand(20000, generator=torch.Generator().manual_seed(s)) for s in range(3)],
    "laplace": [laplace(20000, s) for s in range(3)],
    "shifted": [randn(20000, seed=s) + 5 for s in range(3)],
    "negative": [-randn(20000, seed=s).abs() for s in range(3)],
    "few values": [randn(200, seed=s) for s in range(3)],
    "growing": [randn(20000, seed=s) * 2**s for s in range(4)],
    "wide tails": [torch.cat([randn(20000, seed=s), randn(200, seed=s) * 20]) for s in range(3)],
    "one outlier": [torch.cat([randn(20000), torch.tensor([60.0])])],
    "zeros first": [torch.zeros(5000), randn(5000) * 50],
    "constant": [torch.full((100,), 3.0)],
}
SCHEMES = {
    "affine uint8": (TensorSpec(), {"dtype": torch.quint8}),
    "symmetric int8": (
        TensorSpec("int8", symmetric=True),
        {
            "dtype": torch.qint8,
            "qscheme": torch.per_tensor_symmetric,
            "quant_min": -127,
            "quant_max": 127,
        },
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("data", DATA)
def test_histogram_agrees_with_torch_ao(data, scheme):
    spec, options = SCHEMES[scheme]
    reference = observed(ao.HistogramObserver(**options), *DATA[data])
    expected_scale, expected_zero_point = reference.calculate_qparams()
    scale, zero_point = observed(HistogramObserver(spec), *DATA[data]).calculate_qparams()
    assert scale.item() == pytest.approx(expected_scale.item(), rel=0.01)
    assert abs(zero_point.item() - expected_zero_point.item()) <= 1


@pytest.mark.parametrize("data", DATA)
def test_histogram_counts_every_value(data):
    observer = observed(HistogramObserver(), *DATA[data])
    total = sum(batch.numel() for batch in DATA[data])
    assert observer.histogram.sum() == total * UNITS_PER_VALUE


def test_histogram_of_one_range_is_the_histogram_of_all_data():
    ends = torch.tensor([-4.0, 4.0])
    batches = [torch.cat([randn(500, seed=s).clamp(-4, 4), ends]) for s in range(4)]
    observer = observed(HistogramObserver(bins=64), *batches)
    expected = torch.histc(torch.cat(batches), 64, -4, 4)
    assert torch.equal(counts_of(observer), expected.long())


def test_counts_stay_in_place_when_the_range_doubles():
    observer = observed(HistogramObserver(bins=8), torch.arange(9.0).clamp(max=8.0) + 0.0)
    before = counts_of(observer)
    observer(torch.tensor([16.0]))
    moved = before.reshape(4, 2).sum(1)
    assert torch.equal(counts_of(observer), torch.cat([moved, torch.tensor([0, 0, 0, 1])]))


def test_a_bin_that_is_cut_gives_sixteenths_to_each_side():
    # New bins end at 1.275, 2.55, 3.825: above 4 of the 16 parts of [1, 2) and 13 of [3, 4].
    observer = observed(HistogramObserver(bins=4), torch.tensor([0.0, 1.5, 4.0]))
    observer(torch.tensor([5.1]))
    assert (observer.histogram * 16 // UNITS_PER_VALUE).tolist() == [16 + 4, 12, 13, 3 + 16]


def test_a_first_batch_of_one_value_keeps_its_place():
    observer = observed(
        HistogramObserver(bins=10), torch.full((7,), 3.5), torch.tensor([0.0, 10.0])
    )
    expected = torch.zeros(10, dtype=torch.int64)
    expected[[0, 3, 9]] = torch.tensor([1, 7, 1])
    assert torch.equal(counts_of(observer), expected)


@pytest.mark.parametrize("first", [0.0, 1e-30, -2.0])
def test_a_constant_first_batch_does_not_spoil_the_range(first):
    x = randn(5000) * 100
    alone = observed(HistogramObserver(), x).calculate_qparams()[0]
    after = observed(HistogramObserver(), torch.full((5000,), first), x).calculate_qparams()[0]
    assert after.item() == pytest.approx(alone.item(), rel=0.15)


@pytest.mark.parametrize("bounds", [(-3e38, 3e38), (0.0, 1e-38), (1e-40, 3e-40)])
def test_extreme_ranges_are_counted(bounds):
    x = torch.linspace(0, 1, 101) * bounds[1] + torch.linspace(1, 0, 101) * bounds[0]
    observer = observed(HistogramObserver(bins=10), x, x)
    assert counts_of(observer).sum() == 202
    assert counts_of(observer).max() < 30


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_never_negative_data_has_zero_point_zero(scale):
    batches = [randn(3000, seed=s).relu() * scale for s in range(4)]
    _, zero_point = observed(HistogramObserver(), *batches).calculate_qparams()
    assert zero_point == 0


def test_rare_tails_are_cut_for_less_error():
    x = randn(100000)
    histogram = observed(HistogramObserver(TensorSpec("uint4")), x).calculate_qparams()
    minmax = observed(MinMaxObserver(TensorSpec("uint4", observer="minmax")), x).calculate_qparams()

    def error(qparams):
        return (torch.fake_quantize_per_tensor_affine(x, *qparams, 0, 15) - x).square().mean()

    assert error(histogram) < 0.7 * error(minmax)


def test_histogram_needs_two_bins():
    with pytest.raises(ValueError, match="at least 2 bins"):
        HistogramObserver(bins=1)
