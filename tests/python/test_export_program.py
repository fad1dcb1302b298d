"""The QDQ form of converted models, and the way that all export targets go."""

from __future__ import annotations

import copy
import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.export import registry
from qtoolkit.export.files import staged
from qtoolkit.export.program import QdqProgram, tensors_of
from qtoolkit.export.verify import compare_layers, compare_output
from qtoolkit.nn import QParams


class Everything(nn.Module):
    """Residuals, cuts, movers, gates, tables, concatenation and a float part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self.norm(self.stem(x)))
        x = functional.relu(self.point(self.depthwise(x)) + x)
        a, b = x.chunk(2, 1)
        x = torch.cat([b, functional.hardswish(a)], 1)
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        x = functional.pad(self.up(self.pool(x)), (1, 0, 0, 1))
        x = functional.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
        x = torch.cat([x.amax((2, 3)), functional.adaptive_avg_pool2d(x, 1).flatten(1)], 1)
        return self.head(x)


def converted(model: nn.Module, x: torch.Tensor, target: str = "x86") -> nn.Module:
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping(target), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Everything().eval()


def codes_of(quantized: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output of a converted model, and what its layers give."""
    codes_of_layers = {}
    hooks = [
        module.register_forward_hook(lambda _, __, y, n=name: codes_of_layers.__setitem__(n, y))
        for name, module in quantized.named_modules()
        if isinstance(module, qt.nn.QuantizedModule)
    ]
    with torch.no_grad():
        expected = quantized(x)
    for hook in hooks:
        hook.remove()
    return expected, codes_of_layers


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_the_qdq_form_computes_the_models_codes(model, x, target):
    quantized = converted(model, x, target)
    # The model does not round the value before an addition.
    quantized.point.branch_scale = quantized.point.branch_zero_point = None
    program = QdqProgram.trace(quantized, (x[:1],))
    assert program.fixed_batch is None
    outputs, codes = program.run([x])
    expected, codes_of_layers = codes_of(quantized, x)
    common = codes.keys() & codes_of_layers.keys()
    assert len(common) > 12
    # Each layer is computed from the model's own codes, so roundings do not accumulate.
    given = {name: codes_of_layers[name] for name in common}
    _, again = program.run([x], given)
    for name in common:
        difference = (again[name].int() - codes_of_layers[name].int()).abs()
        assert difference.max() <= 1, name
        # Bilinear weights are quarters: many values lie half way between two codes.
        most = 0.03 if name == "interpolate" else 0.001
        assert (difference > 0).double().mean() < most, name
    assert compare_output(expected, outputs[0], None).sqnr > 30


@pytest.mark.parametrize("target", ["x86", "tensorrt"])
def test_a_value_before_an_addition_is_rounded_as_two_integer_layers_do(model, x, target):
    quantized = converted(model, x, target)
    expected, codes = codes_of(quantized, x)
    outputs, again = QdqProgram.trace(quantized, (x,)).run([x], codes)
    layer = quantized.point
    low, high = (-128, 127) if target == "tensorrt" else (0, 255)
    branch = QParams(layer.branch_scale, layer.branch_zero_point, low, high)
    residual = QParams(layer.residual_scale, layer.residual_zero_point, low, high)
    output = QParams(layer.output_scale, layer.output_zero_point, layer.quant_min, layer.quant_max)
    convolution = copy.deepcopy(layer)
    convolution._register_qparams("residual", None)
    convolution._register_output(branch)
    convolution.relu = False
    addition = qt.nn.Add(branch, residual, output=output, relu=True)
    before = convolution(codes["depthwise"])
    for name, right in (("point.branch", before), ("point", addition(before, codes["stem"]))):
        difference = (again[name].int() - right.int()).abs()
        assert difference.max() <= 1, name
        assert (difference > 0).double().mean() < 0.001, name
    assert before.unique().numel() > 100
    assert compare_output(expected, outputs[0], None).sqnr > 30


def test_relu_is_left_out_where_the_codes_imply_it(model, x):
    def kinds(target: str) -> set[str]:
        program = QdqProgram.trace(converted(model, x, target), (x,))
        return {str(node.target) for node in program.graph.nodes}

    assert "aten.relu.default" not in kinds("x86")  # uint8 with zero point 0
    assert "aten.relu.default" in kinds("tensorrt")  # int8 with zero point 0


def test_a_mover_keeps_the_quantization_of_its_input(model, x):
    program = QdqProgram.trace(converted(model, x), (x,))
    nodes = {str(n.args[-1]): n for n in program.graph.nodes if "export.quantize" in str(n.target)}
    pool = next(node for name, node in nodes.items() if name.startswith("pool"))
    source = pool.args[0].args[0]  # max_pool2d's input
    assert "dequantize" in str(source.target)
    assert torch.equal(program.constant(pool.args[1]), program.constant(source.args[1]))


