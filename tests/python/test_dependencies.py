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
    r"torch/|ATen/|c10/": {"ops", "autograd", "engine", "bindings"},
    r"pybind11/|Python\.h|torch/(extension|python)\.h|torch/csrc/.*(python|pybind|pyobject|THP)": {
        "bindings"
    },
}
# core/ and kernels/ include nothing else from outside but what tells the instruction sets.
CPP_STANDARD_ONLY = {"core", "kernels"}
CPP_STANDARD = """
    algorithm any array atomic barrier bit bitset cassert cctype cerrno cfenv cfloat charconv
    chrono cinttypes climits clocale cmath codecvt compare complex concepts condition_variable
    coroutine csetjmp csignal cstdarg cstddef cstdint cstdio cstdlib cstring ctime cuchar cwchar
    cwctype deque exception execution filesystem format forward_list fstream functional future
    initializer_list iomanip ios iosfwd iostream istream iterator latch limits list locale map
    memory memory_resource mutex new numbers numeric optional ostream queue random ranges ratio
    regex scoped_allocator semaphore set shared_mutex source_location span sstream stack
    stdexcept stop_token streambuf string string_view strstream syncstream system_error thread
    tuple type_traits typeindex typeinfo unordered_map unordered_set utility valarray variant
    vector version emmintrin.h immintrin.h arm_neon.h sys/auxv.h sys/syscall.h unistd.h
"""

# Modules of python/qtoolkit, from the lowest layer up; the longest name that fits a module counts.
PYTHON_LAYERS = [
    {"_version", "_C", "_library"},
    {
        "ops",
        "formats",
        "progress",
        "text_table",
        "eval_mode",
        "observers.registry",
        "fake_quantize.registry",
    },
    {"qconfig"},
    {"observers"},
    {"fake_quantize"},
    {"nn"},
    {"distributed"},
    {"graph"},
    {"algorithms"},
    {"recipe", "presets"},
    {
        "html",
        "measures",
        "batches",
        "checkpoint",
        "layer_formats",
        "layer_simulation",
        "layer_times",
    },
    {
        "workflow",
        "dynamic",
        "training",
        "export",
        "metrics",
        "explain",
        "compare",
        "compile",
        "registry",
        "saving",
        "plan_file",
        "quantize",
        "weight_only",
    },
    {"sensitivity", "layer_costs"},
    {"mixed_precision", "autoquantize"},
    {"quantization"},
    {""},  # the package itself
    {"__main__"},
]
# TorchScript cannot pass a plan to a Python function, so its module calls the operator.
# Export reads graphs of ATen operators.
MAY_NAME_TORCH_OPS = {"ops", "_library", "nn.plan", "export"}


INCLUDE = re.compile(r"^\s*#\s*include\s*(\S+)", re.MULTILINE)


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
        for included in INCLUDE.findall(path.read_text()):
            header = re.sub(r"""^["<]|[">].*""", "", included)
            if header == included or header.startswith("/") or ".." in header.split("/"):
                yield f"{where} includes {included}; name it from csrc/ down"
                continue
            if included.startswith('"') and (path.parent / header).is_file():
                header = f"{path.parent.relative_to(csrc).as_posix()}/{header}"
            target = rank_of(CPP_LAYERS, header.split("/")[0])
            if target is not None and target > rank:
                yield f"{where} includes {header}"
            standard = header in CPP_STANDARD.split()
            if target is None and folder in CPP_STANDARD_ONLY and not standard:
                yield f"{where} includes {header}, which is not of the C++ standard library"
            for prefix, folders in CPP_OUTSIDE.items():
                if re.match(prefix, header) and folder not in folders:
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


