"""The operators of training networks: max pooling and the convolution that keeps codes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from qtoolkit import ops

SCALE, ZERO_POINT = torch.tensor(0.03), torch.tensor(11, dtype=torch.int32)


def grid(*shape: int, seed: int = 0) -> Tensor:
    """Fake-quantized values, channels_last."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = ops.fake_quantize_per_tensor(x, SCALE, ZERO_POINT, 0, 255)
    return x.to(memory_format=torch.channels_last)


POOLS = [
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((2, 3), (2, 1), (0, 1), (1, 2), True),
    ((16, 16), (1, 1), (8, 0), (1, 1), False),
    ((3, 3), (1, 1), (1, 1), (2, 2), False),
]


@pytest.mark.parametrize("options", POOLS)
@pytest.mark.parametrize("channels_last", [True, False])
def test_max_pool_is_torchs(options, channels_last):
    x = torch.randint(-4, 4, (3, 21, 17, 18), generator=torch.Generator().manual_seed(0)).float()
    x[0, 0, 3, 3] = float("nan")
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ops.max_pool2d_train(ours, *map(list, options[:4]), options[4])
    expected = functional.max_pool2d(theirs, *options)
    assert torch.equal(y.nan_to_num(9.0), expected.nan_to_num(9.0))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(grad)
    expected.backward(grad)
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)  # windows are added in another order


def test_max_pool_has_no_second_derivative():
    x = torch.randn(1, 2, 6, 6, requires_grad=True)
    y = ops.max_pool2d_train(x, [2, 2], [2, 2], [0, 0], [1, 1])
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("kernel", "padding", "dilation", "message"),
    [
        ([17, 16], [0, 0], [1, 1], "at most 256 elements"),
        ([3, 3], [2, 1], [1, 1], "at most half the kernel"),
        ([2, 2], [1, 0], [8, 1], "padding alone|larger than"),
    ],
)
def test_max_pool_refuses_windows_it_cannot_have(kernel, padding, dilation, message):
    with pytest.raises(ValueError, match=message):
        ops.max_pool2d_train(torch.randn(1, 1, 7, 20), kernel, [1, 1], padding, dilation)


