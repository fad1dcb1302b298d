"""Loads the operator libraries, which register torch.ops.qtoolkit."""

import platform
import warnings
from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent
#: For CMAKE_PREFIX_PATH, so that ``find_package(qtoolkit)`` finds this package.
cmake_prefix_path = str(_FOLDER / "share" / "cmake")
_BUILD_AGAIN = "Build it again: pip install --no-build-isolation -e ."


def load() -> None:
    """Loads libqtoolkit_ops.so and, where there is one that loads, libqtoolkit_ops_cuda.so.

    Raises ImportError, with the command that builds it, if the first is missing or does not fit
    the installed PyTorch.
    """
    library = _FOLDER / "libqtoolkit_ops.so"
    if not library.exists():
        raise ImportError(
            f"{library} is missing: qtoolkit's C++ part is not built. In the repository run "
            "./scripts/test.sh, or: pip install --no-build-isolation -e ."
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"{library} does not load with PyTorch {torch.__version__}: {_reason(error)}. It was "
            f"built for another version. {_BUILD_AGAIN}"
        ) from error
    _check_version()
    _load_cuda()


def _check_version() -> None:
    """PyTorch's C++ interface changes from one minor version to the next, at times silently."""
    try:
        import qtoolkit._C as _C
    except ImportError as error:
        raise ImportError(
            f"qtoolkit._C does not load with Python {platform.python_version()}: {error}. It was "
            f"built for another version. {_BUILD_AGAIN}"
        ) from error
    built_for = _C.build_info()["torch"]
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        raise ImportError(
            f"qtoolkit in {_FOLDER} was built for PyTorch {built_for}, but {torch.__version__} is "
            f"installed; the minor versions must be equal. {_BUILD_AGAIN}"
        )
    _C.cpu_paths()  # ValueError now, not at the first operator, if QTOOLKIT_MAX_PATH is no path


def _load_cuda() -> None:
    # Whether there is a GPU is not asked: that initializes the driver, and a process forked later
    # could not use it. Without a GPU the operators are there and nothing calls them.
    library = _FOLDER / "libqtoolkit_ops_cuda.so"
    if torch.version.cuda is None or not library.exists():
        return
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        warnings.warn(
            f"qtoolkit goes on without its CUDA operators: {library} does not load with PyTorch "
            f"{torch.__version__} (CUDA {torch.version.cuda}): {_reason(error)}. "
            f"{_BUILD_AGAIN}",
            RuntimeWarning,
            stacklevel=2,
        )


def _reason(error: OSError) -> str:
    """What the dynamic linker said; load_library's own message may only name the file."""
    return str(error.__cause__ or error)


load()
