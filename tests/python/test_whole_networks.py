"""Segmentation networks and a transformer: which layers stay float, and how near the rest comes."""

from __future__ import annotations

import pytest
import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn

import qtoolkit as qt


def convert(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


class Logits(nn.Module):
    """A segmentation network of torchvision, of whose outputs one counts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)["out"]


@pytest.mark.parametrize(
    ("name", "least"), [("deeplabv3_mobilenet_v3_large", 25), ("fcn_resnet50", 12)]
)
def test_of_a_segmentation_network_only_the_last_upsampling_stays_float(name, least):
    segmentation = pytest.importorskip("torchvision.models.segmentation")
    torch.manual_seed(0)
    model = Logits(getattr(segmentation, name)(weights=None, weights_backbone=None))
    data = batches((2, 3, 64, 64), 2)
    with torch.no_grad():
        for x in data:
            model.train()(x)
    quantized = convert(model.eval(), data)
    layers = qt.explain(quantized).float_layers
    assert [layer.kind for layer in layers] == ["UpsampleBilinear2d"]
    assert layers[0].reason == "only float layers use its output"
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > least


class Block(nn.Module):
    """A transformer's block with its attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def attention(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Patches, two blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(Block(32, 4), Block(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


def test_of_a_transformer_nothing_stays_float():
    torch.manual_seed(0)
    model, data = settle(Transformer(), (3, 3, 16, 16)), batches((3, 3, 16, 16))
    quantized = convert(model, data)
    assert not qt.explain(quantized).float_layers, qt.explain(quantized)
    kinds = [type(m).__name__ for m in quantized.modules()]
    assert (kinds.count("Softmax"), kinds.count("LayerNorm"), kinds.count("Matmul")) == (2, 5, 4)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 20
        scripted = torch.jit.script(quantized)
        assert torch.equal(scripted(data[0]), quantized(data[0]))
