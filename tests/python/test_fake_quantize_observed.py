"""ObservedFakeQuantize with a moving average: one operator does what observer and rounding do."""

import math
import warnings

import pytest
import torch
from op_reference import seeded
from torch import Tensor

from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.qconfig import TensorSpec

SPECS = [
    TensorSpec(observer="moving_average"),
    TensorSpec("int8", symmetric=True, observer="moving_average"),
]


def batch(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(4, 6, 10, generator=seeded(seed)) * (seed + 1)).to(dtype)


def module_for(spec: TensorSpec, on_nonfinite: str) -> FakeQuantize:
    module = FakeQuantize(spec, "block.conv")
    module.on_nonfinite = on_nonfinite
    return module


def operators(module: FakeQuantize, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        module(x)
    return {e.key for e in profile.key_averages() if e.key.startswith("qtoolkit::")}


def test_it_is_one_operator_where_data_is_skipped():
    assert operators(module_for(SPECS[0], "skip"), batch(0)) == {"qtoolkit::observe_fake_quantize"}
    assert "qtoolkit::min_max" in operators(module_for(SPECS[0], "error"), batch(0))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operator_and_two_give_the_same_bits(spec, dtype):
    one, two = module_for(spec, "skip"), module_for(spec, "error")
    for seed in (2, 0, 1, 0):
        results = []
        for module in (one, two):
            x = batch(seed, dtype).requires_grad_()
            y = module(x)
            y.backward(batch(9, dtype))
            results.append((y, x.grad))
        for a, b in zip(*results):
            assert torch.equal(a, b)
        for (name, a), b in zip(one.state_dict().items(), two.state_dict().values()):
            assert torch.equal(a, b), name
    one.eval(), two.eval()
    assert torch.equal(one(batch(5)), two(batch(5)))


def test_data_that_is_not_finite_is_skipped_with_one_warning():
    module = module_for(SPECS[0], "skip")
    poisoned = batch(1)
    poisoned[0, 0, 0] = math.nan
    with pytest.warns(UserWarning, match="'block.conv': the data holds NaN or Inf"):
        y = module(poisoned)
    assert not module.ready
    torch.testing.assert_close(y, poisoned, rtol=0, atol=0, equal_nan=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(batch(0))
        before = {name: t.clone() for name, t in module.state_dict().items()}
        module(poisoned)
        module(batch(0).clamp(module.observer.min_val, module.observer.max_val))
        for name, t in module.state_dict().items():
            assert torch.equal(t, before[name]), name
    with pytest.raises(ValueError, match=r"'block.conv': got an empty tensor"):
        module(torch.zeros(0, 3))


def test_it_compiles():
    torch._dynamo.reset()
    module, eager = module_for(SPECS[0], "skip"), module_for(SPECS[0], "skip")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for seed in (1, 0, 2):
        x, leaf = batch(seed).requires_grad_(), batch(seed).requires_grad_()
        y, expected = compiled(x), eager(leaf)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(x.grad, leaf.grad)
    for name in ("scale", "zero_point"):
        assert torch.equal(getattr(module, name), getattr(eager, name))
