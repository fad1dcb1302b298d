"""batch_norm_act against F.batch_norm, the activation, the observer and fake_quantize in turn."""

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from op_reference import PATHS, forced_path, seeded
from torch import Tensor

from qtoolkit import ops
from qtoolkit.observers import MovingAverageMinMaxObserver
from qtoolkit.qconfig import TensorSpec

LAST = torch.channels_last
# Odd numbers of channels, planes whose ends are no whole byte of the mask, more than one block of
# work, and every rank.
SHAPES = [
    (8, 16),
    (6, 5),
    (4, 3, 7),
    (4, 16, 7, 7),
    (8, 24, 5, 5),
    (3, 65, 3, 3),
    (2, 3, 33, 33),
    (2, 64, 40, 40),
    (2, 5, 3, 4, 5),
]
LAYOUTS = [
    *((shape, torch.contiguous_format) for shape in SHAPES),
    *((shape, LAST) for shape in SHAPES if len(shape) == 4),
    (SHAPES[-1], torch.channels_last_3d),
]


def values(shape: tuple[int, ...], memory_format=torch.contiguous_format, seed=0) -> Tensor:
    x = torch.randn(shape, generator=seeded(seed)) * 2 + 0.5
    return x.contiguous(memory_format=memory_format)


class Layer:
    """The arguments of one call, with running statistics and a range of their own."""

    def __init__(self, channels: int, *, affine=True, running=True, symmetric=False) -> None:
        self.weight = torch.rand(channels, generator=seeded(1)) * 2 - 0.5 if affine else None
        self.bias = torch.randn(channels, generator=seeded(2)) if affine else None
        self.running_mean = torch.randn(channels, generator=seeded(3)) if running else None
        self.running_var = torch.rand(channels, generator=seeded(4)) + 0.5 if running else None
        self.min_val, self.max_val = torch.tensor(math.inf), torch.tensor(-math.inf)
        self.scale, self.zero_point = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
        self.symmetric = symmetric
        self.codes = (-127, 127) if symmetric else (0, 255)

    def batch_norm(self) -> tuple[Tensor | None, ...]:
        return self.weight, self.bias, self.running_mean, self.running_var

    def state(self) -> list[Tensor]:
        return [self.min_val, self.max_val, self.scale, self.zero_point]

    def __call__(self, x: Tensor, residual=None, *, observe=0.01, **options) -> Tensor:
        return self.outputs(x, residual, observe=observe, **options)[0]

    def outputs(self, x: Tensor, residual=None, *, observe=0.01, **options) -> tuple[Tensor, ...]:
        return ops.batch_norm_act(
            x, *self.batch_norm(), residual, **self.quantization(observe), **options
        )

    def quantization(self, observe: float) -> dict[str, object]:
        return {
            "min_val": self.min_val,
            "max_val": self.max_val,
            "scale": self.scale,
            "zero_point": self.zero_point,
            "averaging_constant": observe,
            "symmetric": self.symmetric,
            "quant_min": self.codes[0],
            "quant_max": self.codes[1],
        }

    def unquantized(self, x: Tensor, residual=None, **options) -> Tensor:
        """Without fake-quantize, on copies of the running statistics."""
        running = [None if t is None else t.clone() for t in self.batch_norm()[2:]]
        return ops.batch_norm_act(x, self.weight, self.bias, *running, residual, **options)[0]


def composition(x, weight, bias, mean, var, residual, *, training, relu, upper) -> Tensor:
    z = F.batch_norm(x, mean, var, weight, bias, training, 0.1, 1e-5)
    z = z if residual is None else z + residual
    if not relu:
        return z
    return torch.relu(z) if upper is None else F.hardtanh(z, 0.0, upper)


def bits_of(mask: Tensor, like: Tensor) -> Tensor:
    """The mask as booleans in the shape and layout of `like`."""
    bits = (mask[:, None] >> torch.arange(8)) & 1
    result = torch.empty_like(like)
    flat = torch.as_strided(result, (like.numel(),), (1,))
    flat.copy_(bits.flatten()[: like.numel()])
    return result.bool()


def leaves_of(*tensors: Tensor | None) -> list[Tensor | None]:
    return [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format)
        .requires_grad_() for t in tensors
    ]  # fmt: skip


