"""Changes in place that a graph does not show, and other ways in which users' code is special."""

from __future__ import annotations

import copy
import types
from types import SimpleNamespace

import pytest
import torch
from networks import batches, settle, sqnr
from test_user_models import check, conv, module, quantize, reasons
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt


class ChangesItsInput(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > -1e9:
            x.relu_()
        return x * 2


def test_an_uncaptured_child_that_changes_its_input():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.c(x)
        z = m.leaf(y)
        return m.d(y) + m.e(z)

    model = check(module(forward, c=conv(), d=conv(8), e=conv(8), leaf=ChangesItsInput()))
    assert "in place" in reasons(model)["(model)"]


def test_a_scripted_inplace_child():
    child = torch.jit.script(nn.ReLU(inplace=True))

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.c(x)
        m.child(y)
        return m.d(y)

    model = module(forward, c=conv(), d=conv(8), child=child).eval()
    data = batches((2, 3, 8, 8))
    assert sqnr(model(data[0]), quantize(model, data)(data[0])) > 25


def test_an_out_argument():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        torch.mul(x, 3.0, out=y)
        return m.d(m.c(y))

    check(module(forward, c=conv(), d=conv(8)))


def test_a_second_name_of_what_is_added_to():
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()
            self.d = conv(8)
            self.gate = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.c(x)
            w = y
            w += self.gate  # y changes too, which a gate of zero does not show
            return self.d(y)

    qat = qt.prepare_qat(Gated(), example_inputs=(torch.randn(2, 3, 8, 8),))
    qat(torch.randn(2, 3, 8, 8)).sum().backward()
    assert qat.gate.grad is not None


def test_numbers_that_are_added_to():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        height = x.shape[2]
        before = height
        height += 4
        return m.c(functional.interpolate(x, (height, before)))

    check(module(forward, c=conv()))


def test_a_forward_that_was_replaced_on_the_instance():
    model = module(lambda m, x: m.d(m.c(x)), c=conv(), d=conv(8))
    model.c.forward = types.MethodType(lambda self, x: nn.Conv2d.forward(self, x) * 10, model.c)
    assert reasons(check(model))["c"] == "its forward was replaced"


def test_keyword_calls_of_a_captured_part():
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, a: Tensor, b: Tensor | None = None, k: Tensor | None = None) -> Tensor:
            return self.c(a) if k is None else self.c(a + k)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.part(x, k=x) if x.sum() < 1e9 else x

    model = settle(module(forward, part=Part()), (2, 3, 8, 8))
    data = batches((2, 3, 8, 8))
    quantized = quantize(model, data)
    assert sqnr(model(data[0]), quantized(data[0])) > 25
    layers = qt.compare(model, quantized, data, progress=False).layers
    assert {layer.name for layer in layers} == {"part.c", "part.add"}
    assert all(layer.sqnr > 25 for layer in layers)


def test_keyword_call_of_a_layer_by_an_uncaptured_parent():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(input=x) if x.sum() < 1e9 else x

    model = settle(module(forward, c=conv()), (2, 3, 8, 8))
    quantized = quantize(model, batches((2, 3, 8, 8)))
    assert any(isinstance(m, qt.nn.Conv2d) for m in quantized.modules())


def test_export_of_an_argument_that_may_be_none(tmp_path):
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, x, mask=None):
            return self.c(x)

    data = batches((2, 3, 8, 8))
    report = qt.export.torchscript(quantize(Masked().eval(), data), tmp_path / "m.pt", (data[0],))
    assert report.verified
    assert report.warnings == []


def test_an_image_without_a_batch_stays_in_float():
    model = nn.Sequential(conv()).eval()
    x = torch.randn(3, 8, 8)
    quantized = quantize(model, [x])
    assert torch.equal(quantized(x), model(x))
    assert "3 dimensions" in reasons(quantized)["0"]


def test_rounding_of_a_folded_batch_norm_does_not_stop_capture():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.bn(m.c(x)).flatten(1).topk(500)[1]

    model = settle(module(forward, c=conv(), bn=nn.BatchNorm2d(8)), (4, 3, 16, 16))
    quantized = quantize(model, batches((4, 3, 16, 16)))
    assert any(isinstance(m, qt.nn.Conv2d) for m in quantized.modules())


def test_outputs_in_an_object():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()

        def forward(self, x: Tensor) -> SimpleNamespace:
            return SimpleNamespace(y=self.c(x), n=3)

    quantized = quantize(Model().eval(), batches((2, 3, 8, 8)))
    assert any(isinstance(m, qt.nn.Conv2d) for m in quantized.modules())


def test_dropout_that_is_always_on_stays_on():
    model = module(lambda m, x: functional.dropout(m.c(x), 0.5, True), c=conv()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert (quantize(model, [x])(x) == 0).float().mean() > 0.3


def test_a_view_as_another_dtype():
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(x).view(dtype=torch.int32).view(torch.float32)

    check(module(forward, c=conv()))


def test_a_model_that_counts_its_calls_is_prepared_clean():
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()
            self.register_buffer("n", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.n.add_(1)
            return self.c(x)

    model = Counting().eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = qt.prepare(copy.deepcopy(model), example_inputs=(x,))
    assert prepared.n == 0
    prepared(x)
    assert prepared.n == 1
    assert model.n == 0


def test_compare_says_which_layers_no_batch_reached():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.c = conv()
            self.d = conv()

        def forward(self, x: Tensor) -> Tensor:
            return self.c(x) if x.shape[0] > 2 else self.d(x)

    model = Branches().eval()
    big, small = torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)
    prepared = qt.prepare(model, example_inputs=(big,))
    qt.calibrate(prepared, [big], progress=False)
    layers = [m for m in prepared.modules() if isinstance(m, qt.observers.Observer)]
    if len(layers) > 1:
        qt.calibrate(prepared, [small], progress=False)
    quantized = qt.convert(prepared)
    result = qt.compare(model, quantized, [small], progress=False)
    measured = {layer.name: layer.sqnr for layer in result.layers}
    assert measured["c"] != measured["c"]  # NaN
    assert all(value > 25 for name, value in measured.items() if name != "c")


@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_of_a_layer_that_is_called_twice(assign):
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.c(functional.relu(m.c(x)))

    def make(seed: int) -> nn.Module:
        model = settle(module(forward, c=conv(8, 8)), (2, 8, 8, 8), seed)
        return qt.prepare_qat(model, example_inputs=(torch.randn(2, 8, 8, 8),))

    first, second = make(0), make(1)
    x = torch.randn(2, 8, 8, 8)
    first(x)
    second.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(first.eval()(x), second.eval()(x))
