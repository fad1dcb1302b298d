"""The container: a safetensors file with a JSON document in its metadata.

Reading trusts nothing. Sizes, types and offsets are checked before memory is taken for them, and
the checksum before anything is made of the content.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

#: Version of the document that this package writes; ``docs/saving.md`` describes it.
VERSION = 1
FORMAT = "qtoolkit"
#: Bytes of the header at most: parsed JSON needs some twenty times its size in memory.
MAX_HEADER = 16 << 20
_CHUNK = 1 << 20
_KEYS = {"format", "version", "sha256", "document"}

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class InvalidFileError(ValueError):
    """A file is damaged, cut off, of another kind, or holds what this version does not take."""


def require(condition: bool, message: str) -> None:
    """Raises ``InvalidFileError`` with the message unless the condition holds."""
    if not condition:
        raise InvalidFileError(message)


def parse_json(data: bytes | str, what: str) -> Any:
    """JSON without duplicate keys, NaN and Infinity.

    Raises:
        InvalidFileError: it is something else; ``what`` names it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key appears twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidFileError(f"{what} is no valid JSON: {error}") from error


def memory_of(tensor: Tensor) -> Any:
    """The bytes of a dense CPU tensor as a writable buffer."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def _dense(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def _digest(
    version: int, document: str, table: dict[str, Any], chunks: Iterable[Any], size: int
) -> str:
    """SHA-256 over version, document, table of tensors and data, each after its length."""
    digest = hashlib.sha256()
    canonical = json.dumps(table, sort_keys=True, separators=(",", ":"))
    for text in (str(version), document, canonical):
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    digest.update(size.to_bytes(8, "little"))
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def write(path: Path, document: Any, tensors: dict[str, Tensor]) -> None:
    """Writes a document and tensors.

    Raises:
        ValueError: a tensor has a type that safetensors does not know, or the document is larger
            than readers take.
        OSError: the file cannot be written.
    """
    table: dict[str, Any] = {}
    offset = 0
    # Wide types first, so that every tensor is aligned to its type.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in order:
        tensor = tensors[name]
        if tensor.dtype not in _NAMES:
            raise ValueError(f"cannot save {name}: tensors of {tensor.dtype} have no place in it")
        end = offset + tensor.numel() * tensor.element_size()
        table[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))

    def chunks() -> Iterator[Any]:
        for name in order:
            tensor = _dense(tensors[name])
            if tensor.nbytes:
                yield memory_of(tensor)

    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "sha256": _digest(VERSION, text, table, chunks(), offset),
        "document": text,
    }
    header = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER:
        raise ValueError(f"the model's description has {len(header)} bytes; {MAX_HEADER} can be")
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for chunk in chunks():
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its type and shape, and where in the file its bytes lie."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    size: int


def parse_entry(name: str, value: Any) -> tuple[Entry, int]:
    """A row of the header's table, and the end of its bytes."""
    where = f"tensor {name!r}"
    require(
        isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"},
        f"{where} must have dtype, shape and data_offsets",
    )
    dtype = value["dtype"]
    require(isinstance(dtype, str) and dtype in _DTYPES, f"{where} has an unknown type {dtype!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    for numbers in (shape, offsets):
        good = isinstance(numbers, list) and len(numbers) <= 64
        good = good and all(type(n) is int and 0 <= n < 1 << 63 for n in numbers)
        require(good, f"{where} has a shape or offsets that are no sizes")
    require(len(offsets) == 2, f"{where} must have two offsets")
    size = math.prod(shape) * _DTYPES[dtype].itemsize
    require(offsets[1] - offsets[0] == size, f"{where} of shape {shape} does not have {size} bytes")
    return Entry(_DTYPES[dtype], tuple(shape), offsets[0], size), offsets[1]


class Container:
    """An open file whose header and checksum are right.

    Attributes:
        version: of the document.
        document: parsed JSON.
        entries: the tensors by name.
        sha256: the checksum.
        size: bytes of the file.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self.size = size
        require(size >= 8, "it is too short for a header")
        length = int.from_bytes(self._read(8), "little")
        require(length <= size - 8, f"its header of {length} bytes is cut off")
        require(length <= MAX_HEADER, f"its header has {length} bytes, more than {MAX_HEADER}")
        header = parse_json(self._read(length), "its header")
        require(isinstance(header, dict), "its header is no object")
        metadata = header.pop("__metadata__", None)
        require(
            isinstance(metadata, dict) and metadata.get("format") == FORMAT,
            "it was not written by qtoolkit.save",
        )
        text = metadata.get("version")
        good = isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 10
        require(good, f"its version is {str(text)[:80]!r}")
        self.version = int(text)
        # First, as what follows may be otherwise in a newer one.
        require(
            self.version <= VERSION,
            f"it has version {text}, this qtoolkit reads up to {VERSION}: update qtoolkit",
        )
        require(
            metadata.keys() == _KEYS and all(isinstance(v, str) for v in metadata.values()),
            f"its metadata must be {sorted(_KEYS)}",
        )
        self._start = 8 + length
        self.entries = self._table(header)
        self.sha256 = metadata["sha256"]
        found = _digest(
            self.version, metadata["document"], header, self._data(), size - self._start
        )
        require(found == self.sha256, "its checksum is wrong: the file is damaged")
        self.document = parse_json(metadata["document"], "its document")

    def _read(self, count: int) -> bytes:
        data = self._file.read(count)
        require(len(data) == count, "it is cut off")
        return data

    def _table(self, header: dict[str, Any]) -> dict[str, Entry]:
        rows = [(name, *parse_entry(name, value)) for name, value in header.items()]
        position = 0
        for name, entry, end in sorted(rows, key=lambda row: (row[1].begin, row[2])):
            require(entry.begin == position, f"tensor {name!r} overlaps one or leaves a gap")
            position = end
        require(
            position == self.size - self._start,
            f"its tensors have {position} bytes, the file {self.size - self._start}",
        )
        return {name: entry for name, entry, _ in rows}

    def _data(self) -> Iterator[bytes]:
        self._file.seek(self._start)
        while chunk := self._file.read(_CHUNK):
            yield chunk

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor.

        Raises:
            InvalidFileError: there is none of that name.
        """
        require(name in self.entries, f"it has no tensor {name!r}")
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.size:
            self._file.seek(self._start + entry.begin)
            read = self._file.readinto(memory_of(tensor))  # type: ignore[attr-defined]
            require(read == entry.size, "it is cut off")
        return tensor


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Container]:
    """An open file, closed at the end of the block.

    Raises:
        InvalidFileError: the file is none of ours, or damaged; also what the block raises of this
            kind. The message begins with the path.
        OSError: it cannot be read.
    """
    # A pipe or device would block, or never end.
    regular = stat.S_ISREG(os.stat(path).st_mode)
    try:
        require(regular, "it is no regular file")
        with open(path, "rb") as file:
            yield Container(file, os.fstat(file.fileno()).st_size)
    except InvalidFileError as error:
        raise InvalidFileError(f"cannot load {os.fspath(path)!r}: {error}") from error


def migrated(version: int, document: Any, migrations: dict[int, Callable[[Any], Any]]) -> Any:
    """A document as this version has it.

    Args:
        migrations: for a version, what makes a document of it one of the next version.

    Raises:
        InvalidFileError: the version is unknown.
    """
    for number in range(version, VERSION):
        require(number in migrations, f"version {number} is unknown")
        document = migrations[number](document)
    return document
