"""The CUDA operators give the CPU operators' bits: fake-quantize and observers."""

from __future__ import annotations

import math

import pytest
import torch
from cuda_reference import (
    CHANNEL_CASES,
    DTYPES,
    LAST,
    channel_qparams,
    check_bits,
    check_fake_quantize,
    needs_gpu,
    same_bits,
    state,
    values,
)
from op_reference import scale, seeded, zero_point
from torch import Tensor

from qtoolkit import ops

pytestmark = needs_gpu

SHAPES = [(), (1,), (7,), (1000,), (1_000_003,), (2, 3, 5, 7), (4, 64, 9, 9), (3, 1, 40), (0, 4)]
RANGES = [(0, 255, 128), (-128, 127, 0), (-127, 127, 0), (0, 15, 3), (-8, 7, -1)]


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bins", [1, 2048, 8192, 8193, 100_000])
@pytest.mark.parametrize("shape", [(7,), (1_000_003,), (4, 64, 9, 9)], ids=str)
def test_histogram(shape, bins, dtype):
    x = values(shape, special=True).to(dtype)
    check_bits(lambda x: ops.histogram(x, bins, -1.0, 2.5), x)
    check_bits(lambda x: ops.histogram_min_max(x, bins, -1.0, 2.5), x)
    if x.dim() == 4:
        check_bits(lambda x: ops.histogram(x.transpose(1, 3)[:, ::2], bins, -1.0, 2.5), x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("group_size", [1, 4, 32, 1000])
def test_min_max_per_group(group_size, axis, dtype):
    x = values((33, 70, 36)).to(dtype)
    check_bits(lambda x: ops.min_max_per_group(x, group_size, axis), x)


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


# --- few values ----------------------------------------------------------------------------------

# mantissa bits, least exponent, largest number
FLOATS = [(3, -6, 448.0), (2, -14, 57344.0), (1, 0, 6.0), (10, -14, 65504.0), (22, -126, 2.0**127)]


ANY_SHAPE = [((40_961,), None, torch.contiguous_format), *CHANNEL_CASES]


def scale_of(x: Tensor, axis: int | None) -> Tensor:
    return torch.rand((1,) if axis is None else (x.size(axis),), generator=seeded(4)) * 3 + 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "axis", "memory_format"), ANY_SHAPE, ids=str)
def test_ternary_and_binary(shape, axis, memory_format, dtype):
    x = values(shape).to(dtype).contiguous(memory_format=memory_format)
    s = scale_of(x, axis)
    threshold = torch.rand(s.shape, generator=seeded(5)) * 20
    qtoolkit = torch.ops.qtoolkit
    check_bits(lambda x, s, t: qtoolkit.fake_quantize_ternary(x, s, t, axis), x, s, threshold)
    check_bits(lambda x, s: qtoolkit.fake_quantize_binary_mask(x, s, axis, 9.5), x, s)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number_format", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "axis", "memory_format"), ANY_SHAPE, ids=str)
def test_small_floats(shape, axis, memory_format, number_format, dtype):
    x = values(shape).to(dtype).contiguous(memory_format=memory_format)
    check_bits(
        lambda x, s: torch.ops.qtoolkit.fake_quantize_float_mask(x, s, axis, *number_format),
        *(x, scale_of(x, axis)),
    )


@pytest.mark.parametrize("number_format", FLOATS, ids=str)
@pytest.mark.parametrize("s", [1e-40, 1e-30, 3e30])
def test_small_floats_with_extreme_scales(s, number_format):
    tiny = values((4096,)) * 2.0 ** torch.randint(-140, 60, (4096,), generator=seeded(4))
    check_bits(
        lambda x, s: torch.ops.qtoolkit.fake_quantize_float_mask(x, s, None, *number_format),
        *(tiny, torch.tensor([s])),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number_format", FLOATS[:3], ids=str)
@pytest.mark.parametrize("given_scale", [None, 0.013])
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((5, 70), 32),
        ((64, 512), 32),
        ((64, 512), 16),
        ((3, 4, 33), 8),
        ((7,), 1),
        ((2, 3000), 1000),
    ],
    ids=str,
)
def test_blocks_of_small_floats(shape, block_size, given_scale, number_format, dtype):
    function, options = torch.ops.qtoolkit.fake_quantize_block_float, (block_size, *number_format)
    x = values(shape).to(dtype)
    check_bits(lambda x: function(x, None, *options, "e8m0"), x)
    tensor_scale = None if given_scale is None else torch.tensor([given_scale])
    x = x.nan_to_num(1.0)  # a tensor's scale is of finite values
    check_bits(lambda x, t: function(x, t, *options, "e4m3"), x, tensor_scale)


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
