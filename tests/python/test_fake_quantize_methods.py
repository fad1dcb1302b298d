"""Each fake-quantize method: how it begins, what it learns, what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from low_bit import A8, MAPPINGS, W8, activation, weight
from networks import ResNet, settle
from torch import nn

import qtoolkit as qt
from qtoolkit.fake_quantize import FakeQuantize, make_fake_quantize, registered_methods
from qtoolkit.qconfig import QConfig, QConfigMapping, TensorSpec

X = torch.randn(2, 1, 8, 8)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def begun(spec: TensorSpec, x: torch.Tensor, is_weight: bool | None = None) -> FakeQuantize:
    module = make_fake_quantize(spec, "layer", is_weight)
    module(x)
    return module


def test_the_methods():
    assert set(registered_methods()) >= {
        *("observed", "lsq", "lsq+", "pact", "twn", "xnor", "float", "block_float")
    }
    for name, mapping in MAPPINGS.items():
        spec = mapping.global_qconfig.weight
        assert type(FakeQuantize(spec)) is type(make_fake_quantize(spec)), name


@pytest.mark.parametrize("name", MAPPINGS)
def test_mappings_round_trip_through_json(name):
    mapping = MAPPINGS[name]
    assert QConfigMapping.from_json(json.loads(mapping.to_json())) == mapping


# --- LSQ ----------------------------------------------------------------------------------------


def test_lsq_weights_begin_with_the_rule_of_the_paper():
    w = randn(6, 4, 3, 3)
    module = begun(weight("int4", method="lsq", symmetric=False), w)
    expected = 2 * w.abs().mean((1, 2, 3)) / 7**0.5
    assert torch.allclose(module.scale, expected)
    assert isinstance(module.scale, nn.Parameter)
    scale, zero_point = module.calculate_qparams()
    assert scale.shape == zero_point.shape == (6,)
    assert zero_point.dtype == torch.int32
    assert (zero_point == 0).all()
    module(10 * w)
    assert torch.equal(module.scale, scale)


def test_lsq_activations_without_negative_values_begin_at_zero():
    x = torch.relu(randn(8, 5, 4, 4))
    module = begun(activation("uint4", method="lsq"), x)
    assert module.scale.shape == (1,)
    assert torch.allclose(module.scale, 2 * x.abs().mean() / 15**0.5)
    assert module.calculate_qparams()[1] == 0
    assert module.calculate_qparams()[0].shape == ()


@pytest.mark.parametrize("method", ["lsq", "lsq+", "pact"])
def test_unsigned_formats_do_not_cut_negative_values_off(method):
    x = randn(64, 5, 4, 4) - 0.5
    module = begun(activation("uint4", method=method), x)
    y = module(x)
    scale, zero_point = module.calculate_qparams()
    assert 0 < zero_point < 15
    # 15 steps over the range that was found: most values are within half a step.
    assert ((y - x).abs() <= scale / 2 + 1e-6).float().mean() > 0.98
    negative = x < -scale
    assert (y[negative] < 0).all()
    assert len(y.unique()) == 16


@pytest.mark.parametrize(
    ("options", "low", "high", "zero_point"),
    [
        ({"symmetric": True}, -7, 7, 0),
        ({}, -8, 7, 0),
    ],
)
def test_lsq_signed_activations(options, low, high, zero_point):
    module = begun(activation("int4", method="lsq", **options), randn(500, 9))
    assert module.calculate_qparams()[1] == zero_point
    codes = (module(100 * randn(500, 9)) / module.scale).detach()
    assert (round(float(codes.min())), round(float(codes.max()))) == (low, high)


def test_lsq_signed_activations_without_negative_values_use_every_code():
    module = begun(activation("int4", method="lsq"), torch.relu(randn(500, 9)))
    assert module.calculate_qparams()[1] == -8


def test_gradient_scale_of_lsq():
    w = randn(6, 40)
    module = begun(weight("int4", method="lsq"), w)
    reference = module.scale.detach().clone().requires_grad_()
    qt.ops.fake_quantize_lsq(w, reference, None, 0, -7, 7, 1.0).sum().backward()
    module(w).sum().backward()
    assert torch.allclose(module.scale.grad, reference.grad / (40 * 7) ** 0.5)
    x = torch.relu(randn(16, 40))
    module = begun(activation("uint4", method="lsq"), x)
    reference = module.scale.detach().clone().requires_grad_()
    qt.ops.fake_quantize_lsq(x, reference, None, None, 0, 15, 1.0).sum().backward()
    module(x).sum().backward()
    assert torch.allclose(module.scale.grad, reference.grad / (40 * 15) ** 0.5)


def test_lsq_learns_a_better_scale():
    w = randn(4, 1000)
    module = begun(weight("int3", method="lsq", symmetric=False), w)
    optimizer = torch.optim.SGD(module.parameters(), 0.2)
    errors = []
    for _ in range(30):
        optimizer.zero_grad()
        error = (module(w) - w).square().sum()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.9 * errors[0]


def test_lsq_plus_begins_with_its_observer_and_learns_the_zero_point():
    x = randn(64, 30) + 1
    observer = qt.observers.HistogramObserver(TensorSpec("uint4"))
    observer(x)
    module = begun(activation("uint4", method="lsq+", observer="histogram"), x)
    scale, zero_point = observer.calculate_qparams()
    assert torch.equal(module.scale[0], scale)
    assert torch.equal(module.calculate_qparams()[1], zero_point)
    module(3 * x).sum().backward()
    assert module.zero_point.grad.abs() > 0
    assert [name for name, _ in module.named_parameters()] == ["scale", "zero_point"]


def test_lsq_plus_weights_begin_with_three_standard_deviations():
    w = randn(6, 50) + 0.1
    module = begun(weight("int4", method="lsq+", symmetric=False), w)
    deviation, mean = torch.std_mean(w, 1, correction=0)
    expected = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs()) / 8
    assert torch.allclose(module.scale, expected)
    assert [name for name, _ in module.named_parameters()] == ["scale"]


# --- PACT ---------------------------------------------------------------------------------------


def test_pact_begins_with_the_greatest_value_and_learns_from_what_it_clips():
    x = torch.relu(randn(8, 50))
    module = begun(activation("uint4", method="pact"), x)
    assert module.alpha == x.max()
    assert torch.equal(module.calculate_qparams()[0], x.max() / 15)
    y = module(2 * x)
    y.sum().backward()
    assert module.alpha.grad == (2 * x >= x.max()).sum()
    assert torch.isclose(y.max(), x.max())


# --- ternary and binary -------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_twn_is_the_rule_of_the_paper(granularity):
    w = randn(5, 7, 3, 3)
    spec = weight("ternary", method="twn", granularity=granularity)
    module = make_fake_quantize(spec, is_weight=True).eval()
    y = module(w)
    rows = w.flatten(1) if granularity == "per_channel" else w.reshape(1, -1)
    for row, result in zip(rows, y.reshape(rows.shape)):
        beyond = row.abs() > 0.7 * row.abs().mean()
        expected = row.abs()[beyond].mean() * torch.sign(row) * beyond
        assert torch.allclose(result, expected)
    before = module.scale.clone()
    module(2 * w)  # taken anew at each call
    assert torch.allclose(module.scale, 2 * before)


def test_xnor_is_the_rule_of_the_paper():
    w = randn(5, 7, 3, 3)
    w[0, 0, 0, 0] = 0
    y = make_fake_quantize(weight("binary", method="xnor"))(w)
    scale = w.abs().mean((1, 2, 3), keepdim=True)
    assert torch.allclose(y, torch.where(w >= 0, scale, -scale))


@pytest.mark.parametrize("name", ["twn", "xnor", "lsq", "lsq+", "fp8", "observed"])
def test_a_weight_of_zeros_stays_finite(name):
    w = torch.zeros(3, 4, 1, 1, requires_grad=True)
    module = make_fake_quantize(MAPPINGS[name].global_qconfig.weight)
    y = module(w)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert (module.calculate_qparams()[0] > 0).all()
    assert y.abs().max() < 1e-6


# --- floats -------------------------------------------------------------------------------------


def test_fp8_maps_the_greatest_magnitude_to_the_greatest_number():
    w = randn(5, 70)
    module = begun(weight("fp8_e4m3", method="float"), w)
    assert torch.allclose(module.scale, w.abs().amax(1) / 448)
    y = module(w)
    assert torch.allclose(y.abs().amax(1), w.abs().amax(1))
    assert ((y - w).abs() <= w.abs() * 2**-4 + 1e-3).all()


@pytest.mark.parametrize(("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_16_bit_floats_are_those_of_torch(name, dtype):
    x = randn(300)
    module = begun(activation(name, method="float"), x)
    assert torch.equal(module(x), x.to(dtype).float())


@pytest.mark.parametrize(("name", "least"), [("mxfp8", 25), ("mxfp4", 15), ("nvfp4", 18)])
def test_blocks_of_floats(name, least):
    x = randn(4, 70, 6, 5) * torch.logspace(-3, 3, 4).reshape(4, 1, 1, 1)
    module = begun(activation(name, method="block_float"), x)
    y = module(x)
    assert y.shape == x.shape
    noise = (y - x).square().mean((1, 2, 3))[1:] / x.square().mean((1, 2, 3))[1:]
    assert (-10 * torch.log10(noise) > least).all()


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "magic"}, "unknown method 'magic': use one of .*lsq.*observed"),
        ({"format": "fp8_e4m3"}, "'observed' quantizes to integer .*: use method 'float'"),
        ({"format": "mxfp4", "method": "lsq"}, "mxfp4 is block_float: use method 'block_float'"),
        ({"format": "binary", "method": "lsq"}, "binary is binary: use method 'xnor'"),
        ({"format": "ternary"}, "use method 'lsq' or 'lsq\\+' or 'twn'"),
        ({"format": "int4", "method": "twn"}, "int4 is integer: use method 'lsq'"),
        ({"format": "int4", "method": "pact"}, "unsigned affine formats, such as uint4"),
        ({"format": "uint4", "method": "lsq", "symmetric": True}, "signed format.*int4"),
        (
            {"format": "int4", "granularity": "per_group", "group_size": 8, "method": "lsq"},
            "is for granularity per_tensor or per_channel, not per_group",
        ),
        (
            {"format": "bf16", "granularity": "per_channel", "method": "float"},
            "no scale for bf16: use granularity per_tensor",
        ),
        (
            {"format": "int4", "granularity": "per_group", "group_size": 8},
            "'histogram' is for granularity per_tensor",
        ),
        ({"granularity": "per_group", "group_size": 0}, "group_size must be positive"),
    ],
)
def test_a_spec_that_cannot_be_is_an_error_that_says_what_to_use(fields, message):
    with pytest.raises(ValueError, match=message):
        TensorSpec(**fields)


@pytest.mark.parametrize(
    ("activation_spec", "weight_spec", "message"),
    [
        (weight("ternary", method="twn", granularity="per_tensor"), W8, "'twn' is for weights"),
        (A8, activation("uint4", method="pact"), "'pact' is for activations"),
        (A8, activation("uint4", method="lsq"), "weight: method 'lsq' needs a signed format.*int4"),
        (W8, W8, "activations are quantized per tensor"),
    ],
)
def test_a_qconfig_with_a_method_in_the_wrong_role_is_an_error(
    activation_spec, weight_spec, message
):
    with pytest.raises(ValueError, match=message):
        QConfig(activation_spec, weight_spec)


def test_post_training_quantization_has_no_learned_method():
    mapping = QConfigMapping().set_global(QConfig(A8, weight("int4", method="lsq")))
    with pytest.raises(ValueError, match=r"conv1.*method 'lsq'.*qt\.prepare_qat"):
        qt.prepare(settle(ResNet(), (8, 1, 8, 8)), mapping, (X,))


# --- the preset ---------------------------------------------------------------------------------


def test_low_bit_mapping_keeps_the_first_and_the_last_layer_at_8_bits():
    mapping = qt.low_bit_qconfig_mapping(ResNet(), "w4a4")
    for name, kind in (("conv1", nn.Conv2d), ("fc", nn.Linear), ("avgpool", nn.AdaptiveAvgPool2d)):
        qconfig = mapping.qconfig_for(name, kind)
        assert (qconfig.activation.format, qconfig.weight.format) == ("uint8", "int8")
    inner = mapping.qconfig_for("layer1.conv1", nn.Conv2d)
    assert (inner.activation.format, inner.activation.method) == ("uint4", "lsq")
    assert (inner.weight.format, inner.weight.method) == ("int4", "lsq")
    assert inner.weight.granularity == "per_channel"
    alike = qt.low_bit_qconfig_mapping(ResNet(), "w4a4", edge_bits=None)
    assert alike.qconfig_for("conv1", nn.Conv2d).weight.format == "int4"
    assert QConfigMapping.from_json(mapping.to_json()) == mapping


@pytest.mark.parametrize("target", ["x86", "qnnpack", "tensorrt", "tflite"])
@pytest.mark.parametrize("bits", ["w8a8", "w3a5", "ternary", "binary"])
@pytest.mark.parametrize("method", ["observed", "lsq", "lsq+"])
def test_low_bit_mappings_of_every_target(bits, method, target):
    mapping = qt.low_bit_qconfig_mapping(ResNet(), bits, method=method, target=target)
    inner = mapping.qconfig_for("layer1.conv1", nn.Conv2d)
    formats = {"w8a8": "int8", "w3a5": "int3"}
    assert inner.weight.format == formats.get(bits, bits)
    signed = target in ("tensorrt", "tflite")
    assert inner.activation.format.startswith("int" if signed else "uint")
    assert inner.activation.format.endswith("5" if bits == "w3a5" else "8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": "w7a4"}, r"unknown bits 'w7a4'.*\[8, 6, 5, 4, 3, 2\].*ternary, binary"),
        ({"bits": 4}, "unknown bits 4"),
        ({"method": "twn"}, "unknown method 'twn': use one of observed, lsq"),
        ({"edge_bits": 4}, "edge_bits must be 8 or None"),
        ({"target": "arm"}, "unknown target"),
        ({"method": "pact", "target": "tensorrt"}, "unsigned activations"),
    ],
)
def test_low_bit_mapping_rejects(options, message):
    with pytest.raises(ValueError, match=message):
        qt.low_bit_qconfig_mapping(ResNet(), **options)