ACTIVATIONS = [(False, None), (True, None), (True, 1.5)]


@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_without_quantization_it_is_torchs(shape, memory_format, with_residual, training):
    """The sums are in double here and partly in float there: of values up to 10, a few units in
    the last place, 1e-6 each, which an added residual can cancel to any smaller result."""
    for relu, upper in ACTIVATIONS:
        layer, other = Layer(shape[1]), Layer(shape[1])
        residual = values(shape, memory_format, 9) if with_residual else None
        given = values(shape, memory_format), layer.weight, layer.bias, residual
        x, weight, bias, r = leaves_of(*given)
        y, mean, invstd, mask = ops.batch_norm_act(
            x, weight, bias, *layer.batch_norm()[2:], r, training=training, relu=relu, upper=upper
        )
        x2, weight2, bias2, r2 = leaves_of(*given)
        expected = composition(
            x2, weight2, bias2, *other.batch_norm()[2:], r2, training=training, relu=relu,
            upper=upper,
        )  # fmt: skip
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5)
        assert y.stride() == x.stride()
        assert [t.requires_grad for t in (mean, invstd, mask)] == [False] * 3
        torch.testing.assert_close(layer.running_mean, other.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var, other.running_var, rtol=1e-6, atol=1e-6)

        grad = values(shape, memory_format, 7)
        leaves = [t for t in (x, weight, bias, r) if t is not None]
        leaves2 = [t for t in (x2, weight2, bias2, r2) if t is not None]
        gradients = torch.autograd.grad(y, leaves, grad)
        expected_gradients = torch.autograd.grad(expected, leaves2, grad)
        for actual, wanted in zip(gradients, expected_gradients, strict=True):
            size = float(wanted.abs().max())
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=3e-6 * size)
        assert gradients[0].stride() == x.stride()


@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize(("training", "symmetric"), [(True, False), (True, True), (False, False)])
def test_range_codes_and_mask_are_bit_for_bit_the_observers(
    shape, memory_format, with_residual, training, symmetric
):
    for relu, upper in ACTIVATIONS:
        layer = Layer(shape[1], symmetric=symmetric)
        spec = TensorSpec(
            format="int8" if symmetric else "uint8", symmetric=symmetric, observer="moving_average"
        )
        observer = MovingAverageMinMaxObserver(spec, averaging_constant=0.1)
        for batch in range(4):
            x = values(shape, memory_format, batch) * (batch + 1)
            residual = values(shape, memory_format, 90 + batch) if with_residual else None
            options = {"training": training, "relu": relu, "upper": upper}
            plain = layer.unquantized(x, residual, **options)
            y, *_, mask = layer.outputs(x, residual, observe=0.1, **options)
            observer(plain)
            s, z = observer.calculate_qparams()
            assert torch.equal(layer.min_val, observer.min_val), batch
            assert torch.equal(layer.max_val, observer.max_val)
            assert torch.equal(layer.scale, s)
            assert torch.equal(layer.zero_point, z)
            assert torch.equal(y, ops.fake_quantize_per_tensor(plain, s, z, *layer.codes))
            code = torch.round(plain * (1.0 / s)) + z
            passes = (code >= layer.codes[0]) & (code <= layer.codes[1])
            if relu:
                passes &= (plain > 0) & (plain < (upper or math.inf))
            assert mask.numel() == (x.numel() + 7) // 8
            assert torch.equal(bits_of(mask, x), passes)


