"""examples/cpp, built with find_package alone: the converted model's bits, without Python."""

from __future__ import annotations

import os
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
SHAPE = (6, 3, 20, 20)

pytestmark = pytest.mark.skipif(
    not (ROOT / "examples" / "cpp").is_dir() or CMAKE is None or shutil.which("c++") is None,
    reason="needs the repository, CMake and a C++ compiler",
)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).eval()


def configure(source: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [CMAKE, "-S", source, "-B", build, "-G", "Ninja", *options]
    if shutil.which("ccache"):
        command.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    return subprocess.run(command, capture_output=True, text=True)


PREFIX = f"-DCMAKE_PREFIX_PATH={qt.cmake_prefix_path}"
PYTHON = f"-DPython_EXECUTABLE={sys.executable}"


@pytest.fixture(scope="module")
def programs() -> Path:
    """The folder of the two programs."""
    done = configure(ROOT / "examples" / "cpp", BUILD, PREFIX, PYTHON)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([CMAKE, "--build", BUILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


@pytest.fixture(scope="module")
def program(programs) -> Path:
    return programs / "classify"


@pytest.fixture(scope="module")
def plan_program(programs) -> Path:
    return programs / "classify_plan"


@pytest.fixture(scope="module")
def batch() -> torch.Tensor:
    return torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def converted(batch) -> nn.Module:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(small_model(), mapping, example_inputs=(batch,))
    qt.calibrate(prepared, [batch], progress=False)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def outputs(converted, batch) -> torch.Tensor:
    with torch.inference_mode():
        return converted(batch)


@pytest.fixture(scope="module", params=["modules", "plan"])
def exported(
    request, tmp_path_factory, converted, batch, outputs
) -> tuple[Path, Path, Path, torch.Tensor]:
    """TorchScript files of the model, a batch and its outputs; and the outputs."""
    folder = tmp_path_factory.mktemp("exported")
    model_file, batch_file, outputs_file = (folder / f"{n}.pt" for n in ("model", "batch", "out"))
    model = qt.compile(converted, batch) if request.param == "plan" else converted
    qt.export.torchscript(model, model_file, example_inputs=(batch,))
    torch.save(batch, batch_file)
    torch.save(outputs, outputs_file)
    return model_file, batch_file, outputs_file, outputs


@pytest.fixture(scope="module")
def plan_files(tmp_path_factory, converted, batch, outputs) -> tuple[object, ...]:
    """Arguments of classify_plan: the plan file, its batch, and the outputs."""
    folder = tmp_path_factory.mktemp("plan")
    qt.save_plan(qt.compile(converted, batch), folder / "model.qtplan", batch)
    batch.numpy().tofile(folder / "batch.bin")
    outputs.numpy().tofile(folder / "outputs.bin")
    shape = ",".join(map(str, SHAPE))
    options = ("--batch", folder / "batch.bin", "--shape", shape)
    return (folder / "model.qtplan", *options, "--compare", folder / "outputs.bin")


def run(program: Path, *arguments: object, max_path: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "QTOOLKIT_MAX_PATH": max_path},
    )


def classes(text: str) -> list[int]:
    return [int(c) for c in re.findall(r"^image \d+: class (\d+)", text, re.MULTILINE)]


@pytest.mark.parametrize("max_path", ["", "avx2"])
def test_classes_equal_python(program, exported, max_path):
    model, batch, outputs_file, outputs = exported
    arguments = (model, "--batch", batch, "--compare", outputs_file, "--threads", 1)
    done = run(program, *arguments, max_path=max_path)
    assert done.returncode == 0, done.stderr
    assert classes(done.stdout) == outputs.argmax(1).tolist()
    assert "bit for bit" in done.stdout
    assert re.search(r"latency: median [\d.]+ ms of 20 runs, batch 6, 1 threads", done.stdout)


@pytest.mark.parametrize("exported", ["plan"], indirect=True)
def test_clients_share_a_torchscript_module(program, exported):
    model, batch, outputs_file, _ = exported
    arguments = (model, "--batch", batch, "--compare", outputs_file, "--clients", 3)
    done = run(program, *arguments, "--rounds", 5)
    assert done.returncode == 0, done.stderr
    assert "of 15 runs" in done.stdout


# --- a plan file, without LibTorch ----------------------------------------------------------------


@pytest.mark.parametrize("max_path", ["", "portable", "avx2", "avx512vnni"])
def test_a_plan_file_gives_pythons_bits_on_every_path(plan_program, plan_files, outputs, max_path):
    done = run(plan_program, *plan_files, max_path=max_path)
    assert done.returncode == 0, done.stderr
    assert classes(done.stdout) == outputs.argmax(1).tolist()
    assert "bit for bit" in done.stdout
    (used,) = re.findall(r"^kernels: (\w+)$", done.stdout, re.MULTILINE)
    if max_path in qt._C.cpu_paths():
        assert used == max_path
    elif not max_path:
        assert used == qt._C.selected_path("conv2d")


def test_clients_and_threads_share_a_plan(plan_program, plan_files):
    done = run(plan_program, *plan_files, "--clients", 4, "--threads", 2, "--rounds", 10)
    assert done.returncode == 0, done.stderr
    assert "of 40 runs, batch 6, 2 threads, 4 clients" in done.stdout


def test_the_program_of_plans_needs_no_pytorch(plan_program):
    needed = subprocess.run(["ldd", plan_program], capture_output=True, text=True, check=True)
    assert "libqtoolkit_engine.so" in needed.stdout
    libraries = " ".join(re.findall(r"^\s*(\S+)", needed.stdout, re.MULTILINE))
    assert "not found" not in needed.stdout
    assert not re.search("torch|c10|omp|python", libraries)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{cut}"], "the plan file is not whole"),
        (["{changed}"], "the plan file is damaged: the CRC of"),
        (["missing.qtplan"], "missing.qtplan: No such file"),
        (["{model}", "--shape", "1,4,20,20"], "takes 3 channels, got 4"),
        (["{model}", "--batch", "{model}", "--shape", "1,3,20,20"], "needs 4800"),
    ],
)
def test_bad_plan_files_are_named(plan_program, plan_files, tmp_path, arguments, message):
    whole = plan_files[0].read_bytes()
    files = {"model": plan_files[0], "cut": tmp_path / "cut", "changed": tmp_path / "changed"}
    files["cut"].write_bytes(whole[:-1])
    files["changed"].write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    done = run(plan_program, *(a.format(**files) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr


def test_an_unknown_path_in_the_environment_is_an_error(plan_program, plan_files):
    done = run(plan_program, *plan_files, max_path="sse9")
    assert done.returncode == 1
    assert "unknown QTOOLKIT_MAX_PATH 'sse9'; known: reference, portable" in done.stderr


# --- find_package ---------------------------------------------------------------------------------


def find(tmp_path: Path, call: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Configures a project of one call of find_package and what follows it."""
    lines = ["cmake_minimum_required(VERSION 3.26)", "project(user LANGUAGES CXX)", call]
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    return configure(tmp_path, tmp_path / "build", PREFIX, *options)


def test_the_engine_is_found_where_there_is_no_pytorch(tmp_path):
    call = "find_package(qtoolkit 0.1 REQUIRED COMPONENTS engine OPTIONAL_COMPONENTS ops)"
    shown = 'message(STATUS "ops: ${qtoolkit_ops_FOUND}")'
    done = find(tmp_path, f"{call}\n{shown}", f"-DTORCH_PACKAGE_DIR={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"qtoolkit without ops: there is no PyTorch 2.11 or later in {tmp_path}" in done.stdout
    assert "ops: FALSE" in done.stdout


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("find_package(qtoolkit REQUIRED)", "there is no PyTorch 2.11 or later in"),
        ("find_package(qtoolkit REQUIRED COMPONENTS gpu)", "has no component 'gpu'"),
        ("find_package(qtoolkit 9.0 REQUIRED)", "version: 0.1.0"),
    ],
)
def test_what_is_not_found_is_said(tmp_path, call, message):
    done = find(tmp_path, call, f"-DTORCH_PACKAGE_DIR={tmp_path}")
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_another_minor_version_of_pytorch_is_refused(tmp_path):
    header = tmp_path / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    numbers = {"MAJOR": 2, "MINOR": 99, "PATCH": 1}
    header.write_text("".join(f"#define TORCH_VERSION_{n} {v}\n" for n, v in numbers.items()))
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libtorch_cpu.so").touch()
    done = find(tmp_path, "find_package(qtoolkit REQUIRED)", f"-DTORCH_PACKAGE_DIR={tmp_path}")
    assert done.returncode != 0
    assert "is 2.99.1; the minor versions must be equal" in " ".join(done.stderr.split())


def test_the_module_prints_the_prefix():
    done = subprocess.run(
        [sys.executable, "-m", "qtoolkit", "--cmake-prefix"], capture_output=True, text=True
    )
    assert done.stdout.strip() == qt.cmake_prefix_path
    assert (Path(qt.cmake_prefix_path) / "qtoolkit" / "qtoolkitConfig.cmake").is_file()


# --- libraries, and errors of the program with LibTorch -------------------------------------------


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


@pytest.mark.parametrize("exported", ["modules"], indirect=True)
def test_other_outputs_are_noticed(program, exported, tmp_path):
    model, batch, _, outputs = exported
    torch.save(outputs + 1, tmp_path / "other.pt")
    done = run(program, model, "--batch", batch, "--compare", tmp_path / "other.pt")
    assert done.returncode == 1
    assert "differ" in done.stderr


@pytest.mark.parametrize("exported", ["modules"], indirect=True)
def test_random_batch_has_the_shape_asked_for(program, exported):
    done = run(program, exported[0], "--shape", "2,3,16,16", "--rounds", 3)
    assert done.returncode == 0, done.stderr
    assert "batch 2" in done.stdout


@pytest.mark.parametrize("exported", ["modules"], indirect=True)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.pt"], "missing.pt: no such file"),
        (["{truncated}"], "not a complete TorchScript file"),
        (["{model}", "--batch", "{truncated}"], "not a tensor written by torch.save"),
        (["{model}", "--batch", "missing.pt"], "missing.pt: no such file"),
        (["{model}", "--shape", "1,4,20,20"], "does not run on images of shape [1, 4, 20, 20]"),
    ],
)
def test_bad_input_is_named(program, exported, tmp_path, arguments, message):
    model = exported[0]
    truncated = tmp_path / "truncated.pt"
    truncated.write_bytes(model.read_bytes()[: model.stat().st_size // 2])
    done = run(program, *(a.format(model=model, truncated=truncated) for a in arguments))
    assert done.returncode == 1
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no model file given"),
        (["a", "b"], "one model at a time, got also 'b'"),
        (["a", "--shape", "1,x"], "--shape needs a positive number"),
        (["a", "--threads", "0"], "--threads needs a positive number"),
        (["a", "--rounds"], "--rounds needs a value"),
        (["a", "--fast", "1"], "unknown option --fast"),
    ],
)
def test_bad_options_are_named(plan_program, arguments, message):
    done = run(plan_program, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
