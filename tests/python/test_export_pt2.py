"""torch.export, torch.compile and AOTInductor give the bits of converted and compiled models."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from networks import Kinds, batches, settle
from torch import Tensor, nn

import qtoolkit as qt
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


def test_a_program_has_any_batch_and_loads_in_a_new_process(model, converted, tmp_path):
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: batch},))
    torch.export.save(program, tmp_path / "m.pt2")
    data = [(x, converted(x)) for x in map(images, SIZES)]
    for x, y in data:
        assert torch.equal(program.module()(x), y)
    torch.save(data, tmp_path / "expected.pt")
    code = (
        "import sys, torch, qtoolkit\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "assert all(torch.equal(model(x), y) for x, y in torch.load(sys.argv[2]))\n"
    )
    paths = [str(tmp_path / "m.pt2"), str(tmp_path / "expected.pt")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True, timeout=120)


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
