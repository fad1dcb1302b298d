"""batch_norm_act in PyTorch's training: autograd, checkpoints, compiled graphs, 16-bit floats."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_ops_batch_norm_act import LAST, Layer, leaves_of, values
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def test_what_autograd_shows_others_is_not_overwritten():
    """The gradient's memory becomes a result only where nobody else holds it."""
    x = values((2, 16, 8, 8), LAST)
    grad = values((2, 16, 8, 8), LAST, 5)
    kept = grad.clone()
    layer = Layer(16)
    seen: list[Tensor] = []

    def gradients(around: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        leaf = leaves_of(x)[0]
        return torch.autograd.grad(around(Layer(16)(leaf)), leaf, given)[0]

    expected = gradients(lambda y: y, grad)
    assert torch.equal(grad, kept)
    assert torch.equal(gradients(lambda y: y * 1.0, grad), expected)  # overwritten

    def hooked(y: Tensor) -> Tensor:
        y.register_hook(seen.append)
        return y * 1.0

    assert torch.equal(gradients(hooked, grad), expected)
    assert torch.equal(seen[0], kept)

    memory = kept.clone().permute(0, 2, 3, 1).contiguous().numpy()
    copy = memory.copy()

    class FromNumpy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, _):
            return torch.from_numpy(memory).permute(0, 3, 1, 2)

    assert torch.equal(gradients(FromNumpy.apply, grad), expected)
    assert (memory == copy).all()

    # Both readers of an addition get the same tensor.
    a, b = leaves_of(x, x)
    total = layer.unquantized(a, relu=True) + layer.unquantized(b, relu=True)
    grads = torch.autograd.grad(total * 1.0, (a, b), grad)
    assert torch.equal(grads[0], grads[1])


def operators_of_backward(grad: Tensor, *, held: bool) -> set[str]:
    y = Layer(16)(leaves_of(values((2, 16, 8, 8), LAST))[0], relu=True)
    with torch.profiler.profile() as profile:
        (y if held else y * 2.0).backward(grad)
    return {event.name for event in profile.events()}


def test_only_a_gradient_that_nobody_holds_is_overwritten():
    """One feature map less in memory; the operator itself never writes to its arguments."""
    grad = values((2, 16, 8, 8), LAST, 5)
    assert "qtoolkit::batch_norm_act_backward" in operators_of_backward(grad, held=True)
    assert "qtoolkit::batch_norm_act_backward" not in operators_of_backward(grad, held=False)


def test_checkpoint_and_retained_graphs_give_the_same():
    x = values((4, 16, 6, 6), LAST)
    grad = values((4, 16, 6, 6), seed=5)
    leaf = leaves_of(x)[0]
    y = Layer(16)(leaf, relu=True)
    first = torch.autograd.grad(y, leaf, grad, retain_graph=True)[0]
    second = torch.autograd.grad(y, leaf, grad)[0]
    assert torch.equal(first, second)
    again = leaves_of(x)[0]
    z = checkpoint(lambda t: Layer(16)(t, relu=True), again, use_reentrant=False)
    assert torch.equal(z, y)
    assert torch.equal(torch.autograd.grad(z, again, grad)[0], first)


def test_compiled_training_gives_the_same():
    def step(layer: Layer, x: Tensor, r: Tensor) -> Tensor:
        return layer(x * 1.5, r, relu=True) * 2.0

    x, r = values((4, 16, 6, 6), LAST), values((4, 16, 6, 6), LAST, 3)
    results = []
    for function in (step, torch.compile(step, backend="aot_eager", fullgraph=True)):
        layer = Layer(16)
        leaves = leaves_of(x, r, layer.weight, layer.bias)
        layer.weight, layer.bias = leaves[2:]
        for _ in range(2):
            y = function(layer, *leaves[:2])
            gradients = torch.autograd.grad(y, leaves, values((4, 16, 6, 6), seed=5))
        running = [layer.running_mean, layer.running_var]
        results.append([y, *gradients, *layer.state(), *running])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float(dtype):
    x, r = values((4, 8, 6, 6), LAST).to(dtype), values((4, 8, 6, 6), LAST, 3).to(dtype)
    leaf, residual = leaves_of(x, r)
    y = Layer(8)(leaf, residual, relu=True)
    wide, wide_residual = leaves_of(x.float(), r.float())
    expected = Layer(8)(wide, wide_residual, relu=True)
    assert y.dtype == dtype
    assert torch.equal(y, expected.to(dtype))
    grad = values((4, 8, 6, 6), seed=5).to(dtype)
    gradients = torch.autograd.grad(y, (leaf, residual), grad)
    wanted = torch.autograd.grad(expected, (wide, wide_residual), grad.float())
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


def test_autocast_inference_mode_and_changes_in_place():
    layer = Layer(8)
    x = values((4, 8, 6, 6))
    weight = values((8, 8, 1, 1), seed=4).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(F.conv2d(x, weight), x)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(torch.autograd.grad(y.sum(), weight)[0]).all()
    version = layer.running_mean._version
    with torch.inference_mode():
        layer(x)
    layer(x)
    assert layer.running_mean._version > version
    assert layer.scale._version > 0


def test_twice_differentiated_is_an_error():
    x = leaves_of(values((4, 8)))[0]
    gradient = torch.autograd.grad(Layer(8)(x).sum(), x, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="cannot be differentiated twice"):
        gradient.sum().backward()
