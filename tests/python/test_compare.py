"""The comparison of a quantized model with the float one, and its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from chromium import rendered
from networks import Kinds, ResNet, batches, quantize, settle, sqnr
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit.batches import input_batches
from qtoolkit.measures import Deviation, ValueCounts

SHAPE = (4, 3, 24, 24)


@pytest.fixture(scope="module")
def kinds() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    model = settle(Kinds(), SHAPE)
    data = batches(SHAPE)
    mapping = qt.get_default_qconfig_mapping("x86").set_module_name("same", None)
    return model, quantize(model, *data[:1], mapping=mapping), data


@pytest.fixture(scope="module")
def comparison(kinds) -> qt.Comparison:
    return qt.compare(*kinds, progress=False)


class Page(HTMLParser):
    """The rows of the page's table, how many plots each holds, and all attributes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.plots: list[int] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
            self.plots.append(0)
        elif tag == "td":
            self.rows[-1].append("")
        elif tag == "svg" and self.rows:
            self.plots[-1] += 1

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def layer(comparison: qt.Comparison, name: str) -> qt.LayerComparison:
    return next(entry for entry in comparison.layers if entry.name == name)


def test_each_layer_has_its_measures(kinds, comparison):
    model, quantized, data = kinds
    with torch.no_grad():
        x = torch.cat(data)
        expected, actual = model(x), quantized(x)
        stem = torch.relu(model.stem(x))
    assert comparison.sqnr == pytest.approx(sqnr(expected, actual), abs=1e-3)
    cosine = torch.cosine_similarity(expected.flatten(), actual.flatten(), dim=0)
    assert comparison.cosine == pytest.approx(float(cosine), abs=1e-6)
    found = layer(comparison, "stem")
    assert (found.minimum, found.maximum) == (0.0, pytest.approx(float(stem.max()), rel=1e-6))
    assert sum(found.counts) == stem.numel()
    quantized_stem = quantized.get_submodule("stem")
    assert found.high == pytest.approx(255 * float(quantized_stem.output_scale))
    codes = quantized_stem.weight * quantized_stem.weight_scale.reshape(-1, 1, 1, 1)
    assert found.weight_sqnr == pytest.approx(sqnr(model.stem.weight, codes), abs=1e-3)
    assert found.latency_ms > 0


def test_batch_norm_is_folded_into_the_weight_that_is_compared(comparison):
    assert layer(comparison, "depthwise").weight_sqnr > 35


def test_float_layers_are_compared_and_say_why(comparison):
    same = layer(comparison, "same")
    assert same.kind == "Conv2d"
    assert same.reason == "its qconfig keeps it in float"
    assert 30 < same.sqnr < 60
    assert same.low != same.low  # it has no codes
    assert "float: its qconfig keeps it in float" in str(comparison)


def test_a_transposed_convolutions_weight_is_compared():
    model = nn.Sequential(nn.ConvTranspose2d(8, 6, 3, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1))
    data = batches((2, 8, 5, 5), 2)
    result = qt.compare(model, quantize(model, data[0]), data, progress=False)
    assert layer(result, "0").weight_sqnr > 35


