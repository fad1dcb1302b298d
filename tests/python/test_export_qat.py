"""A model that was trained with fake-quantize, in every target that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt

BATCH = (8, 3, 12, 12)


class Net(nn.Module):
    """Batch norm, a residual, a pool and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.inner_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(functional.relu(self.norm(self.conv(x))))
        x = functional.relu(self.inner_norm(self.inner(x)) + x)
        return self.head(x.mean((2, 3)))


def trained(preset: str) -> nn.Module:
    """A converted model after two steps of training."""
    torch.manual_seed(0)
    x, y = torch.randn(BATCH), torch.arange(BATCH[0]) % 4
    model = qt.prepare_qat(Net(), qt.get_default_qat_qconfig_mapping(preset), (x,))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return qt.convert(model.eval())


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {}


@pytest.mark.parametrize("target", qt.export.targets())
def test_a_trained_model_has_its_codes_in_every_runtime(target, models, tmp_path: Path):
    info = qt.export.targets()[target]
    if not info.available:
        pytest.skip(f"{target} needs packages that are absent: {info.install}")
    if info.preset not in models:
        models[info.preset] = trained(info.preset)
    model = models[info.preset]
    x = torch.randn(BATCH, generator=torch.Generator().manual_seed(1))
    report = getattr(qt.export, target)(model, tmp_path / f"m{info.suffix}", (x,))
    assert report.verified
    with torch.no_grad():
        expected = model(x)
    actual = qt.export.load(target, report.path)(x)
    if report.layers is None:  # the file is the integer model itself
        assert torch.equal(actual, expected)
        return
    assert report.layers.compared >= 5
    assert report.layers.max_steps <= 1
    assert report.layers.differing < 0.01
    assert torch.equal(actual.argmax(1), expected.argmax(1))
    assert report.outputs[0].sqnr > 25
