"""Loads the operator library, which registers torch.ops.qtoolkit."""

from pathlib import Path

import torch

_FOLDER = Path(__file__).resolve().parent


def load() -> None:
    """Loads libqtoolkit_ops.so and, where a GPU can run it, libqtoolkit_ops_cuda.so.

    Raises ImportError, with the command that builds it, if the library is missing or does not fit
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
            f"{library} does not load with PyTorch {torch.__version__}: {error}. It was built for "
            "another version; build it again: pip install --no-build-isolation -e ."
        ) from error
    cuda_library = _FOLDER / "libqtoolkit_ops_cuda.so"
    if cuda_library.exists() and torch.cuda.is_available():
        torch.ops.load_library(str(cuda_library))


load()
