"""Blocks of a graph, and the reconstruction of their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.algorithms import Algorithm, BlockReconstruction, Context
from qtoolkit.algorithms.blocks import LearnedScale, find_blocks
from qtoolkit.observers import MinMaxObserver


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(functional.relu(self.conv1(x))) + x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = Residual(8), Residual(8)
        self.down = nn.Conv2d(8, 8, 3, 2)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(functional.relu(self.stem(x))))
        x = functional.relu(self.down(x))
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(functional.adaptive_avg_pool2d(x, 1).flatten(1))


def mapping_of(weight: str, activation: str) -> qt.QConfigMapping:
    spec = qt.TensorSpec(weight, "per_channel", symmetric=True, observer="per_channel_minmax")
    return qt.QConfigMapping().set_global(qt.QConfig(qt.TensorSpec(activation), spec))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    coarse = [torch.randn(count, 3, 3, 3, generator=generator) for count in (16, 16, 5)]
    return [functional.interpolate(x, (8, 8), mode="bilinear") for x in coarse]


def calibrated(model: nn.Module, batches: list[Tensor]) -> Context:
    prepared = qt.prepare(model, mapping_of("int4", "uint4"), (batches[0],))
    qt.calibrate(prepared, batches, progress=False)
    return Context(prepared, [(batch,) for batch in batches], progress=False)


def test_blocks_lie_between_points_that_one_value_passes(model, batches):
    context = calibrated(model, batches)
    blocks = find_blocks(context.prepared, context.layers)
    assert [[layer.name for layer in block.layers] for block in blocks] == [
        ["stem"],
        ["one.conv1", "one.conv2"],
        ["two.conv1", "two.conv2"],
        ["down"],
        ["left", "right"],
        ["fc"],
    ]
    values = {}

    def keep(node: str) -> None:
        module = context.prepared.get_submodule(node)
        module.register_forward_hook(lambda _, __, y: values.update({node: y}))

    for block in blocks:
        for name in (block.input, block.output):
            node = next(n for n in context.prepared.graph.nodes if n.name == name)
            if node.op == "call_module":
                keep(str(node.target))
    targets = {n.name: str(n.target) for n in context.prepared.graph.nodes}
    with torch.no_grad():
        context.prepared(batches[0])
        for block in blocks[1:]:
            found = block.module()(values[targets[block.input]])
            assert torch.equal(found, values[targets[block.output]])


class TwoOutputs(nn.Module):
    """No value alone passes behind the first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = (nn.Conv2d(3, 3, 1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = functional.relu(self.first(x))
        return self.left(x), self.right(x)


def test_layers_in_no_block_are_left_alone(batches):
    context = calibrated(TwoOutputs().eval(), batches)
    BlockReconstruction(iterations=2).run(context)
    blocks = find_blocks(context.prepared, context.layers)
    assert [layer.name for block in blocks for layer in block.layers] == ["first"]
    with torch.no_grad():
        assert len(qt.convert(context.prepared)(batches[0])) == 2


@pytest.mark.parametrize(("drop", "share"), [(0.0, 0.65), (0.5, 0.8)])
def test_reconstruction_raises_the_models_quality(drop, share, model, batches):
    x = torch.cat(batches)
    with torch.no_grad():
        expected = model(x)

    def noise(*passes: Algorithm) -> float:
        recipe = qt.Recipe("test", mapping_of("int4", "uint4"), passes)
        found = qt.quantize(model, batches, recipe, progress=False)(x)
        return float((found - expected).square().sum())

    assert noise(BlockReconstruction(iterations=80, drop=drop)) < share * noise()


def test_the_converted_model_has_the_learned_scales(model, batches):
    context = calibrated(model, batches)
    BlockReconstruction(iterations=10).run(context)
    observer = context.layers[1].output_observer()
    assert observer.pinned is not None
    first = next(
        m for m in qt.convert(context.prepared).modules() if getattr(m, "source", "") == "one.conv1"
    )
    assert torch.equal(first.output_scale, observer.pinned[0])
    x = torch.cat(batches)
    with torch.no_grad(), context.simulated():
        simulated = context.run((x,))
        found = qt.convert(context.prepared)(x)
    assert float((found - simulated).square().sum()) < 1e-3 * float(found.square().sum())


def test_the_gradient_of_a_learned_scale_is_that_of_lsq():
    observer = MinMaxObserver(qt.TensorSpec("uint4", observer="minmax"))
    observer(torch.tensor([-1.0, 2.0]))
    learned = LearnedScale(observer, drop=0.0)
    scale, zero_point = learned.qparams()
    x = torch.tensor([-3.0, 0.31, 1.0, 5.0])
    learned(x).sum().backward()
    codes = (x / scale + zero_point).clamp(0, 15)
    # Inside: round(v) - v; outside: the distance of the last code from the zero point.
    inside = (x / scale + zero_point - codes).abs() == 0
    steps = torch.where(inside, (x / scale).round() - x / scale, codes - zero_point)
    torch.testing.assert_close(learned.logarithm.grad, steps.sum() * scale)


def test_an_interrupted_reconstruction_gives_the_same_bits(model, batches, tmp_path, monkeypatch):
    passes = (BlockReconstruction(iterations=6),)
    recipe = qt.Recipe("test", mapping_of("int4", "uint4"), passes)
    expected = qt.quantize(model, batches, recipe, progress=False).state_dict()
    learn = BlockReconstruction._learn
    count = []

    def stopping(self: BlockReconstruction, *args: object) -> None:
        count.append(1)
        if len(count) == 4:
            raise KeyboardInterrupt
        learn(self, *args)

    monkeypatch.setattr(BlockReconstruction, "_learn", stopping)
    with pytest.raises(KeyboardInterrupt):
        qt.quantize(model, batches, recipe, progress=False, resume=tmp_path)
    found = qt.quantize(model, batches, recipe, progress=False, resume=tmp_path).state_dict()
    assert len(count) == 4 + 3
    assert all(torch.equal(expected[key], found[key]) for key in expected)