def test_every_constant_of_a_weight_is_codes(model, x):
    program = QdqProgram.trace(converted(model, x), (x,))
    for node in program.graph.nodes:
        if str(node.target) == "aten.conv2d.default":
            weight, bias = node.args[1], node.args[2]
            assert program.constant(weight.args[0]).dtype == torch.int8
            assert program.constant(bias.args[0]).dtype == torch.int32
            assert program.constant(weight.args[1]).shape == (weight.meta["val"].shape[0],)


def test_a_layer_that_departs_is_seen_alone(model, x):
    program = QdqProgram.trace(converted(model, x), (x,))
    _, codes = program.run([x])
    wrong = dict(codes)
    wrong["point"] = (codes["point"].int() + 3).clamp(max=255).to(torch.uint8)
    report, layers = compare_layers(program, [x], wrong)
    # What follows "point" was computed from its right codes, and departs from the wrong ones.
    assert layers[[name for name, _, _ in layers].index("point")][1] == 3
    assert report.worst is not None
    before = [name for name, _, _ in layers][: [n for n, _, _ in layers].index("point")]
    assert all(steps == 0 for name, steps, _ in layers if name in before)


def test_only_a_value_at_the_middle_may_have_either_code(x):
    model = converted(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), x)
    program = QdqProgram.trace(model, (x,))
    (name,) = program.names()
    node = next(n for n in program.graph.nodes if "export.quantize" in str(n.target))
    scale, zero_point = (program.constant(node.args[i]) for i in (1, 2))

    def differing(offset: float) -> float:
        real = torch.full_like(x, 20 + offset).sub(zero_point) * scale
        codes = torch.full_like(x, 21).to(torch.uint8)
        report, _ = compare_layers(program, [real], {name: codes})
        return report.differing

    assert differing(0.5) == 0  # rounds to the even 20, but 21 is as good
    assert differing(0.49) == 1
    assert differing(0.51) == 0


def test_nothing_known_becomes_the_zero_point():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    scale, zero_point = torch.tensor(0.1), torch.tensor(7, dtype=torch.int32)
    expected = qt.ops.quantize_per_tensor(x, scale, zero_point, 0, 255)
    assert torch.equal(qt.ops.qdq_quantize(x, scale, zero_point, 0, 255, "x"), expected)
    assert expected.tolist() == [7, 255, 0, 17]


def test_a_dynamic_linear_outside_of_a_graph_becomes_float_with_a_dequantized_weight():
    torch.manual_seed(0)
    dynamic = qt.quantize_dynamic(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)))
    x = torch.randn(3, 16)
    program = QdqProgram.trace(dynamic, (x,))
    assert sum("dequantize" in str(n.target) for n in program.graph.nodes) == 2
    with torch.no_grad():
        assert compare_output(dynamic(x), program.run([x])[0][0], None).sqnr > 30


def test_a_compiled_model_is_refused(model, x):
    fast = qt.compile(converted(model, x), (x,))
    with pytest.raises(ValueError, match=r"compiled plan.*export the result of qt\.convert"):
        QdqProgram.trace(fast, (x,))