class Names:
    """What the names in a module stand for, as dotted paths from the outermost package."""

    def __init__(self, tree: ast.Module, package: str):
        self.package = package  # where relative imports start
        self.bound: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname:
                        self.bound[alias.asname] = alias.name
            elif isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self.bound[alias.asname or alias.name] = f"{self.base(node)}.{alias.name}"

    def absolute(self, name: str, package: str) -> str:
        """A name with leading dots, seen from a package."""
        level = len(name) - len(name.lstrip("."))
        if not level:
            return name
        parts = package.split(".")
        return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name[level:]])])

    def base(self, node: ast.ImportFrom) -> str:
        return self.absolute("." * node.level + (node.module or ""), self.package)

    def path(self, node: ast.AST) -> str | None:
        """The path that a name, an attribute or getattr(x, "y") stands for."""
        if isinstance(node, ast.Name):
            return self.bound.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            holder = self.path(node.value)
            return holder and f"{holder}.{node.attr}"
        if isinstance(node, ast.Call) and self.path(node.func) == "getattr":
            holder, name = self.path(node.args[0]), node.args[1]
            if holder and isinstance(name, ast.Constant):
                return f"{holder}.{name.value}"
        return None

    def imported(self, node: ast.AST) -> list[str]:
        """The modules, or names in modules, that a statement or a call imports."""
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            # In `from qtoolkit import ops` the name is the module, elsewhere one in it or below.
            return [f"{self.base(node)}.{alias.name}" for alias in node.names]
        if isinstance(node, ast.Call) and self.path(node.func) in IMPORTING_FUNCTIONS:
            name, *rest = [*node.args, *(keyword.value for keyword in node.keywords)]
            if not isinstance(name, ast.Constant):
                return [COMPUTED]
            known = rest and isinstance(rest[0], ast.Constant)
            return [self.absolute(name.value, rest[0].value if known else self.package)]
        return []


IMPORTING_FUNCTIONS = {"importlib.import_module", "importlib.__import__", "__import__"}
COMPUTED = "a module whose name is computed"


def is_torch_ops(path: str | None) -> bool:
    return re.match(r"torch\._?ops(\.|$)", path or "") is not None


def python_violations(package: Path) -> Iterator[str]:
    for path in sorted(package.rglob("*.py")):
        where = path.relative_to(package)
        parts = where.with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        rank = module_rank(module)
        if rank is None:
            yield f"{where}: qtoolkit.{module} is in no layer"
            continue
        tree = ast.parse(path.read_text())
        names = Names(tree, ".".join(["qtoolkit", *parts[:-1]]))
        holders = {parts[0].removesuffix(".py"), module}
        may_name_torch_ops = bool(holders & MAY_NAME_TORCH_OPS)
        for node in without_type_checking(tree):
            for target in names.imported(node):
                inside, _, rest = target.partition(".")
                target_rank = module_rank(rest)
                if target_rank is None:  # a name that the package itself defines
                    target_rank = module_rank("")
                if target == COMPUTED or (inside == "qtoolkit" and target_rank > rank):
                    yield f"{where}:{node.lineno} imports {target}"
                if is_torch_ops(target) and not may_name_torch_ops:
                    yield f"{where}:{node.lineno} imports {target}; call qtoolkit.ops"
            is_name = isinstance(node, ast.Attribute | ast.Call)
            if is_name and is_torch_ops(names.path(node)) and not may_name_torch_ops:
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
        ("core/a.h", "<immintrin.h>", True),
        ("ops/a.cpp", "<torch/csrc/autograd/custom_function.h>", True),
        ("bindings/a.cpp", "<torch/csrc/utils/pybind.h>", True),
        ("kernels/a.cpp", '"../ops/checks.h"', False),
        ("ops/a.cpp", '"../core/formats.h"', False),
        ("kernels/a.cpp", '"core/../ops/checks.h"', False),
        ("kernels/a.cpp", '"/usr/include/torch/library.h"', False),
        ("kernels/a.cpp", "HEADER", False),
        ("core/a.cpp", "<omp.h>", False),
        ("kernels/a.cpp", "<cuda_runtime.h>", False),
        ("kernels/a.cpp", '"gtest/gtest.h"', False),
        ("ops/a.cpp", "<torch/csrc/autograd/python_variable.h>", False),
        ("ops/a.cpp", "<torch/csrc/utils/pybind.h>", False),
        ("autograd/a.cpp", "<torch/csrc/python_headers.h>", False),
    ],
)
def test_cpp_violations_are_found(tmp_path, file, include, allowed):
    plant(tmp_path, file, f"#include <vector>\n#include {include}\n")
    assert (list(cpp_violations(tmp_path)) == []) == allowed


