"""Steps of plans: transposed convolutions, layer norm, softmax, concatenation."""

from __future__ import annotations

import pytest
import torch
from test_compile import converted, images, plans, scripted
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit import _C
from qtoolkit.nn.base import QuantizedModule


def check_one_plan(q: nn.Module, x: Tensor, kinds: set[str]) -> nn.Module:
    """Compiles a network of quantized layers alone; the plan has these steps and the bits."""
    fast = qt.compile(q, x)
    assert len(plans(fast)) == 1
    assert not any(isinstance(module, QuantizedModule) for module in fast.modules())
    assert kinds <= {step.step for step in fast.plan.steps}
    assert torch.equal(fast(x), q(x))
    assert torch.equal(scripted(fast)(x), q(x))
    return fast


class Decoder(nn.Module):
    """Two transposed convolutions between others; the last layer's result is float32."""

    def __init__(self, groups: int, float_end: bool, **options: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 1, 1)
        self.up = nn.ConvTranspose2d(12, 12 if groups == 12 else 20, groups=groups, **options)
        self.mix = nn.Conv2d(self.up.out_channels, 6, 1)
        self.end = nn.ConvTranspose2d(6, 3, 4, 2, 1) if float_end else nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.end(torch.relu(self.mix(torch.relu(self.up(torch.relu(self.stem(x)))))))


OPTIONS = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": 4, "stride": 2, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    {"kernel_size": 3, "stride": 1, "padding": 1},
    {"kernel_size": 3, "stride": 3, "dilation": 2},
    {"kernel_size": 1, "stride": 3, "padding": 0},
    {"kernel_size": 5, "stride": 2, "padding": 4, "dilation": 3},
]


@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_transposed_convolutions(options, groups):
    torch.manual_seed(0)
    q = converted(Decoder(groups, float_end=groups == 1, **options), images(2, 9))
    fast = check_one_plan(q, images(2, 9), {"conv_transpose2d"})
    for count, size in [(1, 7), (3, 12), (2, 8)]:
        x = images(count, size, seed=count)
        assert torch.equal(fast(x), q(x))
        assert fast(x).stride() == q(x).stride()
    with pytest.raises(ValueError, match="takes 3 channels, got 4"):
        fast(images(1, 9, 4))


@pytest.mark.parametrize("path", ["reference", "portable", "avx2", "avx512vnni", "amx"])
def test_every_path_gives_the_bits_of_transposed_convolutions(path):
    if path not in _C.cpu_paths():
        pytest.skip(f"this CPU cannot run the {path} path")
    torch.manual_seed(1)
    q = converted(Decoder(2, True, kernel_size=4, stride=2, padding=1), images(2, 9), "tensorrt")
    expected = q(images(2, 9))
    _C.force_path(path)
    try:
        assert torch.equal(qt.compile(q, images(2, 9), tune=False)(images(2, 9)), expected)
        assert _C.last_path("conv2d") == path
    finally:
        _C.force_path(None)


def test_a_plan_file_gives_the_weight_of_a_transposed_convolution_back(tmp_path):
    torch.manual_seed(2)
    options = {"kernel_size": 5, "stride": 3, "padding": 2, "dilation": 2}
    q = converted(Decoder(2, True, **options), images(1, 8))
    fast = qt.compile(q, images(1, 8), tune=False)
    path = tmp_path / "decoder.qtplan"
    qt.save_plan(fast, path)
    (found,) = qt.load_plan(path)([images(1, 8)])
    assert torch.equal(found, q(images(1, 8)))
    up = next(m for m in q.modules() if isinstance(m, qt.nn.ConvTranspose2d))
    assert up.weight.numpy().tobytes() in path.read_bytes()


class Tokens(nn.Module):
    """What surrounds attention in a transformer."""

    def __init__(self, affine: bool, bias: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.first = nn.LayerNorm(32, eps=1e-6, elementwise_affine=affine, bias=bias)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.mix = nn.Linear(64, 8)
        if affine:
            nn.init.normal_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = x + self.down(nn.functional.gelu(self.up(self.first(x))))
        return self.mix(torch.cat([y, torch.softmax(x, -1)], -1))


@pytest.mark.parametrize("shape", [(3, 5, 6), (4, 6)], ids=str)
@pytest.mark.parametrize(("affine", "bias"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("mapping", ["x86", "tensorrt"])
def test_layer_norm_and_softmax(mapping, affine, bias, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    prepared = qt.prepare(
        Tokens(affine, bias).eval(), qt.get_default_qconfig_mapping(mapping), example_inputs=(x,)
    )
    qt.calibrate(prepared, [x], progress=False)
    q = qt.convert(prepared)
    fast = check_one_plan(q, x, {"layer_norm", "softmax", "cat"})
    y = torch.randn(7, *shape[1:])
    assert torch.equal(fast(y), q(y))


class Segments(nn.Module):
    """A softmax over the channels of images."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 1, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), 1))


def test_softmax_of_channels():
    torch.manual_seed(0)
    q = converted(Segments(), images(2, 9))
    check_one_plan(q, images(2, 9), {"softmax"})


class OtherDimensions(nn.Module):
    """Softmax and concatenation that are not along what a plan takes for channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)
        self.c = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cat([torch.softmax(self.a(x), 1), self.b(x[:, 1:])], 1))


def test_other_dimensions_run_between_plans():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    prepared = qt.prepare(OtherDimensions().eval(), None, example_inputs=(x,))
    qt.calibrate(prepared, [x], progress=False)
    q = qt.convert(prepared)
    fast = qt.compile(q, x)
    assert not {"cat", "softmax"} & {step.step for step in fast.plan.steps}
    assert torch.equal(fast(x), q(x))


@pytest.mark.parametrize("count", [1, 2])
def test_a_vision_transformer_takes_any_batch(count):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    sizes = {"patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    model = models.VisionTransformer(16, num_classes=5, **sizes)
    q = converted(model, images(count))
    fast = qt.compile(q, images(count))
    assert "layer_norm" in {step.step for step in fast.plan.steps}
    for batch in (1, 2, 3):
        assert torch.equal(fast(images(batch)), q(images(batch)))


class WithConstant(nn.Module):
    """A layer that reads a parameter, not the input, as for a table of relative positions."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) + self.bias(self.places).sum(0)


@pytest.mark.parametrize("count", [1, 3, 4])
def test_layers_of_parameters_are_plans_of_their_own(count):
    torch.manual_seed(0)
    x = torch.randn(count, 6)
    prepared = qt.prepare(WithConstant().eval(), None, example_inputs=(x,))
    qt.calibrate(prepared, [x], progress=False)
    q = qt.convert(prepared)
    fast = qt.compile(q, x)
    assert len(plans(fast)) == 2
    for batch in (1, 3, 5):
        y = torch.randn(batch, 6)
        assert torch.equal(fast(y), q(y))
