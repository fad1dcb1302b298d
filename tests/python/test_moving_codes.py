"""Networks whose layers move, pad, resize and average codes: what stays integer, and how well."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from networks import batches, settle, sqnr
from torch import Tensor, nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.nn import QuantizedModule


def conv(channels: int, out: int, **options) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, **options), nn.BatchNorm2d(out), nn.ReLU()
    )


class UNet(nn.Module):
    """Skip connections; sizes of the upsampled maps are computed in the graph."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.down1, self.down2 = conv(3, 8), conv(8, 16)
        self.up1, self.up2 = conv(24, 8), conv(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        if self.mode == "size":
            return functional.interpolate(x, size=like.shape[-2:])
        if self.mode == "bilinear":
            size = like.shape[2:]
            return functional.interpolate(x, size=size, mode="bilinear", align_corners=False)
        y = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        rows, columns = like.size(2) - y.size(2), like.size(3) - y.size(3)
        pads = [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2]
        return functional.pad(y, pads)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(functional.max_pool2d(a, 2))
        c = functional.max_pool2d(b, 2)
        c = self.up1(torch.cat([self.resize(c, b), torch.relu(b)[:, :8]], 1))
        return self.head(self.up2(torch.cat([self.resize(c, a), a], 1)))


class SuperResolution(nn.Module):
    """A global residual over nearest upsampling; the end in float, as such networks have it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 16, 3, padding=1, padding_mode="reflect")
        self.body = nn.Sequential(conv(16, 16), nn.PixelUnshuffle(2), conv(64, 64))
        self.up = nn.Sequential(nn.PixelShuffle(2), nn.Conv2d(16, 12, 3, padding="same"))
        self.tail = nn.Conv2d(3, 3, 4, padding="same")
        self.nearest = nn.Upsample(scale_factor=2)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.pixel_shuffle(self.up(self.body(self.head(x))), 2)
        return self.tail(y + self.nearest(x))


class Shuffle(nn.Module):
    """ShuffleNet's unit, and everything else that moves channels or pads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.branch = nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), nn.Conv2d(6, 6, 2, groups=6))
        self.shuffle = nn.ChannelShuffle(3)
        self.pad = nn.ReplicationPad2d(2)
        self.up = nn.UpsamplingBilinear2d(size=(7, 9))
        self.last = conv(12, 12)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        left, right = x.chunk(2, dim=1)
        x = torch.cat((left, torch.relu(self.branch(right))), 1)
        n, c, h, w = x.size()
        x = x.view(n, 2, c // 2, h, w)
        x = torch.transpose(x, 1, 2).contiguous()
        x = self.shuffle(x.view(n, -1, h, w))
        x = functional.pad(self.pad(x), (1, 1, 0, 0), mode="circular")
        x = functional.interpolate(self.up(x), (11, 13), mode="nearest-exact")
        x = self.last(x) * 1.0
        return self.fc(x.mean(3).sum(dim=-1))


NETWORKS = {
    "unet, nearest": (lambda: UNet("size"), 28),
    "unet, bilinear": (lambda: UNet("bilinear"), 28),
    "unet, factors and padding": (lambda: UNet("pad"), 28),
    "super-resolution": (SuperResolution, 28),
    "shuffle": (Shuffle, 22),
}
SHAPE = (2, 3, 22, 26)


@pytest.fixture(params=NETWORKS)
def network(request):
    make, least = NETWORKS[request.param]
    torch.manual_seed(0)
    return settle(make(), SHAPE), least


def convert(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


def test_nothing_stays_float(network):
    model, least = network
    data = batches(SHAPE)
    quantized = convert(model, data)
    assert not qt.explain(quantized).float_layers, qt.explain(quantized)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > least


def test_other_sizes_run_too(network):
    model, least = network
    data = batches(SHAPE)
    quantized = convert(model, data)
    x = torch.randn(1, 3, 30, 18, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert sqnr(model(x), quantized(x)) > least - 4


def test_script_copy_and_pickle_give_the_same_bits(network):
    model, _ = network
    data = batches(SHAPE)
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    again = qt.convert(pickle.loads(pickle.dumps(prepared)))
    quantized = qt.convert(prepared)
    expected = quantized(data[0])
    assert torch.equal(again(data[0]), expected)
    assert torch.equal(copy.deepcopy(quantized)(data[0]), expected)
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(data[0]), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(quantized), file)
    file.seek(0)
    assert torch.equal(torch.jit.load(file)(data[0]), expected)
    program = torch.export.export(quantized, (data[0],))
    assert torch.equal(program.module()(data[0]), expected)


def test_a_trained_network_converts_to_what_it_computes(network):
    model, _ = network
    data = batches(SHAPE)
    qat = qt.prepare_qat(model, example_inputs=(data[0],))
    optimizer = torch.optim.SGD(qat.parameters(), 1e-4)
    for x in data:
        qat(x).square().mean().backward()
        optimizer.step()
    qat.eval()
    quantized = qt.convert(qat)
    assert not qt.explain(quantized).float_layers
    with torch.no_grad():
        assert sqnr(qat(data[0]), quantized(data[0])) > 40


def kinds(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if isinstance(m, QuantizedModule)]


def test_shuffles_and_padding_become_layers():
    torch.manual_seed(0)
    quantized = convert(settle(Shuffle(), SHAPE), batches(SHAPE))
    found = kinds(quantized)
    assert found.count("ChannelShuffle") == 2
    assert found.count("Pad") == 3
    assert found.count("UpsampleBilinear2d") == 1
    assert found.count("UpsampleNearest2d") == 1
    assert {"Mean", "Sum"} <= set(found)


def test_a_bilinear_upsampling_keeps_the_scale_of_an_input_that_nothing_else_reads():
    torch.manual_seed(0)
    quantized = convert(settle(UNet("bilinear"), SHAPE), batches(SHAPE))
    ups = [m for m in quantized.modules() if isinstance(m, qt.nn.UpsampleBilinear2d)]
    assert len(ups) == 2
    assert torch.equal(ups[1].input_scale, ups[1].output_scale)


class Odd(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: functional.pad(x, (1, 1), value=2.0),
        lambda x: functional.interpolate(x, scale_factor=2, mode="bicubic"),
        lambda x: functional.interpolate(x, size=(9, 9), mode="bilinear", antialias=True),
        lambda x: functional.interpolate(x, size=x.shape[2]),
    ],
)
def test_what_adds_values_or_has_no_kernel_stays_float(between):
    model, data = Odd(between), batches(SHAPE)
    quantized = convert(model, data)
    assert len(qt.explain(quantized).float_layers) == 1
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25


def test_an_upsampling_of_volumes_stays_float():
    class Volume(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up = nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(torch.relu(self.conv(x)).unsqueeze(2))

    model, data = Volume(), batches(SHAPE)
    quantized = convert(model, data)
    with torch.no_grad():
        assert sqnr(model(data[0]), quantized(data[0])) > 25


def test_a_type_of_upsampling_is_kept_in_float_by_name():
    model = Odd(nn.Upsample(scale_factor=2, mode="bilinear"))
    mapping = qt.get_default_qconfig_mapping("x86").set_module_type(nn.Upsample, None)
    data = batches(SHAPE)
    prepared = qt.prepare(model, mapping, example_inputs=(data[0],))
    reasons = {layer.name: layer.reason for layer in qt.explain(prepared).float_layers}
    assert "qconfig" in reasons["between"]


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (qt.nn.functional.UpsampleNearest2d("nearest", [2.0, 1.5]), None),
        (qt.nn.functional.UpsampleBilinear2d("bilinear", [2.0, 1.5], False, True), None),
        (qt.nn.functional.UpsampleBilinear2d("bilinear", None, True), [9, 7]),
    ],
)
def test_an_upsampling_that_stays_float_is_scripted(layer, size):
    x = batches((2, 3, 5, 6), 1)[0]
    assert torch.equal(torch.jit.script(layer)(x, size), layer(x, size))
