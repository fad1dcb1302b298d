"""The straight-through gradient as a 1-bit mask: layouts, groups, ReLU, memory, 16-bit floats."""

import copy

import pytest
import torch
from op_reference import PATHS, forced_path, scale, seeded, zero_point
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qtoolkit import ops

S, Z = scale(0.05), zero_point(100)
ARGS = (S, Z, 0, 255)


def values(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed)) * 8


def inside(x: Tensor, s: Tensor, z: Tensor, low: int, high: int) -> Tensor:
    codes = (x * (1.0 / s)).round() + z
    return (codes >= low) & (codes <= high)


def bits(mask: Tensor, count: int) -> Tensor:
    """The bits of a mask, bool [count] in memory order; the rest of the last byte must be 0."""
    result = (mask[:, None] >> torch.arange(8)) & 1
    assert not result.flatten()[count:].any()
    return result.flatten()[:count].bool()


def in_memory_order(x: Tensor) -> Tensor:
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return x.permute(order).reshape(-1)


LAYOUTS = [
    (values(3, 5, 7, 11), torch.contiguous_format, 0),
    (values(3, 5, 7, 11), torch.channels_last, 1),
    (values(2, 3, 4, 5, 3), torch.channels_last_3d, 2),
]


@pytest.mark.parametrize(("x", "memory_format", "layout"), LAYOUTS, ids=["0", "1", "2"])
def test_mask_is_in_memory_order(x, memory_format, layout):
    x = x.contiguous(memory_format=memory_format)
    y, mask = torch.ops.qtoolkit.fake_quantize_mask(x, S, Z, None, None, 0, 255, False)
    expected = inside(x, S, Z, 0, 255)
    assert 0 < expected.sum() < x.numel()
    assert y.stride() == x.stride()
    assert torch.equal(y, ops.fake_quantize_per_tensor(x, *ARGS))
    assert torch.equal(bits(mask, x.numel()), in_memory_order(expected))
    # A gradient in any layout is brought to that of the mask.
    grad = values(*x.shape, seed=1)
    for g in (grad, grad.contiguous(memory_format=memory_format), grad[..., :1].expand(x.shape)):
        result = torch.ops.qtoolkit.fake_quantize_mask_backward(g, mask, layout)
        assert torch.equal(result, torch.where(expected, g, 0.0))
        assert result.stride() == x.stride()
        assert not torch.signbit(result[~expected]).any()


