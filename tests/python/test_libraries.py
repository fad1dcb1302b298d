"""The built libraries: what they export, what they need, and what happens if one does not load."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import qtoolkit as qt
from qtoolkit import _C, _library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(qt.__file__).parent
# The build folder of this Python and PyTorch, named as in setup.py.
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch{torch.__version__.split('+')[0]}"
OBJECTS = BUILD / "CMakeFiles" / "qtoolkit_kernels.dir" / "csrc" / "kernels" / "cpu"
PATHS = ["avx2", "avxvnni", "avx512vnni", "amx"]


def output_of(*command: object) -> str:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


# --- objects compiled for one instruction set -----------------------------------------------------


def misplaced_symbols(nm: str, path: str) -> Iterator[str]:
    """Symbols through which another file could run this path's instructions.

    The linker keeps one copy of a weak or unique symbol, whichever file it is from: an inline
    function compiled here with AVX-512 may be the one that a CPU without it then calls.
    """
    for line in nm.splitlines():
        _, kind, name = line.split(maxsplit=2)
        # DW.ref.…: an address, which code that unwinds reads; the same in every file.
        shared = kind in "VWu" and not name.startswith("DW.ref.")
        exported = kind in "TDBRCSG" and not name.startswith(f"qtoolkit::kernels::{path}::")
        if shared or exported:
            yield f"{kind} {name}"


@pytest.mark.parametrize("path", PATHS)
def test_objects_of_a_path_export_only_their_namespace(path):
    objects = sorted(OBJECTS.glob(f"*_{path}.cpp.o"))
    if not objects:
        pytest.skip(f"no *_{path}.cpp.o in {OBJECTS}: built elsewhere, or for another processor")
    for file in objects:
        symbols = output_of("nm", "--defined-only", "--demangle", file)
        assert f"qtoolkit::kernels::{path}::" in symbols
        assert list(misplaced_symbols(symbols, path)) == [], file.name


@pytest.mark.parametrize(
    ("line", "allowed"),
    [
        ("T qtoolkit::kernels::avx2::add(int)", True),
        ("t qtoolkit::kernels::(anonymous namespace)::helper(int)", True),
        ("r .LC0", True),
        ("V DW.ref.__gxx_personality_v0", True),
        ("T qtoolkit::kernels::add(int)", False),
        ("T qtoolkit::kernels::avx512vnni::add(int)", False),
        ("D qtoolkit::kernels::table", False),
        ("W std::vector<int, std::allocator<int> >::push_back(int const&)", False),
        ("W qtoolkit::kernels::avx2::add(int)", False),
        ("V typeinfo for std::bad_alloc", False),
        ("u guard variable for qtoolkit::kernels::avx2::table()::values", False),
    ],
)
def test_misplaced_symbols_are_found(line, allowed):
    assert (list(misplaced_symbols(f"0000000000000010 {line}\n", "avx2")) == []) == allowed


# --- what the libraries need ----------------------------------------------------------------------


def needed_libraries(library: Path) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", library))


def python_symbols(library: Path) -> list[str]:
    symbols = output_of("nm", "-D", "--undefined-only", library)
    return re.findall(r"\b_?Py[A-Z_]\w*", symbols)


def test_operator_library_needs_no_python():
    library = PACKAGE / "libqtoolkit_ops.so"
    needed = needed_libraries(library)
    assert "libtorch_cpu.so" in needed
    assert [name for name in needed if re.match("libpython|libtorch_python", name)] == []
    # A library may use Python's symbols without naming libpython, as Python modules do.
    assert python_symbols(library) == []


def test_python_symbols_are_found():
    assert python_symbols(Path(_C.__file__)) != []


def test_operator_library_has_one_openmp_runtime():
    runtimes = [n for n in needed_libraries(PACKAGE / "libqtoolkit_ops.so") if "omp" in n]
    assert len(runtimes) == 1
    assert runtimes[0].startswith("libgomp")


# --- loading --------------------------------------------------------------------------------------


def test_build_for_another_minor_version_is_an_error(monkeypatch):
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(torch, "__version__", f"{major}.{int(minor) + 1}.0")
    with pytest.raises(ImportError, match=r"was built for PyTorch .*Build it again: pip install"):
        _library.load()


def test_another_patch_version_fits(monkeypatch):
    major, minor, *_ = torch.__version__.split(".")
    monkeypatch.setattr(torch, "__version__", f"{major}.{minor}.99+cpu")
    _library.load()


def test_missing_library_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"libqtoolkit_ops\.so is missing.*pip install"):
        _library.load()


@pytest.fixture
def package_with_broken_cuda(monkeypatch, tmp_path) -> Path:
    (tmp_path / "libqtoolkit_ops.so").symlink_to(PACKAGE / "libqtoolkit_ops.so")
    (tmp_path / "libqtoolkit_ops_cuda.so").write_bytes(b"not a library" * 100)
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    return tmp_path


def test_cuda_library_that_does_not_load_is_a_warning(monkeypatch, package_with_broken_cuda):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.warns(RuntimeWarning, match=r"without its CUDA operators: .*invalid ELF header"):
        _library.load()


def test_cuda_library_is_left_alone_where_pytorch_has_no_cuda(
    monkeypatch, package_with_broken_cuda
):
    monkeypatch.setattr(torch.version, "cuda", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _library.load()


def test_an_unknown_kernel_path_lists_the_known():
    with pytest.raises(ValueError, match="reference, portable, neondot, avx2"):
        _C.force_path("sse9")
    with pytest.raises(ValueError, match="conv2d"):
        _C.kernel_paths("conv9d")


def test_a_missing_library_says_how_to_build_it(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="pip install --no-build-isolation"):
        _library.load()
    (tmp_path / "libqtoolkit_ops.so").write_bytes(b"not a library")
    with pytest.raises(ImportError, match="does not load with PyTorch"):
        _library.load()
