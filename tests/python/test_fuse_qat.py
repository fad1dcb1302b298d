"""The QAT graph runs fused operators, and is taken apart again for convert."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from networks import Kinds, ResNet, digits, settle, trained
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qtoolkit as qt
from qtoolkit.graph.fuse_qat import fuse_qat, unfuse_qat
from qtoolkit.nn.qat import fused

X = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def prepared() -> nn.Module:
    return qt.prepare_qat(trained(), example_inputs=(X,))


def targets(model: nn.Module) -> list[object]:
    return [node.target for node in model.graph.nodes]


def step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_every_batch_norm_and_pool_of_a_resnet_is_fused():
    model = prepared()
    assert targets(model).count(fused.batch_norm_act) == 6
    assert targets(model).count(fused.max_pool2d) == 1
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    assert not any(name.endswith(("bn1", "bn2", "relu", "maxpool")) for name in called)


def test_every_convolution_is_told_the_format_of_its_input():
    """Also behind the max pooling, which only moves values."""
    model = prepared()
    calls = [node for node in model.graph.nodes if "conv" in str(node.target)]
    calls = [node for node in calls if node.op == "call_module"]
    assert len(calls) == 5
    assert all(len(node.args) == 2 and node.args[1].op == "get_attr" for node in calls)


def test_unfusing_gives_back_the_calls_of_the_modules():
    model = prepared()
    unfuse_qat(model)
    called = [str(node.target) for node in model.graph.nodes if node.op == "call_module"]
    assert called[1:6] == ["conv1", "bn1", "relu", "relu_fake_quantize", "maxpool"]
    assert fused.batch_norm_act not in targets(model)
    before = [(node.op, str(node.target)) for node in model.graph.nodes]
    fuse_qat(model)
    unfuse_qat(model)
    assert [(node.op, str(node.target)) for node in model.graph.nodes] == before


@pytest.mark.parametrize("rounding", [True, False])
def test_fused_training_is_the_training_of_the_modules(rounding):
    one, other = prepared(), prepared()
    unfuse_qat(other)
    if not rounding:
        qt.disable_fake_quant(one)
        qt.disable_fake_quant(other)
    # With rounding, a value at the edge of two codes may take the other one; without, one at the
    # kink of a ReLU may lie on its other side, which at most one batch of three may show.
    tolerance = 0.1 if rounding else 1e-4
    errors: dict[str, list[float]] = {}
    for x, y in digits()[0][:3]:
        loss, grads = step(one, x, y)
        expected, expected_grads = step(other, x, y)
        assert torch.allclose(loss, expected, rtol=1e-2 if rounding else 1e-5)
        for name, grad in grads.items():
            error = (grad - expected_grads[name]).norm() / expected_grads[name].norm()
            errors.setdefault(name, []).append(float(error))
    for name, values in errors.items():
        assert sorted(values)[1] < tolerance, name
        assert max(values) < max(tolerance, 1e-2), name
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values()):
        assert torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-3), name


@pytest.mark.parametrize("make", [copy.deepcopy, "pickle"])
def test_copies_stay_fused_and_convert(make):
    model = prepared()
    step(model, *digits()[0][0])
    if make == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = make(model)
    assert targets(other).count(fused.batch_norm_act) == 6
    x = digits()[1][0][0]
    with torch.no_grad():
        assert torch.equal(model.eval()(x), other.eval()(x))
        assert torch.equal(qt.convert(model)(x), qt.convert(other)(x))


def test_hooks_on_fused_modules_are_called():
    model = prepared()
    seen = []
    model.bn1.register_forward_hook(lambda *_: seen.append("bn1"))
    model.layer1.relu.register_forward_pre_hook(lambda *_: seen.append("relu"))
    model(X)
    assert seen == ["bn1", "relu"]


def test_a_module_put_in_the_place_of_a_fused_one_is_called():
    model = prepared()
    model(X)

    class Doubled(nn.Identity):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model.bn1 = Doubled()
    model.eval()
    before = model(X)
    model.bn1 = nn.Identity()
    assert not torch.equal(model(X), before)


def test_images_are_channels_last_inside_and_contiguous_outside():
    class Segmentation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.head = nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x).view(x.size(0), 4, -1, 5)

    x = torch.randn(2, 3, 6, 5)
    model = qt.prepare_qat(Segmentation(), example_inputs=(x,))
    seen = []
    model.get_submodule("head").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = model(x)
    assert y.is_contiguous()
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_residuals_activations_and_layouts_of_all_kinds_train():
    model = settle(Kinds(), (8, 3, 32, 32))
    torch.manual_seed(0)
    qat = qt.prepare_qat(model, example_inputs=(torch.randn(2, 3, 32, 32),))
    qt.disable_fake_quant(qat)
    other = copy.deepcopy(qat)
    unfuse_qat(other)
    x = torch.randn(8, 3, 32, 32)
    torch.manual_seed(1)
    y = qat(x)
    torch.manual_seed(1)
    assert torch.allclose(y, other(x), rtol=1e-4, atol=1e-4)
    qt.enable_fake_quant(qat)
    y = qat(x)
    y.sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in qat.parameters())


def test_a_float_checkpoint_loads_into_the_fused_model():
    model = ResNet()
    prepared().load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_shows_each_batch_to_the_observers_once(reentrant):
    x, y = digits()[0][0]
    one, other = prepared(), prepared()
    qt.freeze_bn(one)  # torch updates batch norms again when it recomputes
    qt.freeze_bn(other)
    for _ in range(2):
        output = checkpoint(other, x.clone().requires_grad_(), use_reentrant=reentrant)
        nn.functional.cross_entropy(output, y).backward()
        step(one, x, y)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_a_bfloat16_model_trains_without_the_operator():
    model = prepared().bfloat16()
    x, y = digits()[0][0]
    loss, grads = step(model, x.bfloat16(), y)
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
