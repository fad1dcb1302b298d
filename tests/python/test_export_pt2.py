"""torch.export, torch.compile and AOTInductor give the bits of converted and compiled models."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import torch
from networks import Kinds, batches, settle
from torch import Tensor, nn
from torch._inductor import cpp_builder
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

import qtoolkit as qt
from qtoolkit.export.pt2 import _computes_in_float
from qtoolkit.nn.plan import Plan

SHAPE = (3, 3, 32, 32)
SIZES = [2, 1, 5]


def quantize(model: nn.Module, data: list[Tensor]) -> nn.Module:
    prepared = qt.prepare(model, example_inputs=(data[0],))
    qt.calibrate(prepared, data, progress=False)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    return quantize(settle(Kinds(), (8, *SHAPE[1:])), batches(SHAPE))


@pytest.fixture(params=["converted", "compiled"])
def model(request, converted) -> nn.Module:
    if request.param == "converted":
        return converted
    return qt.compile(converted, batches(SHAPE)[0], tune=False)


def images(count: int) -> Tensor:
    return batches((count, *SHAPE[1:]), 1, seed=count)[0]


def test_files_take_any_batch_and_load_in_a_new_process(converted, tmp_path):
    data = [(x, converted(x)) for x in map(images, SIZES)]
    files = []
    for name, model in [("q", converted), ("fast", qt.compile(converted, images(1), tune=False))]:
        files.append(str(tmp_path / f"{name}.pt2"))
        report = qt.export.pt2(model, files[-1], (images(1),))
        assert report.verified
        assert report.max_difference == 0.0
        assert report.warnings == []
        assert report.size == (tmp_path / f"{name}.pt2").stat().st_size
        loaded = qt.export.load("pt2", files[-1])
        assert all(torch.equal(loaded(x), y) for x, y in data)
    program = torch.export.load(files[0])
    assert torch.equal(program.example_inputs[0][0], images(1))
    assert {str(c) for c in program.range_constraints.values()} == {"VR[1, int_oo]"}
    torch.save(data, tmp_path / "expected.pt")
    code = (
        "import sys, torch, qtoolkit\n"
        "for file in sys.argv[2:]:\n"
        "    model = torch.export.load(file).module()\n"
        "    assert all(torch.equal(model(x), y) for x, y in torch.load(sys.argv[1]))\n"
    )
    paths = [str(tmp_path / "expected.pt"), *files]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)


def test_another_file_is_refused(tmp_path):
    (tmp_path / "m.pt2").write_text("no archive")
    with pytest.raises(ValueError, match=r"m\.pt2 is damaged, or no zip archive: File is not"):
        qt.export.load("pt2", tmp_path / "m.pt2")
    with zipfile.ZipFile(tmp_path / "m.pt2", "w") as archive:
        archive.writestr("m/readme.txt", "an archive of something else")
    with pytest.raises(ValueError, match=r"m\.pt2 cannot be loaded by export\.load"):
        qt.export.load("pt2", tmp_path / "m.pt2")


def test_the_batch_may_be_fixed(converted, tmp_path):
    qt.export.pt2(converted, tmp_path / "m.pt2", (images(3),), dynamic_batch=False)
    loaded = qt.export.load("pt2", tmp_path / "m.pt2")
    assert torch.equal(loaded(images(3)), converted(images(3)))
    with pytest.raises(Exception, match="3"):
        loaded(images(2))


class Odd(nn.Module):
    """A convolution around which is what some models do.

    Args:
        way: "halves" takes a batch of four alone, "value" looks at values.
    """

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        x = self.conv(x)
        if self.way == "value":
            return x if x.mean() < 1e9 else -x
        return x.reshape(2, 2, *x.shape[1:]).sum(0)


def test_a_model_of_one_batch_is_exported_for_it(tmp_path):
    data = batches((4, 3, 6, 6))
    model = quantize(Odd("halves").eval(), data)
    report = qt.export.pt2(model, tmp_path / "m.pt2", (data[0],))
    assert report.verified
    assert "alone: the model's own code fixes it" in report.warnings[0]


def test_a_model_that_looks_at_values_is_refused(tmp_path):
    data = batches((4, 3, 6, 6))
    model = quantize(Odd("value").eval(), data)
    with pytest.raises(qt.export.UnsupportedError, match=r"cannot trace this model.*x\.mean"):
        qt.export.pt2(model, tmp_path / "m.pt2", (data[0],))
    assert list(tmp_path.iterdir()) == []


def test_aot_inductor_compiles_a_file(converted, tmp_path):
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("AOTInductor needs a C++ compiler")
    fast = qt.compile(converted, images(1), tune=False)
    report = qt.export.pt2(fast, tmp_path / "m.pt2", (images(1),), aot_inductor=True)
    assert report.verified
    assert report.max_difference == 0.0
    assert report.runtime.startswith("AOTInductor")
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "m.pt2"))
    for size in SIZES:
        assert torch.equal(loaded(images(size)), converted(images(size)))


def test_aot_inductor_without_a_compiler_says_so(converted, tmp_path, monkeypatch):
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(qt.export.MissingPackageError, match="install g\\+\\+ or clang\\+\\+"):
        qt.export.pt2(converted, tmp_path / "m.pt2", (images(2),), aot_inductor=True)


def test_bits_are_required_of_inductor_where_nothing_computes_in_float(converted):
    def computes_in_float(model: nn.Module) -> bool:
        return _computes_in_float(torch.export.export(model, (images(2),)))

    assert not computes_in_float(converted)
    assert computes_in_float(nn.Sequential(converted, nn.Softmax(1)))


def test_one_compilation_serves_all_batches(model, converted):
    torch._dynamo.reset()
    function = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for size in (2, 5, 3):
            assert torch.equal(function(images(size)), converted(images(size)))


def test_another_plan_is_compiled_anew(converted):
    torch._dynamo.reset()
    other = quantize(settle(Kinds(), (8, *SHAPE[1:]), seed=7), batches(SHAPE))
    plans = [qt.compile(q, images(2), tune=False) for q in (converted, other)]

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(plan: nn.Module, x: Tensor) -> Tensor:
        return plan(x)

    for plan, q in zip(plans, (converted, other)):
        assert torch.equal(run(plan, images(2)), q(images(2)))


def test_a_plan_is_traced_for_the_size_of_its_images(converted):
    fast = qt.compile(converted, images(2), tune=False)
    shapes = ({0: torch.export.Dim("batch"), 2: torch.export.Dim("height")},)
    with pytest.raises(Exception, match="height"):
        torch.export.export(fast, (images(2),), dynamic_shapes=shapes)


def test_opcheck_of_a_plan(converted):
    fast = qt.compile(converted, images(2), tune=False)
    plan = next(module for module in fast.modules() if isinstance(module, Plan)).plan
    utils = ("test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration")
    torch.library.opcheck(
        torch.ops.qtoolkit.run_plan.default, (plan, [images(2)]), test_utils=utils
    )


def test_tracing_a_plan_checks_its_inputs(converted):
    fast = qt.compile(converted, images(2), tune=False)
    plan = next(module for module in fast.modules() if isinstance(module, Plan)).plan
    for inputs, error, message in [
        ([images(2).double()], TypeError, "input 0 must be Float"),
        ([images(2)[0]], ValueError, "must have 4 dimensions, got 3"),
        ([images(2), images(2)], ValueError, "takes 1 inputs, got 2"),
        ([images(2), images(3)], ValueError, "input 1 has 3 images, input 0 has 2"),
        ([images(2)[:, :2]], ValueError, "channels"),
    ]:
        with pytest.raises(error, match=message):
            torch.ops.qtoolkit.run_plan(plan, [x.to("meta") for x in inputs])
