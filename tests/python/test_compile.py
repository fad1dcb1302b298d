"""qt.compile: a converted network as plans, with the converted network's bits."""

from __future__ import annotations

import copy
import io
import os
import threading

import pytest
import torch
from networks import ResNet
from torch import Tensor, nn

import qtoolkit as qt
from qtoolkit import _C
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.plan import Plan


def images(count: int = 2, size: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, size, size, generator=generator)


def converted(model: nn.Module, x: Tensor, mapping: str = "x86") -> nn.Module:
    qconfig = qt.get_default_qconfig_mapping(mapping)
    prepared = qt.prepare(model.eval(), qconfig, example_inputs=(x,))
    qt.calibrate(prepared, [x, images(4, x.shape[-1], x.shape[1], 1)], progress=False)
    return qt.convert(prepared)


def plans(model: nn.Module) -> list[Plan]:
    return [module for module in model.modules() if isinstance(module, Plan)]


class Mixed(nn.Module):
    """All that a plan has a step for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        )
        self.pool = nn.MaxPool2d(2, ceil_mode=True)
        self.depthwise = nn.Conv2d(8, 8, 5, 1, 2, groups=8)
        self.grouped = nn.Conv2d(8, 12, 3, 1, 2, dilation=2, groups=2)
        self.average = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.norm = nn.BatchNorm2d(20)
        self.mix = nn.Conv2d(20, 16, 1)
        self.adaptive = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(64, 12)
        self.fc2 = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        a = torch.relu(self.average(self.depthwise(x)) + x)
        b = torch.cat([a, self.grouped(a)], 1)
        c = self.adaptive(self.mix(torch.relu(self.norm(b))))
        return self.fc2(torch.relu(self.fc1(torch.flatten(c, 1))))


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    q = converted(Mixed(), images())
    return q, qt.compile(q, images())


@pytest.mark.parametrize("mapping", ["x86", "qnnpack", "tensorrt"])
def test_a_quantized_network_is_one_operator_with_the_same_bits(mapping):
    """tensorrt's activations are int8."""
    torch.manual_seed(1)
    q = converted(Mixed(), images(), mapping)
    fast = qt.compile(q, images())
    assert len(plans(fast)) == 1
    assert not any(isinstance(module, QuantizedModule) for module in fast.modules())
    targets = [node.op for node in fast.graph.nodes]
    assert targets == ["placeholder", "call_module", "call_function", "output"]
    for count, size in [(2, 16), (1, 16), (7, 16), (3, 25), (2, 40)]:
        x = images(count, size, seed=count)
        assert torch.equal(fast(x), q(x))
        last = x.to(memory_format=torch.channels_last)
        assert torch.equal(fast(last), q(last))
        assert torch.equal(fast(x[:, :, :, : size - 1]), q(x[:, :, :, : size - 1]))


