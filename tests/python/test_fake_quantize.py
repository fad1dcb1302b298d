"""FakeQuantize: values, straight-through gradients, modes, flags and state."""

import copy
import pickle

import pytest
import torch
from torch import nn

from qtoolkit.fake_quantize import FakeQuantize
from qtoolkit.observers import MinMaxObserver
from qtoolkit.qconfig import TensorSpec

ACTIVATION = TensorSpec(observer="moving_average")
SYMMETRIC = TensorSpec("int8", symmetric=True, observer="moving_average")
WEIGHT = TensorSpec("int8", "per_channel", symmetric=True, observer="per_channel_minmax")
WEIGHT_PER_TENSOR = TensorSpec("int8", symmetric=True, observer="minmax")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(spec, *batches, **options):
    module = FakeQuantize(spec, "block.conv", **options)
    for batch in batches:
        module(batch)
    return module


def expected_values(x, module):
    """torch's own fake quantization with the module's scale and zero point."""
    spec = module.spec
    scale, zero_point = module.calculate_qparams()
    if spec.granularity == "per_tensor":
        return torch.fake_quantize_per_tensor_affine(
            x, scale, zero_point, spec.quant_min, spec.quant_max
        )
    return torch.fake_quantize_per_channel_affine(
        x, scale, zero_point, spec.axis, spec.quant_min, spec.quant_max
    )


@pytest.mark.parametrize("spec", [ACTIVATION, SYMMETRIC, WEIGHT, WEIGHT_PER_TENSOR])
def test_values_are_those_of_torch(spec):
    x = randn(6, 3, 5, 5)
    module = FakeQuantize(spec)
    y = module(x)
    assert torch.equal(y, expected_values(x, module))
    assert not torch.equal(y, x)


@pytest.mark.parametrize("spec", [ACTIVATION, SYMMETRIC, WEIGHT])
def test_gradient_passes_inside_the_range_only(spec):
    module = trained(spec, randn(6, 50))
    module.freeze()
    x = (randn(6, 50, seed=1) * 3).requires_grad_()
    module(x).backward(grad := randn(6, 50, seed=2))
    reference = x.detach().clone().requires_grad_()
    expected_values(reference, module).backward(grad)
    assert torch.equal(x.grad, reference.grad)
    assert 0 < (x.grad == 0).sum() < x.numel()


def test_activation_is_observed_in_training_mode_only():
    module = trained(ACTIVATION, randn(100))
    scale = module.scale.clone()
    module.eval()
    module(randn(100) * 50)
    assert torch.equal(module.scale, scale)
    module.train()
    module(randn(100) * 50)
    assert module.scale > scale


def test_frozen_activation_keeps_its_range():
    module = trained(ACTIVATION, randn(100))
    scale = module.scale.clone()
    module.freeze()
    module(randn(100) * 50)
    assert torch.equal(module.scale, scale)
    module.unfreeze()
    module(randn(100) * 50)
    assert module.scale > scale


@pytest.mark.parametrize(
    ("spec", "options"), [(WEIGHT, {}), (WEIGHT_PER_TENSOR, {"is_weight": True})]
)
@pytest.mark.parametrize("training", [True, False])
def test_range_of_a_weight_follows_the_weight(spec, options, training):
    weight = randn(4, 3, 3, 3)
    module = FakeQuantize(spec, **options).train(training)
    module(weight * 10)
    assert torch.equal(module(weight), expected_values(weight, module))
    assert module.scale.max() == weight.abs().max() / 127
    module.freeze()
    module(weight * 10)
    assert module.scale.max() == weight.abs().max() / 127


@pytest.mark.parametrize("frozen", [True, False])
def test_activation_without_data_is_an_error_that_names_it(frozen):
    module = FakeQuantize(ACTIVATION, "layer1.0.relu")
    if frozen:
        module.freeze()
    else:
        module.eval()
    with pytest.raises(RuntimeError, match=r"'layer1\.0\.relu' has seen no data.*calibrate"):
        module(randn(3))
    with pytest.raises(RuntimeError, match=r"'layer1\.0\.relu' has seen no data"):
        module.calculate_qparams()


def test_errors_of_the_observer_name_the_module_after_a_rename():
    module = FakeQuantize(ACTIVATION)
    module.name = "head"
    assert module.name == "head"
    with pytest.raises(ValueError, match=r"'head'.*NaN or Inf"):
        module(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TypeError, match="'head': needs a float tensor"):
        module(torch.tensor([1]))


def test_non_finite_scale_is_an_error_when_qparams_are_asked_for():
    module = trained(ACTIVATION, randn(5))
    module.scale.fill_(float("nan"))  # as an accelerator records it without a check
    with pytest.raises(ValueError, match=r"'block\.conv'.*NaN or Inf"):
        module.calculate_qparams()


