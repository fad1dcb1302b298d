"""The CUDA operators give the CPU operators' bits, and the same bits every time.

Sums over a tensor are added in another order than on the CPU, in double: what depends on them
(gradients of learned parameters, batch statistics) agrees to float32 rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_reference import scale, seeded, zero_point
from torch import Tensor

from qtoolkit import ops

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false"
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAST = torch.channels_last
SHAPES = [(), (1,), (7,), (1000,), (1_000_003,), (2, 3, 5, 7), (4, 64, 9, 9), (3, 1, 40), (0, 4)]
RANGES = [(0, 255, 128), (-128, 127, 0), (-127, 127, 0), (0, 15, 3), (-8, 7, -1)]
# Channels side by side and apart, in whole 16-byte words and not, one tile of a warp and many.
CHANNEL_CASES = [
    ((4, 33, 5, 6), 0, torch.contiguous_format),
    ((4, 33, 5, 6), 1, torch.contiguous_format),
    ((4, 33, 5, 6), 1, LAST),
    ((4, 33, 5, 6), 2, LAST),
    ((4, 33, 5, 6), -1, torch.contiguous_format),
    ((6, 64, 8, 8), 1, torch.contiguous_format),
    ((6, 64, 8, 8), 1, LAST),
    ((3, 96, 7, 5), 1, LAST),
    ((2, 3, 41, 41), 1, LAST),
    ((2, 3, 41, 41), 1, torch.contiguous_format),
    ((48, 640), 0, torch.contiguous_format),
    ((300, 1000), 1, torch.contiguous_format),
    ((2, 5, 3, 4, 8), 1, torch.channels_last_3d),
    ((70, 1, 9), 1, torch.contiguous_format),
    ((0, 8, 3), 1, torch.contiguous_format),
]
SPECIAL = torch.tensor(
    [
        *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45),
        *(3.4028235e38, -3.4028235e38, 1e10, -1e10, 0.125, -0.125, 0.375, 0.625),
    ]
)


def values(shape: tuple[int, ...], special: bool = True, seed: int = 0) -> Tensor:
    """Random values; some of them, if `special`, are not finite, huge, tiny or exact ties."""
    x = torch.randn(shape, generator=seeded(seed)) * 20
    if special:
        chosen = SPECIAL[torch.randint(len(SPECIAL), shape, generator=seeded(1))]
        x = torch.where(torch.rand(shape, generator=seeded(2)) < 0.2, chosen, x)
    return x


def to_gpu(value: Any) -> Any:
    return value.cuda() if isinstance(value, Tensor) else value


def both(function: Callable[..., Any], *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The tensors that function(*args) returns on the GPU, brought back, and on the CPU."""
    actual, expected = function(*map(to_gpu, args)), function(*args)
    actual = (actual,) if isinstance(actual, Tensor) else tuple(actual)
    assert all(tensor.is_cuda for tensor in actual)
    return tuple(tensor.cpu() for tensor in actual), (
        (expected,) if isinstance(expected, Tensor) else tuple(expected)
    )


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    """The bits, but for those of a 16-bit NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.numel() <= 1 or actual.stride() == expected.stride()
    if expected.dtype in (torch.float16, torch.bfloat16):
        nan = expected.isnan()
        assert torch.equal(actual.isnan(), nan)
        actual, expected = actual[~nan].view(torch.int16), expected[~nan].view(torch.int16)
    elif expected.dtype == torch.float32:
        actual, expected = actual.view(torch.int32), expected.view(torch.int32)
    return torch.equal(actual, expected)


def check_bits(function: Callable[..., Any], *args: Any) -> None:
    for actual, expected in zip(*both(function, *args), strict=True):
        assert same_bits(actual, expected)


def with_gradient(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """function(x, …) and the gradient of x for a fixed gradient of the output."""

    def call(x: Tensor, grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = function(leaf, *rest)
        y.backward(grad)
        return y.detach(), leaf.grad

    return call


def check_fake_quantize(function: Callable[..., Tensor], x: Tensor, *qparams: Tensor) -> None:
    grad = torch.randn(x.shape, generator=seeded(3)).to(x.dtype)
    check_bits(with_gradient(function), x, grad, *qparams)


def channel_qparams(shape: tuple[int, ...], positive: bool = False) -> tuple[Tensor, Tensor]:
    s = torch.rand(shape, generator=seeded(4)) * 0.3 + 0.01
    low = 0 if positive else -20
    return s, torch.randint(low, 20, shape, generator=seeded(5)).int()


# --- straight-through ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("quant_min", "quant_max", "zp"), RANGES)
def test_fake_quantize_per_tensor(shape, quant_min, quant_max, zp):
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_tensor(x, s, z, quant_min, quant_max),
        values(shape),
        scale(0.25),
        zero_point(zp),
    )


@pytest.mark.parametrize("s", [1e-40, 1e-30, 0.037, 3e38])
def test_fake_quantize_with_extreme_scales(s):
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_tensor(x, s, z, 0, 255),
        values((5000,)),
        scale(s),
        zero_point(100),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 8])
def test_fake_quantize_of_unaligned_memory(offset, dtype):
    check_bits(
        lambda x, s, z: torch.ops.qtoolkit.fake_quantize_mask(
            x[offset:], s, z, None, None, 0, 255, False
        ),
        values((1027,)).to(dtype),
        scale(0.25),
        zero_point(9),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "memory_format"), CHANNEL_CASES, ids=str)
def test_fake_quantize_per_channel(shape, axis, memory_format, dtype):
    x = values(shape).to(dtype).contiguous(memory_format=memory_format)
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_channel(x, s, z, axis, -128, 127),
        x,
        *channel_qparams((x.size(axis),)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(999,), (2, 64, 12, 20), (65536,)], ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_fake_quantize_of_every_type(shape, dtype, relu):
    function = ops.fake_quantize_relu if relu else ops.fake_quantize_per_tensor
    check_fake_quantize(
        lambda x, s, z: function(x, s, z, 0, 255),
        values(shape).to(dtype),
        scale(0.25),
        zero_point(12),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "group_size"),
    [((5, 70), 32), ((5, 70), 16), ((3, 4, 33), 8), ((64, 512), 128), ((7,), 3), ((4, 6), 100)],
    ids=str,
)
def test_fake_quantize_per_group(shape, group_size, dtype):
    groups = (*shape[:-1], math.ceil(shape[-1] / group_size))
    check_fake_quantize(
        lambda x, s, z: ops.fake_quantize_per_group(x, s, z, group_size, -128, 127),
        values(shape).to(dtype),
        *channel_qparams(groups),
    )


def test_fake_quantize_per_group_of_channels_last():
    check_bits(
        lambda x, s, z: torch.ops.qtoolkit.fake_quantize_mask(x, s, z, None, 4, 0, 255, False),
        values((2, 3, 5, 7)).contiguous(memory_format=LAST),
        *channel_qparams((2, 3, 5, 2), positive=True),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "memory_format"), CHANNEL_CASES, ids=str)
def test_masks(shape, axis, memory_format, dtype):
    x = values(shape).to(dtype).contiguous(memory_format=memory_format)
    check_bits(
        lambda x, s, z: torch.ops.qtoolkit.fake_quantize_mask(
            x, s, z, axis, None, -128, 127, False
        ),
        x,
        *channel_qparams((x.size(axis),)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((0,), 0), ((1,), 0), ((4095,), 0), ((40_961,), 0), ((2, 3, 5, 7), 1), ((2, 3, 4, 5, 8), 2)],
    ids=str,
)
@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_pass_masks(shape, layout, dtype, offset):
    formats = [torch.contiguous_format, LAST, torch.channels_last_3d]
    count = math.prod(shape)
    mask = torch.randint(256, ((count + 7) // 8,), dtype=torch.uint8, generator=seeded(7))
    grad = values((count + offset,)).to(dtype)[offset:].view(shape)
    check_bits(
        lambda g, m: torch.ops.qtoolkit.fake_quantize_mask_backward(g, m, layout), grad, mask
    )

    def in_place(g: Tensor, m: Tensor) -> Tensor:
        g = g.clone(memory_format=formats[layout])
        torch.ops.qtoolkit.fake_quantize_mask_backward_(g, m, layout)
        return g

    check_bits(in_place, grad, mask)


# --- observers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if 0 not in shape], ids=str)
def test_min_max(shape, special, dtype):
    check_bits(ops.min_max, values(shape, special).to(dtype))


@pytest.mark.parametrize("at", [0, 31, 32, 255, 256, 70_000, 99_999])
def test_min_max_finds_a_single_value(at):
    x = torch.full((100_000,), 0.5)
    x[at] = -3.0
    check_bits(ops.min_max, x)
    x[at] = float("nan")
    check_bits(ops.min_max, x)


def test_min_max_of_zeros_of_both_signs():
    check_bits(ops.min_max, torch.tensor([0.0, -0.0] * 500))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "axis", "memory_format"), [c for c in CHANNEL_CASES if 0 not in c[0]], ids=str
)
def test_min_max_per_channel(shape, axis, memory_format, dtype, special):
    x = values(shape, special).to(dtype).contiguous(memory_format=memory_format)
    if special:  # leave some channels without NaN
        x = torch.where(torch.rand(shape, generator=seeded(6)) < 0.99, x.nan_to_num(), x)
    check_bits(lambda x: ops.min_max_per_channel(x, axis), x)


def state() -> list[Tensor]:
    return [torch.tensor(math.inf), torch.tensor(-math.inf), scale(1.0), zero_point(0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("quant_min", "quant_max", "symmetric"),
    [(0, 255, False), (-128, 127, False), (-127, 127, True), (0, 255, True), (-8, 7, False)],
)
def test_observe_fake_quantize(quant_min, quant_max, symmetric, dtype):
    batches = [values((3, 5, 7, 11), special=False, seed=i) + i for i in range(4)]
    batches[0][0, 0, 0, 0] = float("inf")  # nothing is known after it
    batches[2][1, 2, 3, 4] = float("nan")  # changes nothing

    def train(*args: Tensor) -> list[Tensor]:
        known, results = [tensor.clone() for tensor in args[-4:]], []
        for x in args[:-4]:
            leaf = x.clone().requires_grad_()
            y = ops.observe_fake_quantize(leaf, *known, 0.3, quant_min, quant_max, symmetric)
            y.sum().backward()
            results += [y.detach(), leaf.grad, *(tensor.clone() for tensor in known)]
        return results

    check_bits(train, *(x.to(dtype) for x in batches), *state())


# --- learned parameters --------------------------------------------------------------------------


def close(actual: Tensor, expected: Tensor, terms: int) -> bool:
    """Of sums in double of float32 terms near 1: equal but for the rounding to float32, and for
    cancellation, whose error in double is far below the atol."""
    return torch.allclose(actual, expected, rtol=3e-7, atol=1e-11 * terms, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "memory_format"),
    [((1_000_003,), None, torch.contiguous_format), *CHANNEL_CASES],
    ids=str,
)
def test_lsq(shape, axis, memory_format, shifted, dtype):
    x = values(shape, special=False).to(dtype).contiguous(memory_format=memory_format)
    grad = torch.randn(shape, generator=seeded(3)).to(dtype)
    channels = (1,) if axis is None else (x.size(axis),)
    s = torch.rand(channels, generator=seeded(4)) * 0.5 - 0.1  # some below 0
    z = torch.randn(channels, generator=seeded(5)) * 9 if shifted else None
    function = torch.ops.qtoolkit.fake_quantize_lsq_backward

    check_bits(lambda x, s, z: ops.fake_quantize_lsq(x, s, z, axis, -128, 127, 0.3), x, s, z)
    args = (grad, x, s, z)
    actual, expected = both(lambda *t: function(*t, axis, -128, 127, 0.3), *args)
    assert same_bits(actual[0], expected[0])
    terms = 100 * x.numel()
    assert close(actual[1], expected[1], terms)
    assert close(actual[2], expected[2], terms)
    again, _ = both(lambda *t: function(*t, axis, -128, 127, 0.3), *args)
    assert all(map(torch.equal, actual, again))


def test_lsq_of_special_values():
    x, grad = values((4099,)), torch.randn(4099, generator=seeded(3))
    check_bits(
        lambda x, g, s: torch.ops.qtoolkit.fake_quantize_lsq_backward(
            g, x, s, None, None, 0, 255, 1.0
        )[0],
        *(x, grad, torch.tensor([0.25])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_pact(dtype, alpha):
    x = values((100_003,)).to(dtype)
    grad, learned = torch.randn(x.shape, generator=seeded(3)).to(dtype), torch.tensor([alpha])
    check_bits(lambda x, a: ops.fake_quantize_pact(x, a, 15), x, learned)
    function = torch.ops.qtoolkit.fake_quantize_pact_backward
    actual, expected = both(lambda g, x, a: function(g, x, a, 15), grad, x, learned)
    assert same_bits(actual[0], expected[0])
    assert close(actual[1], expected[1], x.numel())


def test_gradients_of_learned_parameters_in_place():
    x, grad = values((3, 40, 41), special=False), torch.randn(3, 40, 41, generator=seeded(3))
    s, learned = torch.rand(40, generator=seeded(4)), torch.tensor([3.0])

    def lsq(g: Tensor, x: Tensor, s: Tensor) -> Tensor:
        g = g.clone()
        torch.ops.qtoolkit.fake_quantize_lsq_backward_(g, x, s, None, 1, -8, 7, 1.0)
        return g

    def pact(g: Tensor, x: Tensor, a: Tensor) -> Tensor:
        g = g.clone()
        torch.ops.qtoolkit.fake_quantize_pact_backward_(g, x, a, 15)
        return g

    check_bits(lsq, grad, x, s)
    check_bits(pact, grad, x, learned)


# --- batch norm ----------------------------------------------------------------------------------

BATCH_NORM_CASES = [c for c in CHANNEL_CASES if c[1] == 1 and 0 not in c[0]]


def batch_norm_args(shape: tuple[int, ...], memory_format, dtype, residual: bool) -> list[Any]:
    """x, weight, bias, running_mean, running_var, residual, min_val, max_val, scale, zero_point."""
    channels, g = shape[1], seeded(9)
    x = (torch.randn(shape, generator=g) * 2 + 0.5).to(dtype).contiguous(memory_format=memory_format)
    other = torch.randn(shape, generator=g).to(dtype) if residual else None
    return [
        *(x, torch.rand(channels, generator=g) + 0.5, torch.randn(channels, generator=g)),
        *(torch.randn(channels, generator=g), torch.rand(channels, generator=g) + 0.5, other),
        *state(),
    ]


def batch_norm(training: bool, relu: bool, averaging_constant: float, quantize: bool = True):
    def call(x, weight, bias, mean, var, residual, low, high, s, z) -> list[Tensor]:
        mean, var, low, high, s, z = (t.clone() for t in (mean, var, low, high, s, z))
        known = (low, high, s, z) if quantize else (None, None, None, None)
        result = torch.ops.qtoolkit.batch_norm_act(
            *(x, weight, bias, mean, var, residual, training, 0.1, 1e-5),
            *(relu, 6.0 if relu else None, *known, averaging_constant, False, 0, 255),
        )
        return [*result, mean, var, low, high, s, z]

    return call


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("observe", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_with_given_statistics(
    shape, axis, memory_format, observe, relu, residual, dtype
):
    args = batch_norm_args(shape, memory_format, dtype, residual)
    if not observe:
        args[-4:] = [torch.tensor(-3.0), torch.tensor(4.0), scale(0.03), zero_point(90)]
    check_bits(batch_norm(False, relu, 0.5 if observe else 0.0), *args)
    check_bits(batch_norm(False, relu, 0.0, quantize=False), *args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_in_training(shape, axis, memory_format, relu, residual, dtype):
    args = batch_norm_args(shape, memory_format, dtype, residual)
    actual, expected = both(batch_norm(True, relu, 0.5), *args)
    (y, mean, invstd, _, *known), (y_cpu, mean_cpu, invstd_cpu, _, *known_cpu) = actual, expected
    for ours, theirs in zip([mean, invstd, *known], [mean_cpu, invstd_cpu, *known_cpu], strict=True):
        assert torch.allclose(ours.double(), theirs.double(), rtol=1e-6, atol=1e-6)
    # A last bit of the statistics moves a value across the middle between two codes, if rarely.
    step = known_cpu[4] * 1.01 + y_cpu.abs() * torch.finfo(dtype).eps
    assert ((y.float() - y_cpu.float()).abs() <= step).all()
    assert (y != y_cpu).float().mean() < 0.01
    again, _ = both(batch_norm(True, relu, 0.5), *args)
    assert all(map(torch.equal, actual, again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis", "memory_format"), BATCH_NORM_CASES, ids=str)
def test_batch_norm_act_backward(shape, axis, memory_format, masked, training, dtype):
    x, weight, _, mean, var, grad = batch_norm_args(shape, memory_format, dtype, True)[:6]
    mask = torch.randint(256, ((x.numel() + 7) // 8,), dtype=torch.uint8, generator=seeded(7))
    mask = mask if masked else mask[:0]
    function = torch.ops.qtoolkit.batch_norm_act_backward
    args = (grad, x, weight, mean, var.rsqrt(), mask)
    every = [True, True, True, True]
    actual, expected = both(lambda *t: function(*t, training, every), *args)
    # grad_x of a batch is a difference of numbers near 1 that contain the sums.
    tolerance = max(2e-6, 2 * torch.finfo(dtype).eps)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.allclose(ours.float(), theirs.float(), rtol=tolerance, atol=tolerance)
    assert same_bits(actual[3], expected[3])
    if not training:
        assert same_bits(actual[0], expected[0])
    again, _ = both(lambda *t: function(*t, training, every), *args)
    assert all(map(torch.equal, actual, again))
    only_x = [True, False, False, False]
    check = both(lambda *t: function(*t, False, only_x), *args)
    assert same_bits(check[0][0], check[1][0])


# --- max pooling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [3, 8, 64])
@pytest.mark.parametrize(
    "options",
    [
        ([3, 3], [2, 2], [1, 1], [1, 1], False),
        ([2, 3], [2, 1], [0, 1], [1, 2], True),
        ([16, 16], [1, 1], [8, 0], [1, 1], False),
        ([3, 3], [1, 1], [1, 1], [2, 2], False),
        ([3, 2], [3, 4], [1, 0], [1, 3], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_max_pool2d_train(channels, options, memory_format):
    x = torch.randint(-4, 4, (3, channels, 19, 18), generator=seeded()).float()
    x[0, 0, 3, 3] = float("nan")
    x[1, 1] = -float("inf")
    x = x.contiguous(memory_format=memory_format)
    check_bits(lambda x: torch.ops.qtoolkit.max_pool2d_train(x, *options), x)
    y = ops.max_pool2d_train(x, *options)
    grad = torch.randn(y.shape, generator=seeded(1))
    check_bits(with_gradient(lambda x: ops.max_pool2d_train(x, *options)), x, grad)


# --- what only a GPU has -------------------------------------------------------------------------


def test_scale_on_another_device_is_an_error():
    x = values((10,)).cuda()
    with pytest.raises(ValueError, match="scale"):
        ops.fake_quantize_per_tensor(x, scale(0.25), zero_point(0), 0, 255)


def test_training_operators_can_be_captured():
    """In a CUDA graph, whose replays move the range like calls do."""
    x = values((64, 1000), special=False)
    eager, known = state(), [tensor.cuda() for tensor in state()]
    options = (0.3, 0, 255, False)
    still = torch.zeros_like(x, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # warm-up, as captures want it
        ops.observe_fake_quantize(still, *(tensor.clone() for tensor in known), *options)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.observe_fake_quantize(still, *known, *options)
    for factor in (1.0, 2.0, 0.5):
        still.copy_(x * factor)
        graph.replay()
        assert same_bits(y.cpu(), ops.observe_fake_quantize(x * factor, *eager, *options))
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(known, eager, strict=True))
