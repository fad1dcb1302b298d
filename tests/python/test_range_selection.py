"""Range selection: outliers are cut off where the output does not miss them."""

import pytest
import torch
from torch import nn

import qtoolkit as qt
from qtoolkit.algorithms import Context, RangeSelection
from qtoolkit.observers import HistogramObserver


def network(weight_of_outliers: float) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 4)).eval()
    with torch.no_grad():
        model[0].weight[:, 0] = weight_of_outliers
    return model


def batch() -> torch.Tensor:
    """65536 values, of which two are far outside: fewer than 99.99 % leaves out."""
    x = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    x[:2, 0] = 200.0
    return x


def selected(model: nn.Module, mapping: qt.QConfigMapping | None = None):
    prepared = qt.calibrate(qt.prepare(model, mapping, (batch(),)), [batch()], progress=False)
    RangeSelection().run(Context(prepared, [(batch(),)], progress=False))
    return prepared


def input_observer(prepared: nn.Module) -> HistogramObserver:
    return next(m for m in prepared.modules() if isinstance(m, qt.observers.Observer))


def test_outliers_that_the_output_does_not_show_are_cut_off():
    observer = input_observer(selected(network(0.0)))
    assert observer.max_val == 200
    assert float(observer.value_range()[1]) < 10


def test_outliers_that_the_output_shows_are_kept():
    observer = input_observer(selected(network(1.0)))
    assert observer.chosen is None
    assert float(observer.value_range()[1]) > 150


def test_the_converted_model_uses_the_range():
    model = network(0.0)
    recipe = qt.Recipe("test", qt.get_default_qconfig_mapping("x86"), (RangeSelection(),))
    with torch.no_grad():
        wanted = model(batch())
        plain, chosen = (
            (qt.quantize(model, [batch()], r, progress=False)(batch()) - wanted).square().sum()
            for r in ("w8a8-fast", recipe)
        )
    assert chosen < 0.01 * plain


def test_other_observers_are_left_alone():
    mapping = qt.get_default_qconfig_mapping("x86")
    qconfig = mapping.global_qconfig
    minmax = qt.TensorSpec("uint8", observer="minmax")
    observer = input_observer(
        selected(network(0.0), mapping.set_global(qt.QConfig(minmax, qconfig.weight)))
    )
    assert float(observer.value_range()[1]) == 200


def test_reset_forgets_the_choice():
    observer = input_observer(selected(network(0.0)))
    observer.reset()
    assert observer.chosen is None


def test_a_run_goes_on_with_its_choice(tmp_path, monkeypatch):
    model = network(0.0)
    first = qt.quantize(model, [batch()], "w8a8", progress=False, resume=tmp_path)
    monkeypatch.setattr(
        qt.algorithms.range_selection._Choice, "decide", lambda *_: pytest.fail("decided again")
    )
    again = qt.quantize(model, [batch()], "w8a8", progress=False, resume=tmp_path)
    assert torch.equal(first(batch()), again(batch()))