def test_switched_off_it_observes_and_passes_the_tensor():
    module = FakeQuantize(ACTIVATION)
    module.enable_fake_quant(False)
    x = randn(100)
    assert module(x) is x
    expected = MinMaxObserver()
    expected(x)
    assert torch.equal(module.scale, expected.calculate_qparams()[0])
    module.enable_fake_quant()
    assert not torch.equal(module(x), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", [ACTIVATION, WEIGHT])
def test_half_precision_is_computed_in_float32_and_cast_back(spec, dtype):
    module = FakeQuantize(spec).to(dtype)
    x = randn(6, 20).to(dtype).requires_grad_()
    y = module(x)
    assert y.dtype == dtype
    assert module.scale.dtype == torch.float32
    assert torch.equal(y, expected_values(x.float(), module).to(dtype))
    y.sum().backward()
    assert x.grad.dtype == dtype


def test_works_under_autocast():
    linear, module = nn.Linear(8, 4), FakeQuantize(ACTIVATION)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(linear(randn(2, 8)))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.weight.grad is not None


def test_a_module_used_twice_before_backward():
    module = FakeQuantize(ACTIVATION)
    x = randn(50).requires_grad_()
    y = module(module(x) * 3)
    module(x.detach() * 7)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("spec", [ACTIVATION, SYMMETRIC, WEIGHT])
def test_training_reads_no_value_on_the_host(spec):
    # Reading a value of a meta tensor is an error; of an accelerator's, a wait.
    module = FakeQuantize(spec).to("meta")
    x = torch.randn(4, 5, device="meta", requires_grad=True)
    for _ in range(2):
        y = module(x)
    y.sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("spec", [ACTIVATION, WEIGHT])
def test_compiles_without_graph_break(spec, frozen):
    module = trained(spec, randn(4, 5))
    if frozen:
        module.freeze()
    reference = copy.deepcopy(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = randn(4, 5, seed=1).requires_grad_()
    y = compiled(x)
    assert torch.equal(y, reference(x))
    assert torch.equal(module.scale, reference.scale)
    y.sum().backward()
    assert x.grad is not None


def test_scale_and_zero_point_are_updated_in_place():
    module = trained(WEIGHT, randn(4, 5))
    before = (module.scale, module.zero_point)
    module(randn(4, 5) * 3)
    assert (module.scale, module.zero_point) == before
    assert all(a is b for a, b in zip((module.scale, module.zero_point), before))


# --- state --------------------------------------------------------------------------------------


def through_state_dict(module):
    fresh = FakeQuantize(module.spec, is_weight=module.is_weight)
    fresh.load_state_dict(module.state_dict(), strict=True)
    return fresh.train(module.training)


COPIES = {
    "state_dict": through_state_dict,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
}
SETTINGS = {
    "training": lambda module: module.train(),
    "eval": lambda module: module.eval(),
    "frozen": lambda module: module.freeze(),
    "off": lambda module: module.enable_fake_quant(False),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("spec", [ACTIVATION, WEIGHT])
def test_a_resumed_run_continues_exactly(spec, how, setting):
    module = trained(spec, randn(4, 50), randn(4, 50, seed=1))
    SETTINGS[setting](module)
    resumed = COPIES[how](module)
    for seed in range(2, 5):
        x = randn(4, 50, seed=seed) * seed
        assert torch.equal(resumed(x), module(x))
    for key, value in module.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


def test_a_fresh_state_dict_takes_the_data_back():
    module = trained(WEIGHT, randn(4, 5))
    module.load_state_dict(FakeQuantize(WEIGHT).state_dict())
    with pytest.raises(RuntimeError, match="has seen no data"):
        module.calculate_qparams()


class Layer(nn.Linear):
    def __init__(self, *args):
        super().__init__(*args)
        self.weight_fake_quant = FakeQuantize(WEIGHT)
        self.output_fake_quant = FakeQuantize(ACTIVATION)


def test_a_float_checkpoint_loads_with_strict():
    layer = Layer(3, 2)
    layer.output_fake_quant(randn(10))
    scale = layer.output_fake_quant.scale.clone()
    reference = nn.Linear(3, 2)
    layer.load_state_dict(reference.state_dict(), strict=True)
    assert torch.equal(layer.weight, reference.weight)
    assert torch.equal(layer.output_fake_quant.scale, scale)
    with pytest.raises(RuntimeError, match="weight"):
        layer.load_state_dict({"bias": reference.bias}, strict=True)


def test_state_with_another_number_of_flags_is_an_error():
    state = trained(ACTIVATION, randn(5)).state_dict()
    state["_extra_state"] = torch.ones(7, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected 3 flags"):
        FakeQuantize(ACTIVATION).load_state_dict(state)


def test_repr_shows_format_and_flags():
    module = trained(WEIGHT, randn(4, 5))
    module.freeze()
    assert "int8, per_channel, weight, frozen" in repr(module)