def conv_case(x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(8, x.shape[1] // groups, 3, 3, generator=torch.Generator().manual_seed(2))
    scale = weight.abs().amax((1, 2, 3)) / 127
    zeros = torch.zeros(8, dtype=torch.int32)
    weight = ops.fake_quantize_per_channel(weight, scale, zeros, 0, -127, 127)
    return weight, scale, torch.linspace(-1, 1, 8)


def run(x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, groups: int):
    leaves = [t.clone().requires_grad_() for t in (x, weight)]
    leaves += [] if bias is None else [bias.clone().requires_grad_()]
    used_bias = None if bias is None else leaves[2]
    y = ops.conv2d_train(leaves[0], leaves[1], used_bias, [2, 1], [1, 1], [1, 1], groups,
                         SCALE, ZERO_POINT, 0, 255, scale, 127)  # fmt: skip
    expected = functional.conv2d(leaves[0], leaves[1], used_bias, [2, 1], 1, 1, groups)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return (
        y,
        expected,
        torch.autograd.grad(y, leaves, grad),
        torch.autograd.grad(expected, leaves, grad),
    )


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", ["codes", "one value off", "floats", "weight of floats"])
def test_conv_has_the_bits_of_torch_whatever_it_keeps(groups, with_bias, kind):
    x = grid(2, 4, 9, 10)
    weight, scale, bias = conv_case(x, groups)
    if kind == "one value off":
        x[1, 3, 8, 9] += 1e-6
    elif kind == "floats":
        x = torch.randn(x.shape)
    y, expected, grads, expected_grads = run(
        x, weight, bias if with_bias else None, None if kind.startswith("weight") else scale, groups
    )
    assert torch.equal(y, expected)
    for grad, expected_grad in zip(grads, expected_grads):
        assert torch.equal(grad, expected_grad)


def test_conv_keeps_codes_and_not_floats():
    """The memory of the input and of the weight is given back while the graph is alive."""
    x = grid(2, 4, 9, 10).requires_grad_()
    weight, scale, _ = conv_case(x)
    weight.requires_grad_()
    hidden, hidden_weight = x * 1.0, weight * 1.0
    alive = [weakref.ref(t.untyped_storage()) for t in (hidden, hidden_weight)]
    y = ops.conv2d_train(hidden, hidden_weight, None, [1, 1], [1, 1], [1, 1], 1, SCALE, ZERO_POINT,
                         0, 255, scale, 127)  # fmt: skip
    kept = [t.dtype for t in y.grad_fn.saved_tensors] if hasattr(y.grad_fn, "saved_tensors") else []
    assert kept.count(torch.float32) <= 2
    del hidden, hidden_weight
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
    y.sum().backward()
    assert x.grad is not None


def test_conv_has_no_second_derivative():
    x = grid(1, 4, 5, 5).requires_grad_()
    weight, scale, _ = conv_case(x)
    y = ops.conv2d_train(x, weight, None, [1, 1], [1, 1], [1, 1], 1, SCALE, ZERO_POINT, 0, 255,
                         scale, 127)  # fmt: skip
    with pytest.raises(RuntimeError, match="keep_codes = False"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_scale_that_changes_after_the_forward_does_not_change_the_gradient():
    x = grid(1, 4, 5, 5).requires_grad_()
    weight, scale, _ = conv_case(x)
    weight.requires_grad_()
    x_scale, zero_point = SCALE.clone(), ZERO_POINT.clone()
    y = ops.conv2d_train(x, weight, None, [1, 1], [1, 1], [1, 1], 1, x_scale, zero_point, 0, 255,
                         scale, 127)  # fmt: skip
    x_scale.mul_(2)
    zero_point.zero_()
    scale.mul_(3)
    expected = functional.conv2d(x, weight, None, 1, 1)
    for a, b in zip(
        torch.autograd.grad(y.sum(), (x, weight)),
        torch.autograd.grad(expected.sum(), (x, weight)),
    ):
        assert torch.equal(a, b)


def test_module_falls_back_to_floats_for_second_derivatives():
    from qtoolkit.nn.qat.weighted import make_conv2d
    from qtoolkit.qconfig import TensorSpec

    spec = TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
    conv = make_conv2d(nn.Conv2d(4, 8, 3), spec, "conv", None)
    conv.keep_codes = False
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_conv_has_no_gradient_penalty_with_a_constant_gradient_either():
    x = grid(1, 4, 5, 5).requires_grad_()
    weight, scale, _ = conv_case(x)
    y = ops.conv2d_train(x, weight.requires_grad_(), None, [1, 1], [1, 1], [1, 1], 1, SCALE,
                         ZERO_POINT, 0, 255, scale, 127)  # fmt: skip
    with pytest.raises(RuntimeError, match="keep_codes = False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_conv_of_a_lazily_negated_input_has_torchs_gradients():
    x = torch._neg_view(grid(2, 4, 9, 10))
    weight, scale, _ = conv_case(x)
    weight.requires_grad_()
    y = ops.conv2d_train(x, weight, None, [1, 1], [1, 1], [1, 1], 1, SCALE, ZERO_POINT, 0, 255,
                         scale, 127)  # fmt: skip
    expected = functional.conv2d(x, weight, None, 1, 1)
    (grad,) = torch.autograd.grad(y.square().sum(), weight)
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), weight)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x_scale": torch.ones(4)}, ValueError, "one element each"),
        ({"x_zero_point": None}, ValueError, "come together"),
        ({"x_scale": torch.ones(1).double()}, TypeError, "x_scale must be"),
        ({"x_quant_max": 300}, ValueError, "quant_min and quant_max"),
        ({"weight_quant_max": -(2**63)}, ValueError, "weight_quant_max"),
        ({"weight_scale": torch.ones(8).half()}, TypeError, "weight_scale must be"),
    ],
)
def test_conv_refuses_formats_that_cannot_be(requires_grad, changed, error, message):
    x = grid(1, 4, 5, 5).requires_grad_(requires_grad)
    weight, scale, _ = conv_case(x)
    formats = {
        "x_scale": SCALE,
        "x_zero_point": ZERO_POINT,
        "x_quant_min": 0,
        "x_quant_max": 255,
        "weight_scale": scale,
        "weight_quant_max": 127,
    }
    with pytest.raises(error, match=message):
        ops.conv2d_train(
            x, weight, None, [1, 1], [1, 1], [1, 1], 1, *{**formats, **changed}.values()
        )


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-45])
def test_conv_keeps_floats_where_the_scale_is_none(scale):
    x = grid(1, 4, 5, 5)
    weight, _, _ = conv_case(x)
    weight.requires_grad_()
    y = ops.conv2d_train(x, weight, None, [1, 1], [1, 1], [1, 1], 1, torch.tensor(scale),
                         ZERO_POINT, 0, 255, None, 127)  # fmt: skip
    expected = functional.conv2d(x, weight, None, 1, 1)
    assert torch.equal(*(torch.autograd.grad(v.sum(), weight)[0] for v in (y, expected)))
