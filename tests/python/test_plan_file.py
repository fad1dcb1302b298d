"""Plan files: qt.save_plan and qt.load_plan."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qtoolkit as qt


class TwoInputs(nn.Module):
    """Reads its inputs in another order than it takes them, and gives several results."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(3, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor, unused: Tensor, y: Tensor) -> dict[str, Tensor | list[Tensor]]:
        second = torch.relu(self.b(y))
        first = torch.relu(self.a(x))
        scores = self.fc((first + second).mean((2, 3)))
        return {"scores": scores, "others": [self.fc(second.mean((2, 3)))]}


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def converted(model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(model.eval(), mapping, example_inputs=inputs)
    with torch.no_grad():
        prepared(*inputs)
    return qt.convert(prepared)


def simple(*last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
    return converted(nn.Sequential(*layers, *last), (images(0),))


def test_a_file_gives_the_models_bits_on_other_sizes_too(tmp_path):
    fast = qt.compile(simple(), images(0))
    qt.save_plan(fast, tmp_path / "m.qtplan", images(0))
    loaded = qt.load_plan(tmp_path / "m.qtplan")
    for x in (images(1), torch.randn(1, 3, 9, 17)):
        (found,) = loaded([x])
        assert torch.equal(found, fast(x))
    assert [file.name for file in tmp_path.iterdir()] == ["m.qtplan"]


def test_inputs_and_outputs_are_those_of_forward_in_their_order(tmp_path):
    torch.manual_seed(0)
    inputs = (images(0), images(1), images(2))
    fast = qt.compile(converted(TwoInputs(), inputs), inputs)
    qt.save_plan(fast, tmp_path / "m.qtplan", inputs)
    expected = fast(*inputs)
    scores, other = qt.load_plan(tmp_path / "m.qtplan")([inputs[0], inputs[2]])
    assert torch.equal(scores, expected["scores"])
    assert torch.equal(other, expected["others"][0])


def test_a_network_that_ends_with_images(tmp_path):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)]
    fast = qt.compile(converted(nn.Sequential(*layers), (images(0),)), images(0))
    qt.save_plan(fast, tmp_path / "m.qtplan", images(0))
    (found,) = qt.load_plan(tmp_path / "m.qtplan")([images(1)])
    assert torch.equal(found, fast(images(1)))


def test_what_is_not_one_plan_is_refused_and_named(tmp_path):
    path = tmp_path / "m.qtplan"
    quantized = simple()
    with pytest.raises(ValueError, match=r"needs the result of qt\.compile"):
        qt.save_plan(quantized, path)
    with pytest.raises(TypeError, match=r"needs a torch\.nn\.Module, got str"):
        qt.save_plan("model", path)
    float_end = qt.compile(simple(nn.LogSoftmax(1)), images(0))
    with pytest.raises(ValueError, match=r"run in PyTorch \('_5'\).*qt.explain"):
        qt.save_plan(float_end, path)
    with pytest.raises(ValueError, match="captured as a whole"):
        qt.save_plan(nn.Sequential(qt.compile(quantized, images(0))), path)
    assert list(tmp_path.iterdir()) == []


def test_an_older_file_stays_whole_when_something_fails(tmp_path, monkeypatch):
    path = tmp_path / "m.qtplan"
    path.write_text("older")
    monkeypatch.setattr(qt.plan_file, "load_plan", lambda file: lambda inputs: [torch.zeros(2, 5)])
    with pytest.raises(RuntimeError, match="gives other results; nothing was written"):
        qt.save_plan(qt.compile(simple(), images(0)), path, images(0))
    assert path.read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_not_plans_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        qt.load_plan(tmp_path / "none.qtplan")
    file = tmp_path / "m.qtplan"
    qt.save_plan(qt.compile(simple(), images(0)), file)
    whole = file.read_bytes()
    for content, message in [
        (b"x" * 100, "no plan file"),
        (whole[:-5], "not whole"),
        (whole[:60] + b"\0" + whole[61:], "CRC of its metadata"),
        (whole[:8] + b"\2" + whole[9:], "version 2; this qtoolkit reads version 1"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            qt.load_plan(file)