@pytest.mark.parametrize(
    ("layout", "shape"), [(3, (2, 2, 2, 2)), (-1, (4,)), (1, (4, 4)), (2, (2, 2, 2, 2))]
)
def test_layout_must_fit_the_gradient(layout, shape):
    grad = torch.ones(shape)
    mask = torch.zeros((grad.numel() + 7) // 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="layout must be 0"):
        torch.ops.qtoolkit.fake_quantize_mask_backward(grad, mask, layout)
    with pytest.raises(ValueError, match="one bit for each element"):
        torch.ops.qtoolkit.fake_quantize_mask_backward(grad, torch.zeros(9).byte(), 0)
    with pytest.raises(TypeError, match="mask must be uint8"):
        torch.ops.qtoolkit.fake_quantize_mask_backward(grad, mask.int(), 0)
    with pytest.raises(ValueError, match="must be dense in the layout"):
        torch.ops.qtoolkit.fake_quantize_mask_backward_(torch.ones(4, 4).t(), mask.new_zeros(2), 0)


def grouped_reference(x: Tensor, s: Tensor, z: Tensor, size: int) -> tuple[Tensor, Tensor]:
    count = x.size(-1)
    s = s.repeat_interleave(size, -1)[..., :count]
    z = z.repeat_interleave(size, -1)[..., :count]
    codes = ((x * (1.0 / s)).round() + z).clamp(-8, 7)
    return (codes - z) * s, inside(x, s, z, -8, 7)


@pytest.mark.parametrize("size", [1, 4, 7, 32, 33, 100])
@pytest.mark.parametrize("shape", [(33,), (5, 32), (2, 3, 4, 70)])
def test_per_group_has_parameters_along_the_last_axis(shape, size):
    x = values(*shape)
    groups = (*shape[:-1], -(-shape[-1] // size))
    s = torch.rand(groups, generator=seeded(1)) + 0.1
    z = torch.randint(-8, 8, groups, generator=seeded(2)).int()
    leaf = x.clone().requires_grad_()
    y = ops.fake_quantize_per_group(leaf, s, z, size, -8, 7)
    grad = values(*shape, seed=3)
    y.backward(grad)
    expected, passes = grouped_reference(x, s, z, size)
    assert torch.equal(y, expected)
    assert torch.equal(leaf.grad, torch.where(passes, grad, 0.0))
    assert torch.equal(ops.fake_quantize_per_group(x, s, z, size, -8, 7), expected)


def test_per_group_of_channels_last_is_contiguous():
    x = values(2, 3, 4, 6).to(memory_format=torch.channels_last).requires_grad_()
    s, z = torch.full((2, 3, 4, 2), 0.5), torch.zeros((2, 3, 4, 2), dtype=torch.int32)
    y = ops.fake_quantize_per_group(x, s, z, 4, -8, 7)
    y.backward(values(2, 3, 4, 6, seed=1).to(memory_format=torch.channels_last))
    expected, passes = grouped_reference(x.detach(), s, z, 4)
    assert torch.equal(y, expected)
    assert y.is_contiguous()
    assert torch.equal(x.grad, torch.where(passes, values(2, 3, 4, 6, seed=1), 0.0))


def test_per_group_refuses_other_shapes():
    x = values(4, 10)
    s, z = torch.ones(4, 3), torch.zeros(4, 3, dtype=torch.int32)
    for bad in (lambda: (x, s[:3], z[:3], 4), lambda: (x, s, z, 5), lambda: (x, s, z[:, :2], 4)):
        with pytest.raises(ValueError, match=r"fake_quantize_per_group: scale and zero_point must"):
            ops.fake_quantize_per_group(*bad(), -8, 7)
    with pytest.raises(ValueError, match="group_size must be positive, got 0"):
        ops.fake_quantize_per_group(x, s, z, 0, -8, 7)
    with pytest.raises(ValueError, match="x has no dimensions"):
        ops.fake_quantize_per_group(x[0, 0], s, z, 4, -8, 7)
    with pytest.raises(ValueError, match="scale must be positive"):
        ops.fake_quantize_per_group(x, s - 1, z, 4, -8, 7)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("low", "high", "zp"), [(0, 255, 0), (0, 255, 100), (-128, 127, -128)])
def test_relu_is_fused(memory_format, low, high, zp):
    x = values(2, 5, 7, 9).contiguous(memory_format=memory_format)
    s, z = scale(0.04), zero_point(zp)
    leaf, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ops.fake_quantize_relu(leaf, s, z, low, high)
    expected = ops.fake_quantize_per_tensor(two.relu(), s, z, low, high)
    assert torch.equal(y, expected)
    assert y.stride() == x.stride()
    grad = values(2, 5, 7, 9, seed=1)
    y.backward(grad)
    expected.backward(grad)
    assert torch.equal(leaf.grad, two.grad)
    assert torch.equal(ops.fake_quantize_relu(x, s, z, low, high), expected)


def test_relu_passes_nan():
    x = torch.tensor([float("nan"), -float("inf"), float("inf"), -0.0, 0.0]).requires_grad_()
    y = ops.fake_quantize_relu(x, scale(1.0), zero_point(2), 0, 7)
    assert y[0].isnan()
    assert y[1:].tolist() == [0, 5, 0, 0]
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 0, 0, 0]


def saved_tensors(y: Tensor) -> list[Tensor]:
    """What the graph behind y keeps."""
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        ops.fake_quantize_per_tensor(y, *ARGS)
    return kept


def test_a_mask_of_one_bit_an_element_is_kept_and_nothing_else():
    x = values(8, 100).requires_grad_()
    assert [(t.dtype, t.numel()) for t in saved_tensors(x)] == [(torch.uint8, 100)]
    with torch.no_grad():
        assert saved_tensors(x) == []
    assert saved_tensors(x.detach()) == []


def intermediate_gradient(hook: bool, retain: bool) -> tuple[Tensor, list[Tensor]]:
    x = values(6, 50).requires_grad_()
    y = ops.fake_quantize_per_tensor(x * 2, *ARGS)
    seen: list[Tensor] = []
    if hook:
        y.register_hook(lambda grad: seen.append(grad))
    if retain:
        y.retain_grad()
    (y * values(6, 50, seed=1)).sum().backward()
    if retain:
        seen.append(y.grad)
    return x.grad, seen


def test_a_gradient_that_others_see_stays_as_it_is():
    expected, _ = intermediate_gradient(False, False)
    for hook, retain in ((True, False), (False, True), (True, True)):
        grad, seen = intermediate_gradient(hook, retain)
        assert torch.equal(grad, expected)
        for kept in seen:
            assert torch.equal(kept, values(6, 50, seed=1))
    passes = inside(values(6, 50) * 2, S, Z, 0, 255)
    assert 0 < passes.sum() < 300
    assert torch.equal(expected, torch.where(passes, 2 * values(6, 50, seed=1), 0.0))


def operators_of_backward(loss: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        loss.backward()
    return {event.key for event in profile.key_averages() if "mask_backward" in event.key}


def test_a_gradient_that_nobody_else_sees_is_overwritten():
    x = values(6, 50).requires_grad_()
    loss = (ops.fake_quantize_per_tensor(x * 2, *ARGS) * values(6, 50, seed=1)).sum()
    assert operators_of_backward(loss) == {"qtoolkit::fake_quantize_mask_backward_"}
    y = ops.fake_quantize_per_tensor(x * 2, *ARGS)
    seen: list[Tensor] = []
    y.register_hook(seen.append)
    assert operators_of_backward((y * values(6, 50, seed=1)).sum()) == {
        "qtoolkit::fake_quantize_mask_backward"
    }


def test_the_callers_gradient_stays_as_it_is():
    x, grad = values(300).requires_grad_(), values(300, seed=1)
    ops.fake_quantize_per_tensor(x, *ARGS).backward(grad)
    assert torch.equal(grad, values(300, seed=1))
    base = values(600, seed=1)
    ops.fake_quantize_per_tensor(x, *ARGS).backward(base[::2])
    ops.fake_quantize_per_tensor(x, *ARGS).backward(base[:300])
    assert torch.equal(base, values(600, seed=1))
    ops.fake_quantize_per_tensor(x, *ARGS).sum().backward()  # an expanded gradient


def test_a_gradient_that_goes_two_ways():
    x, z = values(300).requires_grad_(), values(300).requires_grad_()
    total = ops.fake_quantize_per_tensor(x, *ARGS) + z  # add hands one gradient to both
    (total * values(300, seed=1)).sum().backward()
    assert torch.equal(z.grad, values(300, seed=1))
    passes = inside(values(300), S, Z, 0, 255)
    assert torch.equal(x.grad, torch.where(passes, values(300, seed=1), 0.0))


def test_a_graph_is_used_twice():
    x = values(300).requires_grad_()
    loss = (ops.fake_quantize_per_tensor(x * 1, *ARGS) * values(300, seed=1)).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        s = torch.tensor([0.1, 0.2, 0.3, 0.4])
        z = torch.zeros(4, dtype=torch.int32)
        weight = ops.fake_quantize_per_channel(self.conv.weight, s * 0.01, z, 0, -8, 7)
        groups = torch.full((4, 3, 3, 2), 0.01)
        zeros = torch.zeros_like(groups, dtype=torch.int32)
        weight = ops.fake_quantize_per_group(weight, groups, zeros, 2, -8, 7)
        x = nn.functional.conv2d(ops.fake_quantize_per_tensor(x, *ARGS), weight)
        return ops.fake_quantize_relu(x, scale(0.005), zero_point(3), 0, 15)


def gradients(layers: nn.Module, run, x: Tensor) -> list[Tensor]:
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layers.zero_grad()
    y = run(leaf)
    y.pow(2).sum().backward()
    return [y.detach(), leaf.grad, layers.conv.weight.grad.clone()]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_and_trains(backend, memory_format, dynamic):
    torch.manual_seed(0)
    layers = Layers()
    torch._dynamo.reset()
    compiled = torch.compile(layers, backend=backend, fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        x = values(batch, 3, 8, 9).contiguous(memory_format=memory_format)
        for a, b in zip(gradients(layers, compiled, x), gradients(layers, layers, x)):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_it_trains_under_activation_checkpointing(use_reentrant):
    torch.manual_seed(0)
    layers, x = Layers(), values(2, 3, 8, 9)
    plain = gradients(layers, layers, x)
    again = gradients(layers, lambda t: checkpoint(layers, t, use_reentrant=use_reentrant), x)
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


def test_it_trains_in_a_data_parallel_module(tmp_path):
    torch.manual_seed(0)
    layers, x = Layers(), values(2, 3, 8, 9)
    plain = gradients(layers, layers, x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(layers)
        for a, b in zip(plain, gradients(layers, parallel, x)):
            assert torch.equal(a, b)
    finally:
        torch.distributed.destroy_process_group()


def test_it_runs_in_the_given_dtype_under_autocast():
    x = values(4, 40).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.fake_quantize_per_tensor(x, *ARGS).dtype == torch.float32
        half = nn.functional.linear(x, torch.eye(40))
        y = ops.fake_quantize_per_tensor(half, *ARGS)
    assert half.dtype == y.dtype == torch.bfloat16
    y.sum().backward()
    passes = inside(half.detach().float(), S, Z, 0, 255)
    assert torch.equal(x.grad, passes.float())


def test_forward_mode_has_no_tangent():
    x = values(30)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(30))
        with pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward AD"):
            ops.fake_quantize_per_tensor(dual, *ARGS)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 65, 1024, 5000, 100_001])
def test_16_bit_floats_are_float32_rounded_once(dtype, count, path):
    x = values(count).to(dtype)
    x[:: 7 + count // 50] = 60000.0
    leaf = x.clone().requires_grad_()
    with forced_path("to_float", path):
        y = ops.fake_quantize_per_tensor(leaf, *ARGS)
    with forced_path("from_float", path):
        assert torch.equal(ops.fake_quantize_per_tensor(x, *ARGS), y)
    full = x.float().requires_grad_()
    expected = ops.fake_quantize_per_tensor(full, *ARGS)
    assert torch.equal(y, expected.to(dtype))
    grad = values(count, seed=1).to(dtype)
    with forced_path("mask_gradient", path):
        y.backward(grad)
    expected.backward(grad.float())
    assert torch.equal(leaf.grad, full.grad.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_per_channel_and_group(dtype):
    x = values(5, 70, 30).to(dtype)
    s = torch.rand(70, generator=seeded(1)) + 0.1
    z = torch.randint(-8, 8, (70,), generator=seeded(2)).int()
    y = ops.fake_quantize_per_channel(x, s, z, 1, -8, 7)
    full = ops.fake_quantize_per_channel(x.float(), s, z, 1, -8, 7)
    assert torch.equal(y, full.to(dtype))
    groups = torch.rand((5, 70, 3), generator=seeded(3)) + 0.1
    zeros = torch.zeros_like(groups, dtype=torch.int32)
    y = ops.fake_quantize_per_group(x, groups, zeros, 13, -8, 7)
    full = ops.fake_quantize_per_group(x.float(), groups, zeros, 13, -8, 7)
    assert torch.equal(y, full.to(dtype))


HUGE = 2 << 20


def test_big_results_lie_in_huge_pages():
    x = torch.zeros(1 << 20)
    y = ops.fake_quantize_per_tensor(x, *ARGS)
    assert y.untyped_storage().nbytes() == 2 * HUGE
    assert y.data_ptr() % HUGE == 0
    small = ops.fake_quantize_per_tensor(x[:1000], *ARGS)
    assert small.untyped_storage().nbytes() == 4000


def test_memory_in_huge_pages_is_ordinary_memory():
    x = values(1 << 20)
    y = ops.fake_quantize_per_tensor(x, *ARGS)
    expected = y.clone()
    y.resize_(3 << 20)
    assert torch.equal(y[: 1 << 20], expected)
    y[1 << 20 :] = 1.0
    y.resize_(10)
    assert torch.equal(y, expected[:10])
    assert torch.equal(copy.deepcopy(y), y)
    assert torch.equal(torch.from_numpy(expected.numpy()), expected)
    shared = ops.fake_quantize_per_tensor(x, *ARGS).share_memory_()
    assert torch.equal(shared, expected)


def test_the_profiler_sees_memory_in_huge_pages():
    x = torch.zeros(1 << 20)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = ops.fake_quantize_per_tensor(x, *ARGS)
        del y
    sizes = [event.self_cpu_memory_usage for event in profile.key_averages()]
    assert max(sizes) >= 2 * HUGE


def test_a_group_larger_than_the_axis_is_one_group():
    x = torch.randn(2, 5)
    scale, zero_point = torch.full((2, 1), 0.1), torch.zeros(2, 1, dtype=torch.int32)
    expected = ops.fake_quantize_per_group(x, scale, zero_point, 5, -8, 7)
    assert torch.equal(
        ops.fake_quantize_per_group(x, scale, zero_point, 2**63 - 1, -8, 7), expected
    )
