"""Small networks and data that several test files share."""

from __future__ import annotations

from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt


class Block(nn.Module):
    """A residual block with two convolutions and a projection."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = (
            nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            if stride != 1 or channels != out
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """A residual network for 8x8 images with one channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 1, 1)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Kinds(nn.Module):
    """One of each kind of layer that is quantized, written in the ways that users write them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(16)
        self.relu6 = nn.ReLU6(inplace=True)
        self.grouped = nn.Conv2d(16, 24, 3, padding=2, dilation=2, groups=4)
        self.norm = nn.BatchNorm2d(40)
        self.pool = nn.AvgPool2d(2)
        self.same = nn.Conv2d(40, 32, 3, padding="same")
        self.drop = nn.Dropout(0.5)
        self.fc1 = nn.Linear(32, 20)
        self.fc2 = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = self.relu6(self.depthwise_bn(self.depthwise(x)))
        y = torch.cat([self.grouped(y), x], dim=1)
        y = functional.relu(self.norm(y))
        y = functional.max_pool2d(y, 3, 2, 1)
        y = self.same(self.pool(y))
        left, right = y.chunk(2, dim=1)
        y = torch.cat((right, left), 1)
        y = (y + y.permute(0, 1, 3, 2)).mean([2, 3])
        y = functional.dropout(y.view(y.size(0), -1), 0.5, self.training)
        return self.fc2(torch.relu(self.fc1(self.drop(y))))


def settle(model: nn.Module, shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """Random weights whose batch norms have seen data; in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            else:
                scale = (2 / parameter[0].numel()) ** 0.5
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        model.train()
        for _ in range(5):
            model(torch.randn(shape, generator=generator))
    return model.eval()


def quantize(
    model: nn.Module, *inputs: Tensor, mapping: qt.QConfigMapping | None = None
) -> nn.Module:
    """A float model as converted after calibration on its example inputs."""
    prepared = qt.prepare(model.eval(), mapping, inputs)
    with torch.no_grad():
        prepared(*inputs)
    return qt.convert(prepared)


def batches(shape: tuple[int, ...], count: int = 4, seed: int = 1) -> list[Tensor]:
    """Random inputs."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal-to-noise ratio in dB."""
    noise = (expected - actual).detach().double().square().sum()
    return float(10 * torch.log10(expected.detach().double().square().sum() / noise))


@lru_cache(maxsize=1)
def digits() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """scikit-learn's handwritten digits as training and test batches of (image, label)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    train = list(zip(images[:1440].split(48), labels[:1440].split(48)))
    return train, list(zip(images[1440:].split(100), labels[1440:].split(100)))


def train(model: nn.Module, epochs: int, rate: float) -> list[float]:
    """SGD on the digits with a rate that falls to zero; returns the losses."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    steps = epochs * len(digits()[0])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(epochs):
        for x, y in digits()[0]:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    return losses


@lru_cache(maxsize=1)
def trained() -> ResNet:
    """A ResNet trained on the digits; treat as read-only."""
    torch.manual_seed(0)
    model = ResNet()
    train(model, 6, 0.1)
    return model.eval()