def test_header_beside_the_file_may_be_included(tmp_path):
    plant(tmp_path, "kernels/cpu/a.cpp", '#include "own.h"\n')
    assert list(cpp_violations(tmp_path)) != []
    (tmp_path / "kernels/cpu/own.h").write_text("#pragma once\n")
    assert list(cpp_violations(tmp_path)) == []


@pytest.mark.parametrize(
    ("file", "line", "allowed"),
    [
        ("graph/lower.py", "from qtoolkit.nn.base import QParams", True),
        ("graph/patterns/conv.py", "from qtoolkit import nn, ops", True),
        ("graph/patterns/conv.py", "from ..report import Report", True),
        ("ops/integer.py", "import torch\ntorch.ops.load_library('x')", True),
        ("nn/conv.py", "import typing\nif typing.TYPE_CHECKING:\n    import qtoolkit.graph", True),
        ("nn/conv.py", "from qtoolkit.graph.patterns import Match", False),
        ("nn/conv.py", "from qtoolkit import ops, graph", False),
        ("nn/conv.py", "from qtoolkit import evaluate", False),
        ("workflow.py", "import qtoolkit as qt", False),
        ("nn/qat/conv.py", "from ...workflow import prepare", False),
        ("ops/__init__.py", "import qtoolkit.observers", False),
        ("nn/ops/integer.py", "import torch\nx = torch.ops.qtoolkit.add", False),
        ("observers/registry.py", "from qtoolkit.qconfig import TensorSpec", False),
        ("qconfig.py", "def f():\n    from qtoolkit import fake_quantize", False),
        ("graph/lower.py", "import torch\nx = torch.ops.qtoolkit.add", False),
        ("helpers/text.py", "import re", False),
        ("graph/lower.py", "from torch.nn import functional as ops\nops.relu", True),
        ("graph/lower.py", "import qtoolkit.ops as ops\nops.add", True),
        ("graph/lower.py", "from torch import ops", False),
        ("graph/lower.py", "from torch._ops import OpOverload", False),
        ("graph/lower.py", "import torch._ops", False),
        ("graph/lower.py", "import torch\nx = torch._ops.ops.qtoolkit", False),
        ("graph/lower.py", "import torch as t\nx = t.ops.qtoolkit", False),
        ("graph/lower.py", "import torch\nx = getattr(torch, 'ops')", False),
        ("graph/lower.py", "import torch\nx = getattr(torch, '_ops').ops", False),
        ("graph/lower.py", "import importlib\nimportlib.import_module('torch._ops')", False),
        ("graph/lower.py", "import importlib\nimportlib.import_module('qtoolkit.nn')", True),
        ("nn/conv.py", "import importlib\nimportlib.import_module('qtoolkit.graph')", False),
        ("nn/conv.py", "from importlib import import_module as f\nf('qtoolkit.graph')", False),
        ("nn/conv.py", "import importlib\nimportlib.import_module('..graph', __package__)", False),
        ("nn/conv.py", "import importlib\nimportlib.import_module('.graph', 'qtoolkit')", False),
        ("nn/conv.py", "import importlib\nimportlib.import_module('qtoolkit.' + name)", False),
        ("nn/conv.py", "__import__('qtoolkit.workflow')", False),
    ],
)  # fmt: skip
def test_python_violations_are_found(tmp_path, file, line, allowed):
    plant(tmp_path / "qtoolkit", file, line + "\n")
    assert (list(python_violations(tmp_path / "qtoolkit")) == []) == allowed
