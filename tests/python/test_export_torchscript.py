"""The TorchScript file gives the converted model's bits, in this process and in a new one."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import Kinds, ResNet, batches, digits, settle, trained
from torch import Tensor, nn

import qtoolkit as qt


def quantize(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def test_file_gives_the_same_bits_in_a_new_process(tmp_path):
    x = digits()[1][0][0]
    quantized = quantize(trained(), [x for x, _ in digits()[0][:4]])
    report = qt.export.torchscript(quantized, tmp_path / "m.pt", (x,))
    assert report.verified
    assert report.max_difference == 0.0
    assert report.size == (tmp_path / "m.pt").stat().st_size
    assert report.warnings == []
    torch.save({"x": x, "y": quantized(x)}, tmp_path / "expected.pt")
    code = (
        "import sys, torch, qtoolkit\n"
        "model = torch.jit.load(sys.argv[1]); data = torch.load(sys.argv[2])\n"
        "assert torch.equal(model(data['x']), data['y'])\n"
    )
    paths = [str(tmp_path / "m.pt"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)


def test_scripted_model_takes_other_batch_sizes_and_images(tmp_path):
    data = batches((4, 3, 32, 32))
    quantized = quantize(settle(Kinds(), (8, 3, 32, 32)), data)
    qt.export.torchscript(quantized, tmp_path / "m.pt", (data[0],))
    loaded = torch.jit.load(tmp_path / "m.pt")
    for shape in [(1, 3, 32, 32), (3, 3, 48, 48)]:
        x = torch.randn(shape)
        assert torch.equal(loaded(x), quantized(x))


def test_file_is_about_a_quarter_of_the_float_one(tmp_path):
    class Wide(ResNet):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Sequential(nn.Linear(32, 2048), nn.ReLU(), nn.Linear(2048, 256))

    model = settle(Wide(), (8, 1, 8, 8))
    data = batches((4, 1, 8, 8))
    report = qt.export.torchscript(quantize(model, data), tmp_path / "q.pt", (data[0],))
    torch.jit.save(torch.jit.script(model), tmp_path / "f.pt")
    assert report.size < 0.31 * (tmp_path / "f.pt").stat().st_size


def test_a_model_that_cannot_be_scripted_is_traced_with_a_warning(tmp_path):
    class Unscriptable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor, **options: object) -> Tensor:
            return self.conv(x) if x.mean() < 1e9 else x

    data = batches((2, 3, 4, 4))
    report = qt.export.torchscript(
        quantize(Unscriptable().eval(), data), tmp_path / "m.pt", (data[0],)
    )
    assert report.verified
    assert "traced" in report.warnings[0]


@pytest.mark.parametrize("example_inputs", [None, (), 3])
def test_example_inputs_are_required(tmp_path, example_inputs):
    with pytest.raises(TypeError, match="example_inputs"):
        qt.export.torchscript(nn.Identity(), tmp_path / "m.pt", example_inputs)


def test_a_model_that_can_be_neither_scripted_nor_traced_is_refused(tmp_path):
    class Failing(nn.Module):
        def forward(self, x: Tensor, **options: object) -> Tensor:
            if torch.jit.is_tracing():
                raise KeyError("tracing")
            return x

    with pytest.raises(qt.export.UnsupportedError, match=r"neither scripted .* nor traced"):
        qt.export.torchscript(Failing(), tmp_path / "m.pt", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []
