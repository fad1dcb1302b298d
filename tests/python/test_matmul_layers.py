"""Attention whose products of activations are quantized by prepare and convert."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import batches, sqnr
from torch import Tensor, nn

import qtoolkit as qt


class Attention(nn.Module):
    """Attention written out, in one of the ways that users write products."""

    def __init__(self, way: str = "operator", width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.way, self.heads = way, heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def split(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        x = x.view(b, n, self.heads, width // self.heads).transpose(1, 2)
        return x.reshape(b * self.heads, n, -1) if self.way == "bmm" else x

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.way == "operator":
            return a @ b
        if self.way == "bmm":
            return torch.bmm(a, b)
        return torch.matmul(a, b) if self.way == "function" else a.matmul(b)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = torch.softmax(self.product(q, k.transpose(-2, -1)) * 0.35, dim=-1)
        y = self.product(weights, v)
        y = y.view(x.size(0), self.heads, x.size(1), -1).transpose(1, 2)
        return self.out(y.reshape(x.shape))


def attention(way: str = "operator") -> tuple[Attention, list[Tensor]]:
    torch.manual_seed(0)
    return Attention(way).eval(), batches((3, 12, 32))


def quantize(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def products(model: nn.Module) -> list[qt.nn.Matmul]:
    return [module for module in model.modules() if isinstance(module, qt.nn.Matmul)]


@pytest.mark.parametrize("way", ["operator", "function", "method", "bmm"])
def test_attentions_products_compute_on_codes(way):
    model, data = attention(way)
    quantized = quantize(model, data)
    assert len(products(quantized)) == 2
    kinds = {layer.kind: layer.format for layer in qt.explain(quantized).layers}
    assert kinds["Matmul"].startswith("uint8 x uint8 -> ")
    assert sqnr(model(data[1]), quantized(data[1])) > 28
    x = torch.randn(2, 7, 32)  # of other sizes
    assert sqnr(model(x), quantized(x)) > 25


def test_each_product_is_the_operator():
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return (a @ b).relu()

    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 16), torch.randn(16, 3)
    prepared = qt.prepare(Product(), example_inputs=(a, b))
    qt.calibrate(prepared, [(a, b)], progress=False)
    quantized = qt.convert(prepared)
    (layer,) = products(quantized)
    assert layer.kernel == "conv2d"
    codes = [
        qt.ops.quantize_per_tensor(x, scale, zero_point, 0, 255)
        for x, scale, zero_point in (
            (a, layer.a_scale, layer.a_zero_point),
            (b, layer.b_scale, layer.b_zero_point),
        )
    ]
    floats = [
        qt.ops.dequantize_per_tensor(q, scale, zero_point)
        for q, scale, zero_point in (
            (codes[0], layer.a_scale, layer.a_zero_point),
            (codes[1], layer.b_scale, layer.b_zero_point),
        )
    ]
    y = layer(*codes)
    if layer.output_scale is not None:
        y = qt.ops.dequantize_per_tensor(y, layer.output_scale, layer.output_zero_point)
    assert sqnr(floats[0] @ floats[1], y) > 35
    assert sqnr((a @ b).relu(), quantized(a, b)) > 30


def test_a_product_that_is_read_in_float_gives_float():
    class Scores(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.cumsum(a @ b, -1)

    a, b = torch.randn(4, 8), torch.randn(8, 6)
    prepared = qt.prepare(Scores(), example_inputs=(a, b))
    qt.calibrate(prepared, [(a, b)], progress=False)
    (layer,) = products(qt.convert(prepared))
    assert layer.output_scale is None
    assert layer.formats() == "uint8 x uint8 -> float32"


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda m, a, b: a @ m.weight, [(4, 8), (8,)]),  # a parameter
        (lambda m, a, b: a @ b, [(4, 8), (8,)]),  # a vector
        (lambda m, a, b: a @ b, [(2, 33026), (33026, 2)]),  # too many products
        (lambda m, a, b: torch.matmul(a, other=b), [(4, 8), (8, 3)]),
    ],
    ids=["parameter", "vector", "long", "keyword"],
)
def test_what_has_no_kernel_stays_in_float(function, shapes):
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 5))
            self.fc = nn.Linear(3, 3)

        def forward(self, a: Tensor, b: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            return function(self, a, b), self.fc(x)

    inputs = (torch.randn(shapes[0]), torch.randn(shapes[1]), torch.randn(2, 3))
    model = Product()
    prepared = qt.prepare(model, example_inputs=inputs)
    qt.calibrate(prepared, [inputs], progress=False)
    quantized = qt.convert(prepared)
    assert products(quantized) == []
    assert torch.equal(quantized(*inputs)[0], model(*inputs)[0])


def test_names_and_types_keep_it_in_float():
    model, data = attention()
    mapping = qt.get_default_qconfig_mapping("x86").set_module_type("matmul", None)
    prepared = qt.prepare(model, mapping, (data[0],))
    qt.calibrate(prepared, data, progress=False)
    quantized = qt.convert(prepared)
    assert products(quantized) == []
    assert any("qconfig keeps it" in layer.reason for layer in qt.explain(quantized).float_layers)


@pytest.mark.parametrize("target", ["x86", "qnnpack", "tensorrt"])
def test_targets(target):
    model, data = attention()
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping(target), (data[0],))
    qt.calibrate(prepared, data, progress=False)
    quantized = qt.convert(prepared)
    assert len(products(quantized)) == 2
    assert sqnr(model(data[1]), quantized(data[1])) > 22


def test_it_trains_and_converts():
    model, data = attention()
    qat = qt.prepare_qat(model.train(), example_inputs=(data[0],))
    optimizer = torch.optim.SGD(qat.parameters(), 0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (qat(data[0]) - data[1]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    quantized = qt.convert(qat.eval())
    assert len(products(quantized)) == 2
    assert sqnr(qat(data[0]), quantized(data[0])) > 35


def test_copies_pickles_and_scripts_give_the_same_bits(tmp_path):
    model, data = attention()
    quantized = quantize(model, data)
    expected = quantized(data[1])
    for other in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(other(data[1]), expected)
    qt.export.torchscript(quantized, tmp_path / "m.pt", (data[0],))
    assert torch.equal(torch.jit.load(tmp_path / "m.pt")(data[1]), expected)
    compiled = qt.compile(quantized, example_inputs=(data[0],))
    assert torch.equal(compiled(data[0]), quantized(data[0]))