class Moves(nn.Module):
    """Steps that move codes, functions of one value and upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.shuffle = nn.ChannelShuffle(4)
        self.unshuffle = nn.PixelUnshuffle(2)
        self.b = nn.Conv2d(32, 32, 1)
        self.up = nn.PixelShuffle(2)
        self.nearest = nn.UpsamplingNearest2d(scale_factor=2)
        self.bilinear = nn.Upsample(scale_factor=0.5, mode="bilinear")
        self.c = nn.Conv2d(16, 8, 3, padding=1, padding_mode="reflect")
        self.d = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.shuffle(nn.functional.silu(self.a(x))).chunk(2, 1)
        wide = nn.functional.hardswish(self.b(self.unshuffle(right)))
        wide = self.bilinear(self.nearest(self.up(wide)))
        x = torch.cat([left, torch.sigmoid(wide)], 1)
        return self.fc(self.d(nn.functional.pad(self.c(x), (1, 0, 2, 1))).mean((2, 3)))


@pytest.mark.parametrize("mapping", ["x86", "tensorrt"])
def test_steps_that_move_codes(mapping):
    torch.manual_seed(6)
    q = converted(Moves(), images(), mapping)
    fast = qt.compile(q, images(), tune=False)
    assert len(plans(fast)) == 1
    assert not any(isinstance(module, QuantizedModule) for module in fast.modules())
    kinds = {step.step for step in fast.plan.steps}
    assert kinds >= {
        "lookup", "slice", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "pad",
        "upsample_nearest2d", "upsample_bilinear2d", "adaptive_avg_pool2d",
    }  # fmt: skip
    for x in (images(), images(3, 20), images(1, 28)):
        assert torch.equal(fast(x), q(x))


def test_threads_change_no_bits(mixed):
    q, fast = mixed
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for x in (images(1, 32), images(2, 192), images(9, 192)):
                assert torch.equal(fast(x), q(x))
    finally:
        torch.set_num_threads(before)


def test_an_empty_batch_gives_an_empty_result(mixed):
    _, fast = mixed
    assert fast(images(0)).shape == (0, 5)


@pytest.mark.parametrize("path", ["reference", "portable", "avx2", "avx512vnni", "amx"])
def test_every_path_gives_the_same_bits(mixed, path):
    q, fast = mixed
    if path not in _C.cpu_paths():
        pytest.skip(f"this CPU cannot run the {path} path")
    expected = q(images(3))
    _C.force_path(path)
    try:
        assert torch.equal(fast(images(3)), expected)
        assert _C.last_path("conv2d") == path
    finally:
        _C.force_path(None)


def scripted(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    return torch.jit.load(file)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, pickled, scripted])
def test_copies_and_files_give_the_same_bits(mixed, make):
    q, fast = mixed
    other = make(fast)
    for x in (images(), images(3, 25)):
        assert torch.equal(other(x), q(x))
    if make is not scripted:
        assert str(other.plan) == str(fast.plan)
        assert torch.equal(make(other)(images()), q(images()))


def test_a_torchscript_file_holds_each_weight_once_and_is_verified(mixed, tmp_path):
    _, fast = mixed
    report = qt.export.torchscript(fast, tmp_path / "fast.pt", images())
    assert report.verified
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 512, 3), nn.ReLU())
    wide = qt.compile(converted(wide, images()), images())
    report = qt.export.torchscript(wide, tmp_path / "wide.pt", images())
    assert 512 * 64 * 9 < report.size < 1.2 * 512 * 64 * 9


def test_the_model_is_not_changed_and_may_be_deleted():
    torch.manual_seed(2)
    q = converted(ResNet(), images(2, 16, 1))
    before = {name: tensor.clone() for name, tensor in q.state_dict().items()}
    graph = str(q.graph)
    expected = q(images(2, 16, 1))
    fast = qt.compile(q, images(2, 16, 1))
    assert str(q.graph) == graph
    assert all(torch.equal(before[name], tensor) for name, tensor in q.state_dict().items())
    pointers = {tensor.data_ptr() for tensor in q.state_dict().values()}
    del q
    assert torch.equal(fast(images(2, 16, 1)), expected)
    assert not pointers & {tensor.data_ptr() for tensor in fast.buffers()}


class WithFloat(nn.Module):
    """A layer without a kernel in the middle, one branch around it, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = torch.relu(self.a(x))
        b = torch.cumsum(self.b(a), 2)
        return self.c(b) + a, a.transpose(2, 3)


def test_layers_without_a_kernel_run_between_plans():
    torch.manual_seed(3)
    q = converted(WithFloat(), images())
    fast = qt.compile(q, images())
    assert len(plans(fast)) == 2
    for x in (images(), images(3, 20)):
        for one, other in zip(fast(x), q(x)):
            assert torch.equal(one, other)
            assert one.stride() == other.stride()
    reasons = {layer.name: layer.reason for layer in qt.explain(fast).float_layers}
    assert any("cumsum" in name for name in reasons)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 2 if float(y.sum()) > 0 else y


def test_the_captured_children_of_an_uncaptured_model_are_compiled():
    torch.manual_seed(4)
    q = converted(Untraceable(), images())
    fast = qt.compile(q, images())
    assert len(plans(fast)) == 1
    assert torch.equal(fast(images()), q(images()))


def test_explain_lists_the_steps_of_plans(mixed):
    q, fast = mixed
    layers = qt.explain(fast).layers
    assert {layer.name for layer in qt.explain(q).layers} <= {layer.name for layer in layers}
    assert all("in plan plan_0" in layer.kernel for layer in layers)


def test_the_table_of_steps(mixed):
    q, _ = mixed
    fast = qt.compile(q, images(), tune=False, profile=True)
    text = str(fast.plan)
    assert "stem.0" in text
    assert "conv2d_depthwise" in text
    assert all(step.ms is not None and step.ms >= 0 for step in fast.plan.steps)
    assert fast.plan.steps[1].multiplications == 2 * 8 * 8 * 8 * 27 or (
        fast.plan.steps[1].multiplications == 8 * 8 * 8 * 27
    )
    assert fast.plan.packed_bytes > 0
    assert fast.plan.arena_bytes > 0


