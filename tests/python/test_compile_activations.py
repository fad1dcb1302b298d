"""Tables and products inside plans."""

from __future__ import annotations

import pytest
import torch
from networks import batches, settle
from test_compile import converted, images, plans, scripted
from torch import Tensor, nn
from torch.nn import functional as F

import qtoolkit as qt
from qtoolkit.nn.base import QuantizedModule


class Gated(nn.Module):
    """Inverted residuals with squeeze-and-excitation; products of whole images, too."""

    def __init__(self, gate_first: bool) -> None:
        super().__init__()
        self.gate_first = gate_first
        self.stem = nn.Conv2d(3, 24, 3, 2, 1)
        self.depthwise = nn.Conv2d(24, 24, 5, 1, 2, groups=24)
        self.squeeze = nn.Conv2d(24, 8, 1)
        self.excite = nn.Conv2d(8, 24, 1)
        self.after = nn.Conv2d(24, 24, 3, 1, 1)
        self.project = nn.Conv2d(24, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.stem(x))
        y = F.silu(self.depthwise(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        y = self.after(gate * y if self.gate_first else y * gate)
        y = self.project(torch.relu(torch.tanh(y) * x))
        return self.fc(F.gelu(y).mean((2, 3)))


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize("mapping", ["x86", "tensorrt"])
def test_tables_and_gates_are_steps_of_one_plan(gate_first, mapping):
    model = settle(Gated(gate_first), (4, 3, 20, 20))
    q = converted(model, images(), mapping)
    assert not qt.explain(q).float_layers
    fast = qt.compile(q, images())
    assert len(plans(fast)) == 1
    assert not any(isinstance(module, QuantizedModule) for module in fast.modules())
    kinds = {step.step for step in fast.plan.steps}
    assert {"lookup", "mul"} <= kinds
    for count, size in [(2, 16), (1, 16), (5, 33), (3, 2)]:
        x = images(count, size, seed=count)
        assert torch.equal(fast(x), q(x))
        assert torch.equal(scripted(fast)(x), q(x))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(fast(images(5, 40)), q(images(5, 40)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0"])
def test_torchvision_networks_are_one_plan(name):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    q = converted(models.get_model(name, weights=None, num_classes=10), images(2, 32))
    assert not qt.explain(q).float_layers
    fast = qt.compile(q, images(2, 32), tune=False)
    assert len(plans(fast)) == 1
    assert not any(isinstance(module, QuantizedModule) for module in fast.modules())
    assert torch.equal(fast(images(1, 64)), q(images(1, 64)))


def test_other_broadcast_products_run_between_plans():
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, (3, 16))
            self.c = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x) * self.b(x))

    data = batches((2, 3, 16, 16))
    q = converted(settle(Rows(), (2, 3, 16, 16)), data[0])
    fast = qt.compile(q, data[0])
    assert torch.equal(fast(data[1]), q(data[1]))
    assert any(isinstance(module, qt.nn.Mul) for module in fast.modules())
