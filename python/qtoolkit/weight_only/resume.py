"""Layers that are done, kept in a folder, so that an interrupted run goes on where it was."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from qtoolkit.export.files import staged
from qtoolkit.saving.container import InvalidFileError, memory_of, opened, write
from qtoolkit.weight_only.grid import Coded, Grid
from qtoolkit.weight_only.method import Result


def digest_of(values: Iterable[Any]) -> str:
    """SHA-256 over tensors and whatever else ``repr`` tells apart."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            dense = value.detach().cpu().contiguous()
            digest.update(f"{dense.dtype}{list(dense.shape)}".encode())
            if dense.numel():
                digest.update(memory_of(dense))
        elif isinstance(value, dict):
            digest.update(digest_of(item for pair in value.items() for item in pair).encode())
        elif isinstance(value, tuple | list):
            digest.update(digest_of(value).encode())
        else:
            digest.update(f"{type(value).__name__}{value!r}".encode())
    return digest.hexdigest()


class Finished:
    """What a folder has of layers.

    Args:
        folder: made when the first layer is done.
        settings: all that the codes of a layer depend on beside its name and weight.

    Raises:
        NotADirectoryError: there is a file of that name.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: Any) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"quantize_weights: resume={folder} is a file, not a folder")
        self._settings = digest_of([settings])

    def _key(self, name: str, weight: Tensor) -> str:
        return digest_of([self._settings, name, weight])

    def load(self, name: str, weight: Tensor, grid: Grid) -> Result | None:
        """The layer as it was kept; None if it was not, or with other settings or weights."""
        path = self.folder / f"{self._key(name, weight)}.safetensors"
        if not path.is_file():
            return None
        try:
            with opened(path) as file:
                tensors = {key: file.tensor(key) for key in file.entries}
        except InvalidFileError:  # such as one that a full disk cut off: it is made again
            return None
        coded = Coded(grid, tensors["scale"], tensors.get("zero_point"), tensors["codes"])
        return Result(coded, tensors.get("input_factor"))

    def keep(self, name: str, weight: Tensor, result: Result) -> None:
        """Writes a layer; a file appears when it is whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        coded = result.coded
        tensors = {
            "scale": coded.scale,
            "zero_point": coded.zero_point,
            "codes": coded.codes,
            "input_factor": result.input_factor,
        }
        with staged(self.folder / f"{self._key(name, weight)}.safetensors") as path:
            write(path, {"layer": name}, {k: t for k, t in tensors.items() if t is not None})