def test_model_size_counts_the_weights(mixed):
    q, fast = mixed
    assert 0.9 * qt.model_size(q) < qt.model_size(fast) < 1.5 * qt.model_size(q)


def test_many_threads_may_call_one_plan(mixed):
    q, fast = mixed
    inputs = [images(1 + i % 3, 16 + 4 * (i % 2), seed=i) for i in range(6)]
    expected = [q(x) for x in inputs]
    wrong = []

    def work() -> None:
        for _ in range(20):
            for x, y in zip(inputs, expected):
                if not torch.equal(fast(x), y):
                    wrong.append(x.shape)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_process_computes_the_same(mixed):
    _, fast = mixed
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = fast(images(4, 32))
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(fast(images(4, 32)), expected) else 1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
    finally:
        torch.set_num_threads(before)


def test_sizes_are_kept_boundedly(mixed):
    q, fast = mixed
    for size in range(16, 40):
        fast(images(1, size))
    (plan,) = plans(fast)
    assert plan.plan.instances() <= 8
    assert torch.equal(fast(images()), q(images()))


# --- errors ---------------------------------------------------------------------------------------


def test_bad_arguments_say_what_to_do(mixed):
    q, fast = mixed
    with pytest.raises(TypeError, match=r"compile needs a torch\.nn\.Module, got int"):
        qt.compile(3, images())
    with pytest.raises(ValueError, match=r"compile needs the result of qt\.convert"):
        qt.compile(nn.Linear(2, 2), images())
    with pytest.raises(ValueError, match="compiled already"):
        qt.compile(fast, images())
    with pytest.raises(TypeError, match="example_inputs must be"):
        qt.compile(q, 3)


def test_bad_inputs_say_what_is_wrong(mixed):
    _, fast = mixed
    with pytest.raises(TypeError, match="input 0 must be Float, got"):
        fast(images().double())
    with pytest.raises(ValueError, match=r"step 'stem\.0' \(conv2d\): takes 3 channels, got 4"):
        fast(images(channels=4))
    with pytest.raises(ValueError, match="input 0 must have 4 dimensions"):
        fast(images()[0])
    with pytest.raises(ValueError, match="larger than the padded input"):
        fast(images(1, 1)[:, :, :, :0])
    (plan,) = plans(fast)
    with pytest.raises(ValueError, match="takes 1 inputs, got 2"):
        plan([images(), images()])


def test_a_plan_of_a_newer_version_is_refused(mixed):
    _, fast = mixed
    (plan,) = plans(fast)
    head, steps, tail = plan.plan.state()
    with pytest.raises(ValueError, match="a plan of version 99"):
        qt.ops.make_plan(((99, *head[1:]), steps, tail))
    (kinds, names, inputs), integers, constants = steps
    changed = (["teleport", *kinds[1:]], names, inputs)
    with pytest.raises(ValueError, match="no step 'teleport'"):
        qt.ops.make_plan((head, (changed, integers, constants), tail))
    broken = [dict(entry) for entry in constants]
    broken[1]["weight"] = broken[1]["weight"][:, :1]
    made = qt.ops.make_plan((head, ((kinds, names, inputs), integers, broken), tail))
    with pytest.raises(ValueError, match="channels"):
        qt.ops.run_plan(made, [images()])


def test_meta_tensors_tell_the_outputs_shape(mixed):
    _, fast = mixed
    (plan,) = plans(fast)
    (y,) = torch.ops.qtoolkit.run_plan(plan.plan, [images(3).to("meta")])
    assert y.shape == (3, 5)
    assert y.device.type == "meta"


class ChannelsLastLinear(nn.Module):
    """Linear layers on images whose channels are last, as in ConvNeXt and Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv(x)).permute(0, 2, 3, 1)
        return self.down(torch.relu(self.up(x))).permute(0, 3, 1, 2)


def test_linear_layers_of_images_stay_outside_plans():
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    prepared = qt.prepare(ChannelsLastLinear().eval(), None, x)
    prepared(x)
    quantized = qt.convert(prepared)
    assert torch.equal(qt.compile(quantized, x)(x), quantized(x))
