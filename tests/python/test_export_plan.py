"""Plan files as an export target."""

from __future__ import annotations

import pytest
import torch
from test_plan_file import TwoInputs, converted, images, simple
from torch import nn

import qtoolkit as qt


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plan_file_gives_the_models_bits(compiled, tmp_path):
    model = simple()
    given = qt.compile(model, images(0), tune=False) if compiled else model
    report = qt.export.plan(given, tmp_path / "m.qtplan", (images(0),), tune=False)
    assert report.verified
    assert report.max_difference == 0
    assert report.runtime.startswith("qtoolkit ")
    run = qt.export.load("plan", report.path)
    assert torch.equal(run(images(1)), model(images(1)))
    assert torch.equal(qt.load_plan(report.path)([images(1)])[0], model(images(1)))
    assert [file.name for file in tmp_path.iterdir()] == ["m.qtplan"]


def test_a_prepared_model_is_converted_and_compiled_first(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping(), images(0))
    qt.calibrate(prepared, [(images(0),)], progress=False)
    report = qt.export.plan(prepared, tmp_path / "m.qtplan", images(0), tune=False)
    expected = qt.convert(prepared)(images(2))
    assert torch.equal(qt.export.load("plan", report.path)(images(2)), expected)


def test_inputs_that_the_network_does_not_read_are_left_out(tmp_path):
    torch.manual_seed(0)
    inputs = (images(0), images(1), images(2))
    report = qt.export.plan(converted(TwoInputs(), inputs), tmp_path / "m.qtplan", inputs)
    assert report.max_difference == 0
    assert len(report.outputs) == 2


def test_what_is_not_one_plan_is_named_and_not_written(tmp_path):
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.fft.rfft(x).real

    with pytest.raises(qt.export.UnsupportedError, match=r"export.plan: .* run in PyTorch \('"):
        qt.export.plan(simple(Odd()), tmp_path / "m.qtplan", (images(0),), tune=False)
    with pytest.raises(qt.export.UnsupportedError, match=r"needs the result of qt\.convert"):
        qt.export.plan(nn.Linear(12, 3), tmp_path / "m.qtplan", (images(0),))
    assert list(tmp_path.iterdir()) == []


def test_the_target_is_listed_with_what_it_needs():
    info = qt.export.targets()["plan"]
    assert info.available
    assert (info.suffix, info.packages) == (".qtplan", {})
