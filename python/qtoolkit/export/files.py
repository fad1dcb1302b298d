"""Writing a file so that a failure leaves nothing half written."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path of the same name in a new folder beside ``path``.

    When the block ends well, all files in that folder are moved to where ``path`` is, over those
    that are there; ``path`` itself last. When it fails they are deleted, and an older file stays
    whole. A link's target is replaced, not the link.

    Raises:
        IsADirectoryError: ``path`` names a folder, or is empty.
        FileNotFoundError: the folder of ``path`` does not exist.
        OSError: nothing can be written there; the message names it.
    """
    target = Path(os.path.realpath(path))
    if not os.fspath(path) or target.is_dir():
        raise IsADirectoryError(f"cannot write {os.fspath(path)!r}: the path must name a file")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: there is no folder {target.parent}")
    try:
        folder = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise type(error)(
            error.errno, f"cannot write {target}: {error.strerror}", str(target.parent)
        ) from error
    with folder as name:
        try:
            yield Path(name) / target.name
        except OSError as error:
            named = str(error.strerror).startswith("cannot write")
            if named or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise type(error)(
                error.errno, f"cannot write {target}: {error.strerror}", str(target.parent)
            ) from error
        files = sorted(Path(name).iterdir(), key=lambda file: file.name == target.name)
        for file in files:
            file.chmod(0o644)
            file.replace(target.parent / file.name)


def write_buffered(save: Callable[[io.BytesIO], object], path: Path) -> None:
    """Writes what ``save`` puts into memory: PyTorch ends the process where a disk is full.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.BytesIO()
    save(buffer)
    path.write_bytes(buffer.getbuffer())