def test_the_model_is_not_changed(model, x):
    quantized = converted(model, x)
    before = {name: value.clone() for name, value in quantized.state_dict().items()}
    QdqProgram.trace(quantized, (x,))
    after = quantized.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_prepared_model_is_converted_first(model, x, tmp_path):
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping("x86"), (x,))
    with pytest.raises(RuntimeError, match="has seen no data"):
        qt.export.torchscript(prepared, tmp_path / "m.pt", (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    report = qt.export.torchscript(prepared, tmp_path / "m.pt", (x,))
    with torch.no_grad():
        assert torch.equal(torch.jit.load(report.path)(x), qt.convert(prepared)(x))


def test_targets_say_what_they_need():
    info = qt.export.targets()["torchscript"]
    assert (info.name, info.suffix, info.available, info.install) == (
        "torchscript",
        ".pt",
        True,
        "",
    )


def test_an_exported_file_is_evaluated_in_its_runtime(model, x, tmp_path):
    quantized = converted(model, x)
    path = qt.export.torchscript(quantized, tmp_path / "m.pt", (x,)).path
    loaded = qt.export.load("torchscript", path)
    with torch.no_grad():
        labels = quantized(x).argmax(1)
    assert qt.evaluate(loaded, [(x, labels)], progress=False) == 1.0
    assert "TorchScript" in loaded.version
    with pytest.raises(ValueError, match=r"unknown target 'onyx': use one of .*torchscript"):
        qt.export.load("onyx", path)
    with pytest.raises(FileNotFoundError, match=r"no file .*n\.pt"):
        qt.export.load("torchscript", tmp_path / "n.pt")


class _Broken(registry.Target):
    """A file whose runtime adds to one layer."""

    name = "broken"
    packages = ("torch",)

    def __init__(self, layer: str, steps: int) -> None:
        self.layer, self.steps = layer, steps

    def write(self, job, path):
        self.job = job
        path.write_text("file")
        path.with_suffix(".bin").write_text("weights")
        return []

    def load(self, path):
        return self

    version = "none"

    def run(self, inputs, names):
        outputs, codes = self.job.program.run(inputs)
        if self.layer:
            codes[self.layer] = codes[self.layer].int().add(self.steps).clamp(0, 255).byte()
            outputs, rest = self.job.program.run(inputs, {self.layer: codes[self.layer]})
            codes = {**rest, self.layer: codes[self.layer]}
        return outputs, codes


def test_a_file_that_departs_is_named_and_not_left(model, x, tmp_path):
    quantized = converted(model, x)
    path = tmp_path / "m.xyz"
    path.write_text("old")
    with pytest.raises(qt.export.VerificationError, match=r"first in depthwise: .* by up to 5"):
        registry.run_export(_Broken("depthwise", 5), quantized, path, (x,))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_good_file_and_those_beside_it_are_moved_to_their_place(model, x, tmp_path):
    report = registry.run_export(_Broken("", 0), converted(model, x), tmp_path / "m.xyz", (x,))
    assert sorted(f.name for f in tmp_path.iterdir()) == ["m.bin", "m.xyz"]
    assert report.size == len("file") + len("weights")
    assert report.layers.compared > 15
    assert report.layers.max_steps == 0
    assert report.outputs[0].sqnr > 30
    assert report.latency_ms > 0
    assert "layers, each from its own inputs" in str(report)


def test_a_missing_package_gives_the_command(model, x, tmp_path, monkeypatch):
    monkeypatch.setattr(_Broken, "packages", ("no-such-package",))
    monkeypatch.setattr(_Broken, "extra", "xyz")
    with pytest.raises(ImportError, match=r"no-such-package.*pip install 'qtoolkit\[xyz\]'"):
        registry.run_export(_Broken("", 0), converted(model, x), tmp_path / "m", (x,))


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "m.pt"
    path.write_text("old")

    def fill() -> None:
        with staged(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write {path}: No space left"):
        fill()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_every_target_survives_a_disk_that_takes_no_more(tmp_path):
    """In a process of its own, whose files may have 1000 bytes."""
    code = """
import resource, signal, sys, torch, qtoolkit as qt
from pathlib import Path
x = torch.randn(2, 3, 8, 8)
for name, info in qt.export.targets().items():
    if not info.available:
        continue
    mapping = qt.get_default_qconfig_mapping(info.preset)
    prepared = qt.prepare(torch.nn.Conv2d(3, 64, 3).eval(), mapping, (x,))
    model = qt.convert(qt.calibrate(prepared, [(x,)], progress=False))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        getattr(qt.export, name)(model, Path(sys.argv[1]) / f"m{info.suffix}", (x,), verify=False)
    except OSError as error:
        assert "write" in str(error), (name, error)
        print(name)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.getrlimit(resource.RLIMIT_FSIZE)[1],) * 2)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    available = [name for name, info in qt.export.targets().items() if info.available]
    assert done.stdout.split() == available
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path, monkeypatch):
    import tempfile

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with (
        pytest.raises(PermissionError, match=rf"cannot write {tmp_path}"),
        staged(tmp_path / "m.pt"),
    ):
        pass


def test_outputs_of_other_shapes_or_values_differ():
    a = torch.tensor([[1.0, 2.0], [3.0, 1.0]])
    assert compare_output(a, a.clone(), 0.5).sqnr == float("inf")
    worse = compare_output(a, a + torch.tensor([[0.0, -2.0], [0.0, 0.0]]), 0.5)
    assert (worse.max_difference, worse.max_steps, worse.top1_agreement) == (2.0, 4.0, 0.5)
    assert compare_output(a, a[:1], 0.5).sqnr == float("-inf")
    assert compare_output(a, a * float("nan"), None).max_difference == float("inf")
    assert [t.shape for t in tensors_of({"a": a, "b": [a, (a[0],)]})] == [(2, 2), (2, 2), (2,)]


def test_files_are_written_where_a_link_points(tmp_path):
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "m.txt"
    target.write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(target)
    with staged(link) as temporary:
        Path(temporary).write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
