"""observe_fake_quantize against the observer and fake-quantize that it stands for."""

import math

import pytest
import torch
from op_reference import PATHS, forced_path, scale, seeded, zero_point
from torch import Tensor

import qtoolkit as qt
from qtoolkit import ops
from qtoolkit.observers import MovingAverageMinMaxObserver

CONSTANT = 0.07
SPECS = [
    qt.TensorSpec("uint8", observer="moving_average"),
    qt.TensorSpec("uint8", symmetric=True, observer="moving_average"),
    qt.TensorSpec("int8", observer="moving_average"),
    qt.TensorSpec("int8", symmetric=True, observer="moving_average"),
    qt.TensorSpec("uint4", observer="moving_average"),
]


def fresh_state() -> list[Tensor]:
    return [torch.tensor(math.inf), torch.tensor(-math.inf), scale(1.0), zero_point(0)]


def call(x: Tensor, state: list[Tensor], spec: qt.TensorSpec = SPECS[0]) -> Tensor:
    return ops.observe_fake_quantize(
        x, *state, CONSTANT, spec.quant_min, spec.quant_max, spec.symmetric
    )


def batches(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    sizes = [1e-30, 1.0, 3.0, 0.5, 1e30, 1.0, 0.0]
    shifts = [0.0, 0.0, 5.0, -9.0, 0.0, 0.3, 0.0]
    generator = seeded(3)
    return [
        (torch.randn(3, 4, 5, 6, generator=generator) * size + shift).to(dtype)
        for size, shift in zip(sizes, shifts)
    ]


def same_bits(a: Tensor, b: Tensor) -> bool:
    assert a.dtype == b.dtype
    if a.dtype != torch.float32:
        return torch.equal(a, b)
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_and_values_are_those_of_the_observer(spec, dtype):
    state = fresh_state()
    observer = MovingAverageMinMaxObserver(spec, averaging_constant=CONSTANT)
    for x in batches(dtype):
        if not x.isfinite().all():
            continue
        y = call(x, state, spec)
        observer(x)
        expected = [observer.min_val, observer.max_val, *observer.calculate_qparams()]
        for have, want in zip(state, expected):
            assert same_bits(have, want), (have, want)
        fake = ops.fake_quantize_per_tensor(x, *expected[2:], spec.quant_min, spec.quant_max)
        assert torch.equal(y, fake)


def test_random_ranges_give_the_observers_bits():
    generator = seeded(9)
    for spec in SPECS[:4]:
        state = fresh_state()
        observer = MovingAverageMinMaxObserver(spec, averaging_constant=CONSTANT)
        for _ in range(300):
            factor = 10.0 ** torch.empty(1).uniform_(-40, 38, generator=generator)
            x = (torch.randn(2, generator=generator) * factor).clamp(-3e38, 3e38)
            call(x, state, spec)
            observer(x)
            expected = [observer.min_val, observer.max_val, *observer.calculate_qparams()]
            assert all(map(same_bits, state, expected)), (x, state, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_batch_that_is_not_finite_changes_nothing(bad):
    x = batches()[1]
    state = fresh_state()
    call(x, state)
    before = [t.clone() for t in state]
    poisoned = x.clone()
    poisoned[1, 2, 3, 4] = bad
    y = call(poisoned, state)
    assert all(map(torch.equal, state, before))
    expected = ops.fake_quantize_per_tensor(poisoned, *before[2:], 0, 255)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


def test_without_a_range_x_passes_unchanged():
    x = torch.randn(3, 7)
    x[0, 0] = math.nan
    state = fresh_state()
    leaf = x.clone().requires_grad_()
    y = call(leaf, state)
    assert y.data_ptr() != leaf.data_ptr()
    torch.testing.assert_close(y, x, rtol=0, atol=0, equal_nan=True)
    y.sum().backward()
    assert torch.equal(leaf.grad, torch.ones(3, 7))
    assert all(map(torch.equal, state, fresh_state()))
    call(x[1:], state)
    assert state[0] == x[1:].min()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradient_is_straight_through(memory_format):
    state = fresh_state()
    x = batches()[1]
    call(x, state)
    wide = (2 * x).contiguous(memory_format=memory_format).requires_grad_()
    y = call(wide, state)
    grad = torch.randn(x.shape, generator=seeded(4))
    codes = (wide.detach() * (1.0 / state[2])).round() + state[3]
    call(100 * x, state)  # a later call changes the state in place
    y.backward(grad)
    inside = (codes >= 0) & (codes <= 255)
    assert 0 < inside.sum() < x.numel()
    assert torch.equal(wide.grad, torch.where(inside, grad, 0.0))
    assert y.stride() == wide.stride()


@pytest.mark.parametrize("path", PATHS)
def test_paths_agree(path):
    x = torch.randn(5003, generator=seeded(5))
    state, expected_state = fresh_state(), fresh_state()
    expected = call(x, expected_state)
    with forced_path("min_max", path):
        y = call(x, state)
    assert torch.equal(y, expected)
    assert all(map(torch.equal, state, expected_state))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_it_compiles(backend):
    torch._dynamo.reset()
    state, eager_state = fresh_state(), fresh_state()

    def step(x, *state):
        return call(x * 2, list(state)).sin()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for batch in batches()[1:4]:
        x, eager = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        y, expected = compiled(x, *state), step(eager, *eager_state)
        torch.testing.assert_close(y, expected)
        y.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(x.grad, eager.grad)
        assert all(map(same_bits, state, eager_state))


def test_changed_state_is_noticed_by_autograd():
    state = fresh_state()
    weight = torch.ones((), requires_grad=True)
    product = weight * state[2]  # saves the scale
    call(batches()[1], state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        call(batches()[1], state)


def test_bad_arguments_are_named():
    x, state = batches()[1], fresh_state()
    with pytest.raises(ValueError, match="observe_fake_quantize: x is empty"):
        call(x[:0], state)
    with pytest.raises(TypeError, match="min_val must be float32"):
        call(x, [state[0].double(), *state[1:]])
    with pytest.raises(ValueError, match="max_val must hold one element"):
        call(x, [state[0], torch.zeros(2), *state[2:]])
    with pytest.raises(ValueError, match="must be above 0 and at most 1, got 0"):
        ops.observe_fake_quantize(x, *state, 0.0, 0, 255, False)
    with pytest.raises(ValueError, match=r"must be finite, or .* got nan"):
        call(x, [torch.tensor(math.nan), torch.tensor(1.0), *state[2:]])
    with pytest.raises(ValueError, match="must not require one"):
        call(x, [state[0].clone().requires_grad_(), *state[1:]])


def test_an_average_that_would_overflow_leaves_the_range_as_it_is():
    x = torch.tensor([2e38, 3e38])
    for operator in ("observe", "batch_norm"):
        low, high = torch.tensor(-3e38), torch.tensor(0.0)
        scale, zero_point = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
        if operator == "observe":
            ops.observe_fake_quantize(x, low, high, scale, zero_point, 0.5, 0, 255, False)
        else:
            ones = torch.ones(1)
            ops.batch_norm_act(
                x.view(2, 1), ones, torch.tensor([2.5e38]), torch.zeros(1), ones * 1e38, None,
                False, 0.1, 1e-5, False, None, low, high, scale, zero_point, 0.5,
            )  # fmt: skip
        assert (low.item(), high.item()) == (torch.tensor(-3e38).item(), 0.0)


def test_a_gradient_written_in_place_is_a_new_version():
    grad = torch.ones(8)
    product = (a := torch.ones(8, requires_grad=True)) * grad
    torch.ops.qtoolkit.fake_quantize_mask_backward_(grad, torch.zeros(1, dtype=torch.uint8), 0)
    assert grad._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with pytest.raises(RuntimeError, match="would be overwritten"):
        torch.ops.qtoolkit.fake_quantize_mask_backward_(a, torch.zeros(1, dtype=torch.uint8), 0)


def test_state_that_requires_a_gradient_is_refused():
    scale = torch.ones(1, requires_grad=True)
    with pytest.raises(ValueError, match="scale is changed in place"):
        ops.batch_norm_act(
            torch.randn(4, 2), None, None, None, None, scale=scale,
            zero_point=torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
