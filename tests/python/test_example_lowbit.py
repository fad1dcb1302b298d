"""examples/qat_lowbit.py on a small network and few images: every setting, every column."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the repository")


class SmallResNet(nn.Module):
    """A residual block with the names and kinds of layers that the example's networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.pool, self.fc = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)) + self.bn3(self.shortcut(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import qat_lowbit

    small = qat_lowbit.Network("Small", 1, 0.05, ("conv1", "fc"))
    monkeypatch.setattr(qat_lowbit, "NETWORKS", {"small": small})
    monkeypatch.setattr(qat_lowbit, "make_model", lambda name, classes: SmallResNet())
    return qat_lowbit


def run(example, monkeypatch, folder: Path, *arguments: str) -> tuple[dict, int]:
    command = ["qat_lowbit.py", "--size", "8", "--epochs", "1", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, *arguments])
    status = 0
    try:
        example.main()
    except SystemExit as stopped:
        status = int(stopped.code or 0)
    return json.loads((folder / "qat_lowbit.json").read_text()), status


def test_every_setting_has_a_row_whose_converted_model_is_what_was_trained(
    example, monkeypatch, tmp_path
):
    result, status = run(example, monkeypatch, tmp_path, "--no-peers")
    assert [row["setting"] for row in result["rows"]] == list(example.SETTINGS)
    for row in result["rows"]:
        assert row["agreement"] >= 99.5, row
        assert row["sqnr"] >= 35, row
        assert row["peer"] is None
    assert status == (1 if result["misses"] else 0)
    assert (tmp_path / "qat_lowbit.md").read_text().startswith(result["table"])
    assert list(tmp_path.glob("small_fp32_*.pt"))


@pytest.mark.parametrize("setting", ["W8A8", "W4A4", "W2A4", "ternary", "binary"])
def test_a_peer_is_fine_tuned_from_the_same_weights(example, monkeypatch, tmp_path, setting):
    peer = example._torch_ao if setting == "W8A8" else example._brevitas
    if peer.why_missing():
        pytest.skip(peer.why_missing())
    result, _ = run(example, monkeypatch, tmp_path, "--settings", setting)
    (row,) = result["rows"]
    assert row["peer_name"] == ("torch.ao" if setting == "W8A8" else "Brevitas")
    # The small network learns little in an epoch: far above chance is what can be asked for.
    assert row["peer"] > 20, row


def values_behind_quantizers(model: nn.Module, images: torch.Tensor) -> dict[str, int]:
    """How many different values each activation quantizer gives."""
    seen = {}
    for name, module in model.named_children():
        if name.endswith("_quant"):
            module.register_forward_hook(
                lambda m, inputs, output, name=name: seen.update({name: len(output.unique())})
            )
    model(images)
    return seen


def test_brevitas_quantizes_weights_and_activations_to_the_setting(example):
    if example._brevitas.why_missing():
        pytest.skip(example._brevitas.why_missing())
    torch.manual_seed(0)
    loader = [(torch.randn(4, 3, 8, 8), torch.zeros(4))]
    model = SmallResNet().eval()
    counts = {"int4": 16, "int2": 4, "ternary": 3, "binary": 2}
    for weight, values in counts.items():
        prepared = example._brevitas.prepare_qat(model, loader, weight, 4, ("conv1", "fc")).eval()
        for channel in prepared.conv2.quant_weight().value.flatten(1):
            assert 1 < len(channel.unique()) <= values, weight
        assert len(prepared.conv1.quant_weight().value[0].unique()) > 16
        seen = values_behind_quantizers(prepared, loader[0][0])
        assert set(seen) == {"x_quant", "relu_quant", "bn3_quant", "relu_1_quant"}
        assert max(seen["relu_1_quant"], seen["bn3_quant"]) <= 16
        assert min(seen["x_quant"], seen["relu_quant"]) > 16


def test_a_row_says_what_it_misses(example):
    row = example.Row("Small", "W4A4", 1.0, 99.0, 1, 8, "lsq", 98.0, 99.5, 35.0, "Brevitas", 98.0)
    assert row.misses() == []
    row.qtoolkit = 97.9
    assert row.misses() == [
        "Small W4A4: more than 1.0 points below FP32",
        "Small W4A4: below Brevitas",
    ]
    row.qtoolkit, row.sqnr = 98.0, 34.9
    assert row.misses() == ["Small W4A4: the converted model is not what was trained"]
    row.sqnr, row.agreement = 35.0, 99.4
    assert row.misses() == ["Small W4A4: the converted model is not what was trained"]
