"""Reading safetensors files of others, one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtoolkit.saving.container import (
    MAX_HEADER,
    Entry,
    InvalidFileError,
    memory_of,
    parse_entry,
    parse_json,
    require,
)


class Shards:
    """The tensors of a safetensors file, or of a folder of them with or without an index.

    Nothing but headers is read until a tensor is asked for.

    Args:
        path: a file, or a folder such as ``save_pretrained`` of transformers writes.

    Raises:
        FileNotFoundError: there is no such file or folder, or no safetensors file in it.
        InvalidFileError: a ``ValueError``: a file is damaged or cut off, a shard that the index
            names is missing, or a tensor is in no shard; the message names it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._where: dict[str, tuple[Path, int, Entry]] = {}
        index = self._index()
        if index is None:
            for file in self._files():
                self._where.update(_header(file))
            return
        for shard in sorted(set(index.values())):
            file = self.path / shard
            require(
                Path(shard).name == shard and file.is_file(),
                f"{self.path} lacks the shard {shard!r} that its index names",
            )
            found = _header(file)
            wanted = {name for name, where in index.items() if where == shard}
            lost = sorted(wanted - found.keys())
            require(not lost, f"{file} lacks the tensors {lost[:3]} that the index names")
            self._where.update({name: found[name] for name in wanted})

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def files(self) -> list[Path]:
        """The files that hold them."""
        return sorted({path for path, *_ in self._where.values()})

    def entry(self, name: str) -> Entry:
        """Dtype and shape of a tensor.

        Raises:
            KeyError: there is none of that name.
        """
        return self._where[name][2]

    def read(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            KeyError: there is none of that name.
            OSError: it cannot be read.
        """
        path, start, entry = self._where[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.size:
            with open(path, "rb", buffering=0) as file:
                file.seek(start + entry.begin)
                view = memoryview(memory_of(tensor)).cast("B")
                done = 0
                while done < entry.size:
                    read = file.readinto(view[done:])
                    require(bool(read), f"{path} is cut off within {name!r}")
                    done += read or 0
        return tensor

    def _index(self) -> dict[str, str] | None:
        if not self.path.is_dir():
            return None
        found = sorted(self.path.glob("*.safetensors.index.json"))
        if not found:
            return None
        data = parse_json(found[0].read_text(), str(found[0]))
        names = data.get("weight_map") if isinstance(data, dict) else None
        good = isinstance(names, dict) and all(isinstance(v, str) for v in names.values())
        require(good, f"{found[0]} has no weight_map of files by tensor")
        return names

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        files = sorted(self.path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{self.path} is no safetensors file, nor a folder with one")
        return files


def _header(path: Path) -> dict[str, tuple[Path, int, Entry]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        good = size >= 8 and length <= min(size - 8, MAX_HEADER)
        require(good, f"{path} is no safetensors file, or it is cut off in its header")
        header: Any = parse_json(file.read(length), f"the header of {path}")
    require(isinstance(header, dict), f"the header of {path} is no object")
    header.pop("__metadata__", None)
    start = 8 + length
    found = {}
    for name, value in header.items():
        try:
            entry, end = parse_entry(name, value)
        except InvalidFileError as error:
            raise InvalidFileError(f"{path}: {error}") from error
        require(
            start + end <= size,
            f"{path} is cut off: its tensor {name!r} ends at byte {start + end} of {size}",
        )
        found[name] = (path, start, entry)
    return found
