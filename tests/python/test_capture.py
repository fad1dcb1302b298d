"""Graph capture: what cannot be traced stays float, the rest is quantized."""

from __future__ import annotations

import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit.graph.capture import Capture


class DataDependent(nn.Module):
    """Cannot be traced: a branch depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 100:
            return x
        return self.last(self.inner(x))


class Outer(nn.Module):
    """Can be traced around one child that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = DataDependent()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(torch.relu(self.first(x))).mean((2, 3)))


def quantize(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def test_an_untraceable_child_keeps_its_forward_and_its_children_are_quantized():
    model = settle(Outer(), (4, 3, 8, 8))
    data = batches((4, 3, 8, 8))
    quantized = quantize(model, data)
    sources = {m.source for m in quantized.modules() if isinstance(m, qt.nn.Conv2d)}
    assert sources == {"first", "middle.inner.0", "middle.last"}
    assert isinstance(quantized.middle, DataDependent)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 20
    (entry,) = qt.explain(quantized).float_layers
    assert entry.name == "middle"
    assert "TraceError" in entry.reason
    assert "test_capture.py:" in entry.reason


def test_an_untraceable_model_still_has_its_children_quantized():
    model = settle(DataDependent(), (4, 8, 8, 8))
    data = batches((4, 8, 8, 8))
    quantized = quantize(model, data)
    assert type(quantized) is DataDependent
    assert any(isinstance(m, qt.nn.Conv2d) for m in quantized.modules())
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 20
    result = qt.compare(model, quantized, data, progress=False)
    assert {layer.name for layer in result.layers} == {"inner.0", "last"}
    assert all(layer.sqnr > 20 for layer in result.layers)


def test_a_trace_that_computes_something_else_is_not_used():
    class Tricky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            # A tracer's stand-in for a tensor is no Tensor, and takes the other branch.
            return self.conv(x) if isinstance(x, Tensor) else self.conv(x) + 1

    data = batches((2, 3, 4, 4))
    model = settle(Tricky(), (2, 3, 4, 4))
    capture = Capture(model, (data[0],))
    assert torch.equal(capture.model(data[0]), model(data[0]))
    assert capture.uncaptured[0].reason.startswith("the traced graph computes something else")
    assert sqnr(model(data[0]), quantize(model, data)(data[0])) > 25


def test_a_parent_that_reads_its_childs_weight_still_works():
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 1e9:
                return x
            return nn.functional.linear(x, self.fc.weight)

    model = Reader().eval()
    x = torch.randn(3, 4)
    quantized = quantize(model, [x])
    assert torch.equal(quantized(x), model(x))
    assert qt.explain(quantized).float_layers


def test_modules_keep_their_names():
    model = settle(Outer(), (4, 3, 8, 8))
    prepared = qt.prepare(model, example_inputs=(torch.randn(1, 3, 8, 8),))
    names = {name for name, _ in prepared.named_modules()}
    assert {"first", "middle", "middle.inner", "middle.last", "head"} <= names


def test_functional_dropout_follows_the_mode():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, self.training)

    qat = qt.prepare_qat(Net(), example_inputs=(torch.randn(2, 4),))
    x = torch.randn(64, 4)
    assert (qat(x) == 0).float().mean() > 0.2
    assert not (qat.eval()(x) == 0).any()


def test_explain_lists_every_layer_that_has_no_integer_kernel():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)
            self.up = nn.Upsample(scale_factor=2, mode="bicubic")
            self.norm = nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.up(self.conv(x)))
            return torch.sigmoid(x.reshape(x.shape[0], -1))

    data = batches((2, 3, 8, 8))
    quantized = quantize(settle(Mixed(), (2, 3, 8, 8)), data)
    reasons = {layer.name: layer.reason for layer in qt.explain(quantized).float_layers}
    assert reasons == {
        "up": "no integer kernel for Upsample",
        "norm": "no integer kernel for GroupNorm",
        "sigmoid": "only float layers use its output",
    }
