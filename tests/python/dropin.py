"""Scripts for torch.ao.quantization, which run with qtoolkit.quantization as well: what they share.

A script is a function of the module that it imports, usually called ``tq``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qtoolkit.quantization as ours
from qtoolkit.nn.base import QuantizedModule

torch_ao = pytest.importorskip("torch.ao.quantization", reason="removed from this PyTorch")
FloatFunctional = torch.ao.nn.quantized.FloatFunctional

BOTH = pytest.mark.parametrize("tq", [torch_ao, ours], ids=["torch_ao", "qtoolkit"])

#: How far below torch.ao's result, in dB, ours may lie.
MARGIN = 0.5


def sqnr(real: torch.Tensor, approximate: torch.Tensor) -> float:
    """Signal to quantization noise in dB."""
    real, approximate = real.detach(), approximate.detach()
    noise = (real - approximate).square().sum()
    return float(10 * torch.log10(real.square().sum() / noise))


def images(seed: int, count: int = 8, size: int = 32) -> torch.Tensor:
    """Random images with some structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 4, size // 4, generator=generator)
    fine = torch.randn(count, 3, size, size, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=4) + 0.3 * fine


def quantized_layers(model: nn.Module) -> int:
    """How many layers with a weight compute on integers, of either library."""
    count = 0
    for module in model.modules():
        if isinstance(module, QuantizedModule):
            count += hasattr(module, "weight_scale")
        elif ".quantized" in type(module).__module__ and callable(getattr(module, "weight", None)):
            count += 1
    return count


def at_least_as_near(script: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Runs a script, which returns float and quantized outputs, with both modules."""
    theirs, mine = (sqnr(*script(tq)) for tq in (torch_ao, ours))
    assert theirs > 10, f"the script itself is broken: {theirs:.1f} dB with torch.ao"
    assert mine >= theirs - MARGIN, f"{mine:.2f} dB, torch.ao {theirs:.2f} dB"


class ConvBNReLU(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
    ):
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs, momentum=0.1),
            nn.ReLU(inplace=False),
        )


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expand: int):
        super().__init__()
        hidden = inputs * expand
        self.use_res_connect = stride == 1 and inputs == outputs
        layers: list[nn.Module] = []
        if expand != 1:
            layers.append(ConvBNReLU(inputs, hidden, 1))
        layers += [
            ConvBNReLU(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, momentum=0.1),
        ]
        self.conv = nn.Sequential(*layers)
        self.skip_add = FloatFunctional()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_res_connect:
            return self.skip_add.add(x, self.conv(x))
        return self.conv(x)


class MobileNet(nn.Module):
    """The network of the tutorial on static quantization in eager mode, made small."""

    def __init__(self, tq: Any, stubs: bool = True):
        super().__init__()
        self.features = nn.Sequential(
            ConvBNReLU(3, 8, stride=2),
            InvertedResidual(8, 8, 1, 1),
            InvertedResidual(8, 16, 2, 4),
            InvertedResidual(16, 16, 1, 4),
            ConvBNReLU(16, 32, 1),
        )
        self.quant = tq.QuantStub() if stubs else nn.Identity()
        self.dequant = tq.DeQuantStub() if stubs else nn.Identity()
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(32, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.quant(x)
        x = self.features(x)
        x = x.mean([2, 3])
        x = self.classifier(x)
        return self.dequant(x)

    def fuse_model(self, tq: Any, is_qat: bool = False) -> None:
        fuse_modules = tq.fuse_modules_qat if is_qat else tq.fuse_modules
        for m in self.modules():
            if type(m) is ConvBNReLU:
                fuse_modules(m, ["0", "1", "2"], inplace=True)
            if type(m) is InvertedResidual:
                for index in range(len(m.conv)):
                    if type(m.conv[index]) is nn.Conv2d:
                        fuse_modules(m.conv, [str(index), str(index + 1)], inplace=True)


def mobile_net(tq: Any, **kwargs: Any) -> MobileNet:
    """The same weights for each library, batch norms settled."""
    torch.manual_seed(0)
    model = MobileNet(tq, **kwargs)
    for seed in range(10):
        model(images(100 + seed))
    return model.eval()


def settled(model: nn.Module, size: int = 32) -> nn.Module:
    """A copy in evaluation mode whose batch norms have seen data."""
    model = copy.deepcopy(model).train()
    with torch.no_grad():
        for seed in range(10):
            model(images(100 + seed, size=size))
    return model.eval()
