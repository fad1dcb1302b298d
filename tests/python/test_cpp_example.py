"""examples/cpp, built against this PyTorch: the converted model's classes, without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qtoolkit as qt

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "examples-cpp"  # shared with quickstart.sh: only the first run compiles
# The environment's own, if it has one: the system's may be too old.
CMAKE = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")

pytestmark = pytest.mark.skipif(
    not (ROOT / "examples" / "cpp").is_dir() or CMAKE is None,
    reason="needs the repository and CMake",
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


@pytest.fixture(scope="module")
def program() -> Path:
    commands = [
        [CMAKE, "-S", ROOT / "examples" / "cpp", "-B", BUILD, "-G", "Ninja",
         f"-DPython_EXECUTABLE={sys.executable}",
         f"-DQTOOLKIT_LIBRARY={Path(qt.__file__).parent / 'libqtoolkit_ops.so'}"],
        [CMAKE, "--build", BUILD],
    ]  # fmt: skip
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return BUILD / "classify"


@pytest.fixture(scope="module", params=["modules", "plan"])
def exported(request, tmp_path_factory) -> tuple[Path, Path, Path, torch.Tensor]:
    """Files of the model, a batch and its outputs; and the outputs."""
    folder = tmp_path_factory.mktemp("exported")
    batch = torch.randn(6, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(small_model(), mapping, example_inputs=(batch,))
    qt.calibrate(prepared, [batch], progress=False)
    converted = qt.convert(prepared)
    with torch.inference_mode():
        outputs = converted(batch)
    model_file, batch_file, outputs_file = (folder / f"{n}.pt" for n in ("model", "batch", "out"))
    if request.param == "plan":
        converted = qt.compile(converted, batch)
    qt.export.torchscript(converted, model_file, example_inputs=(batch,))
    torch.save(batch, batch_file)
    torch.save(outputs, outputs_file)
    return model_file, batch_file, outputs_file, outputs


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_classes_equal_python(program, exported):
    model, batch, outputs_file, outputs = exported
    done = run(program, model, "--batch", batch, "--expect", outputs_file, "--threads", 1)
    assert done.returncode == 0, done.stderr
    printed = [int(c) for c in re.findall(r"^image \d+: class (\d+)", done.stdout, re.MULTILINE)]
    assert printed == outputs.argmax(1).tolist()
    assert "bit for bit" in done.stdout
    assert re.search(r"latency: median [\d.]+ ms of 20 runs, batch 6, 1 threads", done.stdout)


@pytest.fixture(scope="module")
def libraries(program) -> str:
    return subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout


def test_no_python_is_linked(libraries):
    assert "libqtoolkit_ops.so" in libraries
    assert "not found" not in libraries
    assert "libpython" not in libraries


def test_openmp_runtime_is_that_of_pytorch(libraries):
    folder = Path(torch.__file__).parent
    if not [*folder.glob("lib/libgomp*"), *folder.glob("../torch.libs/libgomp*")]:
        pytest.skip("this PyTorch brings no libgomp")
    found = re.findall(r"lib(?:g|i)?omp\S* => (\S+)", libraries)
    assert [Path(f).resolve().is_relative_to(folder.parent) for f in found] == [True]


def test_other_outputs_are_noticed(program, exported, tmp_path):
    model, batch, _, outputs = exported
    torch.save(outputs + 1, tmp_path / "other.pt")
    done = run(program, model, "--batch", batch, "--expect", tmp_path / "other.pt")
    assert done.returncode == 1
    assert "differ" in done.stderr


def test_random_batch_has_the_shape_asked_for(program, exported):
    done = run(program, exported[0], "--shape", "2,3,16,16", "--rounds", 3)
    assert done.returncode == 0, done.stderr
    assert "batch 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "no model file given"),
        (["missing.pt"], 1, "missing.pt: no such file"),
        (["{truncated}"], 1, "not a complete TorchScript file"),
        (["{model}", "--batch", "{truncated}"], 1, "not a tensor written by torch.save"),
        (["{model}", "--batch", "missing.pt"], 1, "missing.pt: no such file"),
        (["{model}", "--shape", "1,4,20,20"], 1, "does not run on images of shape [1, 4, 20, 20]"),
        (["{model}", "--shape", "1,x"], 2, "--shape needs a positive number"),
        (["{model}", "--threads", "0"], 2, "--threads needs a positive number"),
        (["{model}", "--rounds"], 2, "--rounds needs a value"),
        (["{model}", "--fast", "1"], 2, "unknown option --fast"),
    ],
)
def test_bad_input_is_named(program, exported, tmp_path, arguments, status, message):
    model = exported[0]
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    done = run(program, *(a.format(model=model, truncated=truncated) for a in arguments))
    assert done.returncode == status
    assert message in done.stderr