@pytest.mark.parametrize(("shape", "memory_format"), LAYOUTS, ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_gradient_passes_where_the_mask_says(shape, memory_format, with_residual, training):
    """Against the gradient of the batch norm alone in float64, of the masked gradient."""
    layer = Layer(shape[1])
    residual = values(shape, memory_format, 9) if with_residual else None
    leaves = leaves_of(values(shape, memory_format), layer.weight, layer.bias, residual)
    x, layer.weight, layer.bias, r = leaves
    y, *_, mask = layer.outputs(x, r, training=training, relu=True, upper=2.0)
    grad = values(shape, memory_format, 5)
    given = [t for t in leaves if t is not None]
    actual = torch.autograd.grad(y, given, grad)

    dz = torch.where(bits_of(mask, x), grad, 0.0)
    doubles = [t.detach().double().requires_grad_() for t in given]
    fresh = Layer(shape[1])
    running = [t.double() for t in fresh.batch_norm()[2:]]
    z = F.batch_norm(doubles[0], *running, *doubles[1:3], training, 0.1, 1e-5)
    z = z + doubles[3] if with_residual else z
    expected = torch.autograd.grad(z, doubles, dz.double())
    for got, wanted in zip(actual, expected, strict=True):
        # One rounding for each of the four operations on an element.
        size = float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=1e-6, atol=1e-6 * size)
    if with_residual:
        assert torch.equal(actual[3], dz)
        assert actual[3].stride() == x.stride()


def test_no_affine_and_no_running_statistics():
    x, r = values((4, 6, 5, 5)), values((4, 6, 5, 5), seed=3)
    layer = Layer(6, affine=False, running=False)
    leaf, residual = leaves_of(x, r)
    y = layer.unquantized(leaf, residual)
    other, other_residual = leaves_of(x, r)
    expected = F.batch_norm(other, None, None, training=True) + other_residual
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    grad = values((4, 6, 5, 5), seed=7)
    for a, b in zip(
        torch.autograd.grad(y, (leaf, residual), grad),
        torch.autograd.grad(expected, (other, other_residual), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_large_mean_costs_no_accuracy():
    """Sums of squares in float would lose the variance."""
    x = values((8, 16, 9, 9), LAST) + 3000.0
    _, mean, invstd, _ = ops.batch_norm_act(x, *[None] * 5)
    exact = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean.double(), exact.mean(1), rtol=1e-7, atol=0)
    expected = 1 / torch.sqrt(exact.var(1, unbiased=False) + 1e-5)
    torch.testing.assert_close(invstd.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "residual", "frozen"])
def test_a_batch_that_is_not_finite_leaves_the_range(bad, where):
    layer = Layer(4)
    x, r = values((3, 4, 5, 5)), values((3, 4, 5, 5), seed=3)
    layer(x, r)
    before = [t.clone() for t in layer.state()]
    (r if where == "residual" else x)[1, 2, 3, 4] = bad
    layer(x, r if where == "residual" else None, training=where != "frozen")
    assert all(map(torch.equal, layer.state(), before))
    assert before[0] < before[1]


def test_without_any_range_it_is_not_quantized():
    layer = Layer(4)
    x = values((3, 4, 5, 5))
    assert torch.equal(layer(x, observe=0.0, training=False), layer.unquantized(x, training=False))
    x[0, 0, 0, 0] = math.inf
    assert torch.isinf(layer.min_val)
    assert torch.equal(layer(x, training=False, relu=True), layer.unquantized(
        x, training=False, relu=True
    ))  # fmt: skip
    assert torch.isinf(layer.min_val)


def test_a_frozen_range_is_used_as_it_is():
    layer = Layer(4)
    layer.scale.fill_(0.02)
    layer.zero_point.fill_(7)
    x = values((3, 4, 5, 5))
    plain = layer.unquantized(x)
    y = ops.batch_norm_act(
        x, *layer.batch_norm(), scale=layer.scale, zero_point=layer.zero_point
    )[0]  # fmt: skip
    expected = ops.fake_quantize_per_tensor(plain, layer.scale, layer.zero_point, 0, 255)
    assert torch.equal(y, expected)
    assert (float(layer.scale), int(layer.zero_point)) == (pytest.approx(0.02), 7)


def step_of(layer: Layer, x: Tensor, residual: Tensor | None) -> list[Tensor]:
    leaves = leaves_of(x, layer.weight, layer.bias, residual)
    leaf, layer.weight, layer.bias, r = leaves
    outputs = layer.outputs(leaf, r, relu=True)
    given = [t for t in leaves if t is not None]
    grad = values(tuple(x.shape), seed=5)
    return [*outputs, *torch.autograd.grad(outputs[0], given, grad), *layer.state()]