def test_the_page_has_a_row_and_a_plot_for_each_layer(comparison, tmp_path):
    comparison.to_html(tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    rows = [row for row in page.rows if row]
    assert [row[1] for row in rows] == [entry.name for entry in comparison.layers]
    plots = [count for row, count in zip(page.rows, page.plots) if row]
    assert plots == [1] * len(comparison.layers)
    assert rows[0][3] == f"{comparison.layers[0].sqnr:.2f}"
    # Nothing is loaded from elsewhere.
    assert not [a for a in page.attributes if a[0] in ("src", "href", "srcset", "data")]
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_the_page_opens_and_sorts_in_a_browser(comparison, tmp_path):
    comparison.to_html(tmp_path / "report.html")
    click = 'document.querySelectorAll("th button")[3].click();'
    document = rendered(tmp_path / "report.html", click)
    names = re.findall(r'<td class="text" data-sort="([^"]*)">\1</td>', document)
    shown = [name for name in names if name in {entry.name for entry in comparison.layers}]
    wanted = sorted(comparison.layers, key=lambda entry: entry.sqnr)
    assert shown == [entry.name for entry in wanted]
    assert 'aria-sort="ascending"' in document


def test_a_page_of_200_layers_is_small_and_names_are_escaped(comparison, tmp_path):
    one = replace(comparison.layers[0], name='<script>alert("x")</script>')
    qt.Comparison((one,) * 200, 30.0).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert len(text) < 500_000
    assert "<script>alert" not in text
    assert len([row for row in Page(tmp_path / "report.html").rows if row]) == 200


class Options(nn.Module):
    """Takes arguments with defaults."""

    def forward(self, x: Tensor, scale: float = 1.0, shift: Tensor | None = None) -> Tensor:
        return x * scale if shift is None else x * scale + shift


def test_loaders_of_dicts_tuples_and_sizes_that_vary():
    model = settle(ResNet(), (8, 1, 8, 8))
    data = batches((4, 1, 8, 8), 2)
    quantized = quantize(model, data[0])
    expected = qt.compare(model, quantized, data, progress=False).sqnr
    dicts = [{"x": x, "label": torch.zeros(4)} for x in data]
    assert qt.compare(model, quantized, dicts, progress=False).sqnr == expected
    tuples = [(x, torch.zeros(4)) for x in data]
    assert qt.compare(model, quantized, tuples, progress=False).sqnr == expected
    sizes = [data[0], data[1][:1], torch.randn(2, 1, 12, 12)]
    assert qt.compare(model, quantized, iter(sizes), progress=False).sqnr > 20


def test_bad_batches_say_what_is_wrong():
    model = settle(ResNet(), (8, 1, 8, 8))
    x = torch.randn(2, 1, 8, 8)
    quantized = quantize(model, x)

    def run(*data: object) -> None:
        qt.compare(model, quantized, data, progress=False)

    with pytest.raises(ValueError, match="compare got no data"):
        run()
    bad = x.clone()
    bad[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"batch 1 holds 8 NaN or infinite .*input 0.*\(2, 1, 8"):
        run(x, bad)
    with pytest.raises(TypeError, match=r"keys \['image'\].*arguments are \['x'\]"):
        run({"image": x})
    with pytest.raises(TypeError, match="got str"):
        run("image")


def test_an_argument_that_a_dict_lacks_has_its_default():
    x = torch.randn(3, 4)

    def inputs(batch: dict[str, Tensor]) -> tuple[object, ...]:
        return next(input_batches([batch], Options(), "test", progress=False))

    assert inputs({"x": x, "shift": x}) == (x, 1.0, x)
    with pytest.raises(TypeError, match="without 'x'"):
        inputs({"shift": x})


def values() -> Iterator[Tensor]:
    yield torch.full((5,), 0.25)
    yield torch.randn(100, generator=torch.Generator().manual_seed(0))
    yield torch.tensor([1e6, -3.0, float("nan"), float("inf")])


def test_a_growing_histogram_loses_no_count():
    found = ValueCounts()
    for tensor in values():
        found.add(tensor)
    counts, low, high = found.filled()
    assert sum(counts) == 107
    assert low <= found.minimum < 0
    assert found.maximum == 1e6 <= high
    assert counts[-1] == 1


def test_deviation_of_equal_empty_and_zero_tensors():
    empty = Deviation()
    assert empty.sqnr != empty.sqnr
    same, zero = Deviation(), Deviation()
    same.add(torch.ones(3), torch.ones(3))
    zero.add(torch.zeros(3), torch.ones(3))
    assert (same.sqnr, same.cosine) == (float("inf"), pytest.approx(1))
    assert zero.sqnr == float("-inf")
    assert zero.cosine != zero.cosine
