"""The dependency rule: an include or import points to the same layer or a lower one, never up."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folders of csrc/, from the lowest layer up.
CPP_LAYERS = [{"core"}, {"kernels"}, {"ops"}, {"autograd", "engine"}, {"bindings"}]
# Which folders may include headers whose path starts so; all others may not.
CPP_OUTSIDE = {
    ("torch/", "ATen/", "c10/"): {"ops", "autograd", "engine", "bindings"},
    ("pybind11/", "Python.h", "torch/extension.h", "torch/python.h", "torch/csrc/utils/pybind.h"): {
        "bindings"
    },
}

# Modules of python/qtoolkit, from the lowest layer up; the longest name that fits a module counts.
PYTHON_LAYERS = [
    {"_version", "_C", "_library"},
    {"ops", "formats", "progress", "observers.registry"},
    {"qconfig"},
    {"observers"},
    {"fake_quantize"},
    {"nn"},
    {"graph"},
    {"workflow", "export", "metrics", "explain", "compare"},
    {""},  # the package itself
]
MAY_NAME_TORCH_OPS = {"ops", "_library"}


def rank_of(layers: list[set[str]], name: str) -> int | None:
    return next((rank for rank, layer in enumerate(layers) if name in layer), None)


def cpp_violations(csrc: Path) -> Iterator[str]:
    for path in sorted(csrc.rglob("*")):
        if path.suffix not in {".h", ".cpp", ".inc", ".inl", ".cu", ".cuh"}:
            continue
        where = path.relative_to(csrc).as_posix()
        folder = where.split("/")[0]
        rank = rank_of(CPP_LAYERS, folder)
        if rank is None:
            yield f"{where}: {folder}/ is in no layer"
            continue
        for header in re.findall(r'^\s*#\s*include\s*["<]([^">]+)', path.read_text(), re.MULTILINE):
            target = rank_of(CPP_LAYERS, header.split("/")[0])
            if target is not None and target > rank:
                yield f"{where} includes {header}"
            for prefixes, folders in CPP_OUTSIDE.items():
                if header.startswith(prefixes) and folder not in folders:
                    yield f"{where} includes {header}"


def module_rank(module: str) -> int | None:
    """The layer of a dotted name inside the package: its own or that of what holds it."""
    parts = module.split(".")
    names = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((rank for n in names if (rank := rank_of(PYTHON_LAYERS, n)) is not None), None)


def without_type_checking(tree: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`, which never run."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            pending.extend(node.orelse)
            continue
        yield node
        pending.extend(ast.iter_child_nodes(node))


def imported_modules(tree: ast.Module, package: str) -> Iterator[str]:
    """Dotted names inside qtoolkit; `package` is where relative imports start."""
    for node in without_type_checking(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [base])])
            # In `from qtoolkit import ops` the name is the module, elsewhere a name in it or below.
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "qtoolkit" or name.startswith("qtoolkit."):
                yield name.removeprefix("qtoolkit").removeprefix(".")


def python_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        parts = where.with_suffix("").parts
        holder = ".".join(["qtoolkit", *parts[:-1]])
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        rank = module_rank(module)
        if rank is None:
            yield f"{where}: qtoolkit.{module} is in no layer"
            continue
        tree = ast.parse(path.read_text())
        for target in imported_modules(tree, holder):
            target_rank = module_rank(target)
            if target_rank is None:  # a name that the package itself defines
                target_rank = module_rank("")
            if target_rank > rank:
                yield f"{where} imports qtoolkit.{target}"
        if module not in MAY_NAME_TORCH_OPS:
            for node in ast.walk(tree):
                if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.ops":
                    yield f"{where}:{node.lineno} uses torch.ops; call qtoolkit.ops"


def test_cpp_includes_point_down():
    assert list(cpp_violations(ROOT / "csrc")) == []


def test_python_imports_point_down():
    assert list(python_violations(ROOT / "python" / "qtoolkit")) == []


def plant(folder: Path, file: str, text: str) -> None:
    path = folder / file
    path.parent.mkdir(parents=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("file", "include", "allowed"),
    [
        ("kernels/cpu/a.cpp", '"core/formats.h"', True),
        ("ops/cuda/a.cu", '"kernels/path.h"', True),
        ("ops/a.cpp", "<torch/library.h>", True),
        ("bindings/a.cpp", "<pybind11/pybind11.h>", True),
        ("core/a.h", '"kernels/path.h"', False),
        ("kernels/a.cpp", '"ops/checks.h"', False),
        ("kernels/cpu/a.inl", "<torch/types.h>", False),
        ("kernels/cuda/a.cu", "<c10/cuda/CUDAStream.h>", False),
        ("core/a.cpp", "<ATen/ATen.h>", False),
        ("ops/a.cpp", '"autograd/fake_quantize.h"', False),
        ("ops/a.cpp", "<torch/extension.h>", False),
        ("autograd/a.cpp", "<pybind11/pybind11.h>", False),
        ("utils/a.cpp", "<vector>", False),
    ],
)
def test_cpp_violations_are_found(tmp_path, file, include, allowed):
    plant(tmp_path, file, f"#include <vector>\n#include {include}\n")
    assert (list(cpp_violations(tmp_path)) == []) == allowed


@pytest.mark.parametrize(
    ("file", "line", "allowed"),
    [
        ("graph/lower.py", "from qtoolkit.nn.base import QParams", True),
        ("graph/patterns/conv.py", "from qtoolkit import nn, ops", True),
        ("graph/patterns/conv.py", "from ..report import Report", True),
        ("ops.py", "import torch\ntorch.ops.load_library('x')", True),
        ("nn/conv.py", "import typing\nif typing.TYPE_CHECKING:\n    import qtoolkit.graph", True),
        ("nn/conv.py", "from qtoolkit.graph.patterns import Match", False),
        ("nn/conv.py", "from qtoolkit import ops, graph", False),
        ("nn/conv.py", "from qtoolkit import evaluate", False),
        ("workflow.py", "import qtoolkit as qt", False),
        ("nn/qat/conv.py", "from ...workflow import prepare", False),
        ("ops.py", "import qtoolkit.observers", False),
        ("observers/registry.py", "from qtoolkit.qconfig import TensorSpec", False),
        ("qconfig.py", "def f():\n    from qtoolkit import fake_quantize", False),
        ("graph/lower.py", "import torch\nx = torch.ops.qtoolkit.add", False),
        ("helpers/text.py", "import re", False),
    ],
)  # fmt: skip
def test_python_violations_are_found(tmp_path, file, line, allowed):
    plant(tmp_path / "qtoolkit", file, line + "\n")
    assert (list(python_violations(tmp_path / "qtoolkit")) == []) == allowed