@contextmanager
def threads(count: int):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("with_residual", [False, True])
def test_the_number_of_threads_does_not_matter(memory_format, with_residual):
    x = values((16, 24, 28, 28), memory_format)
    r = values((16, 24, 28, 28), memory_format, 3) if with_residual else None
    with threads(1):
        alone = step_of(Layer(24), x, r)
    with threads(2):
        together = step_of(Layer(24), x, r)
    assert all(map(torch.equal, alone, together))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_paths_agree(path, memory_format):
    x, r = values((2, 18, 9, 9), memory_format), values((2, 18, 9, 9), memory_format, 3)
    expected = step_of(Layer(18), x, r)
    with forced_path("batch_norm_gradient", path):
        assert all(map(torch.equal, step_of(Layer(18), x, r), expected))


def test_empty_batches_are_normalized_by_running_statistics_only():
    layer = Layer(4)
    assert layer(torch.empty(0, 4, 3, 3), training=False).shape == (0, 4, 3, 3)
    assert torch.isinf(layer.min_val)


def call(x=None, **change: object) -> object:
    layer = Layer(4)
    arguments: dict[str, object] = {
        "weight": layer.weight,
        "bias": layer.bias,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
        "min_val": layer.min_val,
        "max_val": layer.max_val,
        "scale": layer.scale,
        "zero_point": layer.zero_point,
        "averaging_constant": 0.1,
    }
    return ops.batch_norm_act(torch.ones(2, 4, 3) if x is None else x, **{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.ones(4)}, ValueError, r"x must be \[N, C\]"),
        ({"x": torch.ones(2, 4, dtype=torch.int8)}, TypeError, "x must be float32"),
        ({"x": torch.ones(1, 4)}, ValueError, "more than one value for each channel"),
        ({"x": torch.empty(0, 4)}, ValueError, "more than one value for each channel"),
        ({"weight": torch.ones(3)}, ValueError, "weight must hold one element for each of 4"),
        ({"bias": torch.ones(4).half()}, TypeError, "bias must be float32"),
        ({"running_var": None}, ValueError, "must both be given"),
        ({"running_mean": None, "running_var": None, "training": False}, ValueError, "are needed"),
        ({"residual": torch.ones(2, 4, 1)}, ValueError, "residual must have the shape of x"),
        ({"residual": torch.ones(2, 4, 3).int()}, TypeError, "residual must be float32"),
        ({"upper": 6.0}, ValueError, "goes with relu=True"),
        ({"relu": True, "upper": 0.0}, ValueError, "upper must be positive"),
        ({"averaging_constant": 1.5}, ValueError, "averaging_constant must lie in"),
        ({"zero_point": None}, ValueError, "scale and zero_point must both"),
        ({"min_val": None}, ValueError, "min_val and max_val must both"),
        ({"min_val": None, "max_val": None}, ValueError, "are needed where averaging_constant"),
        ({"scale": torch.ones(4)}, ValueError, "must hold one element"),
        ({"max_val": torch.ones(2)}, ValueError, "max_val must hold one element"),
        ({"quant_min": -1}, ValueError, "quant_min and quant_max must satisfy"),
        (
            {"averaging_constant": 0.0, "min_val": None, "max_val": None,
             "scale": torch.tensor(-1.0)}, ValueError, "scale must be positive",
        ),
        (
            {"averaging_constant": 0.0, "min_val": None, "max_val": None,
             "scale": torch.tensor(1e-40)}, ValueError, "inverse overflows",
        ),
    ],
)  # fmt: skip
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        call(**change)


def test_backward_checks_its_arguments():
    x, channel = torch.ones(2, 4, 3), torch.ones(4)
    backward = torch.ops.qtoolkit.batch_norm_act_backward
    every = [True] * 4
    with pytest.raises(ValueError, match="grad must have the shape of x"):
        backward(x[:1], x, None, channel, channel, torch.ones(3).byte(), True, every)
    with pytest.raises(ValueError, match="mask must hold 3 bytes"):
        backward(x, x, None, channel, channel, torch.ones(4).byte(), True, every)
    with pytest.raises(TypeError, match="mask must be uint8"):
        backward(x, x, None, channel, channel, torch.ones(3), True, every)
    with pytest.raises(ValueError, match="mean must hold one element"):
        backward(x, x, None, channel[:2], channel, torch.ones(3).byte(), True, every)
