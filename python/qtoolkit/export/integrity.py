"""Whether an exported file is whole, before a runtime reads it.

Runtimes trust the files that they are given: some crash or hang on damaged ones. So ``export.load``
checks a file first. Files that come from elsewhere, or that other tools have written again, have no
seal, and are loaded as they are.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from qtoolkit.saving import InvalidFileError

_BLOCK = 1 << 20
# Tensors are stored as they are; text is compressed, to a seventh where it was measured.
_RATIO = 100
_DIGITS = 64
_KEY = b"qtoolkit.sha256"
_FLATBUFFER_KEY = _KEY + b":"


def _hash(digest: hashlib._Hash, path: Path, start: int) -> None:
    """Adds a file from a place on."""
    with path.open("rb") as file:
        file.seek(start)
        while block := file.read(_BLOCK):
            digest.update(block)


def _check_marker(path: Path, head: bytes, before: bytes, key: bytes) -> None:
    """Raises InvalidFileError if what stands in a seal's place is much like one, but none: a
    flipped bit of its name would else switch the check off."""
    at = before.index(key)
    found = head[at : at + len(key)]
    if sum(a == b for a, b in zip(found, key)) >= len(key) - 3:
        raise InvalidFileError(f"{path} is damaged: its seal is. Copy or export it again")


class Integrity(Protocol):
    """How files of a format show damage."""

    def seal(self, path: Path) -> None:
        """Adds to a file what ``check`` needs."""

    def check(self, path: Path) -> None:
        """Raises InvalidFileError if a file is damaged."""


@dataclass(frozen=True)
class Seal:
    """SHA-256 at the start of a file, over all that follows and the files that belong to it.

    Attributes:
        before: bytes before the digest's 64 digits, which no other file starts with.
        after: bytes behind them.
        belonging: the path of a file that belongs to it, which may be absent.
        replaces: what files start with otherwise, and ``before`` has.
    """

    before: bytes
    after: bytes
    belonging: Callable[[Path], Path]
    replaces: bytes = b""

    def _digests(self, path: Path, start: int) -> Iterator[bytes]:
        """Of the file with what belongs to it, and of the file alone: beside a file that needs no
        other one may lie that of an earlier export."""
        digest = hashlib.sha256()
        _hash(digest, path, start)
        alone = digest.hexdigest().encode()
        other = self.belonging(path)
        if other.is_file():
            _hash(digest, other, 0)
            yield digest.hexdigest().encode()
        yield alone

    def seal(self, path: Path) -> None:
        """Writes the file again with its digest in front."""
        start = len(self.replaces)
        head = self.before + next(self._digests(path, start)) + self.after
        path.write_bytes(head + path.read_bytes()[start:])

    def check(self, path: Path) -> None:
        """Raises InvalidFileError if the file starts with a seal that is not its own."""
        size = len(self.before) + _DIGITS + len(self.after)
        with path.open("rb") as file:
            head = file.read(size)
        if not head.startswith(self.before):
            _check_marker(path, head, self.before, _KEY)
            return
        digests = self._digests(path, size)
        if head not in [self.before + digest + self.after for digest in digests]:
            other = self.belonging(path).name
            raise InvalidFileError(
                f"{path} is damaged: it, or {other} beside it, is not what was exported (its "
                "SHA-256 differs). Copy or export it again"
            )


class ZipChecksums:
    """The checksums and sizes that every zip archive has.

    A loader reserves memory for what the archive's directory declares. So each entry must have the
    size that is declared for it, and all together no more than ``_RATIO`` times the file's.
    """

    def seal(self, path: Path) -> None:
        """Nothing is added."""

    def check(self, path: Path) -> None:
        """Raises InvalidFileError if the file is no zip archive, or a part of it is damaged."""
        with path.open("rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    problem = _problem(archive, path.stat().st_size)
            except Exception as error:  # zipfile raises many kinds, OSError of a place outside too
                raise InvalidFileError(f"{path} is damaged, or no zip archive: {error}") from error
        if problem:
            raise InvalidFileError(f"{path} is damaged: {problem}")


def _problem(archive: zipfile.ZipFile, size: int) -> str:
    """What is wrong with an archive of ``size`` bytes; "" if nothing is."""
    entries = archive.infolist()
    declared = sum(entry.file_size for entry in entries)
    if declared > _RATIO * size:
        return f"it declares {declared} bytes of content, {_RATIO} times its size and more"
    if sum(entry.compress_size for entry in entries) > size:
        return "its parts overlap"
    for entry in entries:
        found = 0
        with archive.open(entry) as part:  # compares checksums at the end
            while block := part.read(_BLOCK):
                found += len(block)
        if found != entry.file_size:
            return f"{entry.filename} has {found} bytes, {entry.file_size} are declared"
    return ""


def _protobuf_seal() -> Seal:
    """A seal as ONNX metadata: field 14 of the model, a message of key (1) and value (2)."""
    entry = bytes([0x0A, len(_KEY)]) + _KEY + bytes([0x12, _DIGITS])
    before = bytes([0x72, len(entry) + _DIGITS]) + entry
    return Seal(before, b"", lambda path: path.with_name(f"{path.name}.data"))


def _xml_seal() -> Seal:
    """A seal as a comment, which may stand before the element that holds all."""
    declaration = b'<?xml version="1.0"?>\n'
    before = declaration + b"<!-- qtoolkit.sha256 "
    return Seal(before, b" -->\n", lambda path: path.with_suffix(".bin"), declaration)


ONNX_SEAL = _protobuf_seal()
XML_SEAL = _xml_seal()


class FlatbufferSeal:
    """SHA-256 behind the first eight bytes of a flatbuffer, over these and all that follows it.

    Only those eight, the offset of the root table and an identifier, have a fixed place.
    """

    def __init__(self, identifier: bytes) -> None:
        self.identifier = identifier

    @staticmethod
    def _digest(head: bytes, path: Path, start: int) -> bytes:
        digest = hashlib.sha256(head)
        _hash(digest, path, start)
        return digest.hexdigest().encode()

    def seal(self, path: Path) -> None:
        """Writes the file again with its digest inside."""
        data = path.read_bytes()
        # 80 bytes keep the alignment of all that is behind them.
        root = int.from_bytes(data[:4], "little") + len(_FLATBUFFER_KEY) + _DIGITS
        head = root.to_bytes(4, "little") + data[4:8]
        path.write_bytes(head + _FLATBUFFER_KEY + self._digest(head, path, 8) + data[8:])

    def check(self, path: Path) -> None:
        """Raises InvalidFileError if the file is no such flatbuffer, or its seal is another's."""
        size = 8 + len(_FLATBUFFER_KEY) + _DIGITS
        with path.open("rb") as file:
            head = file.read(size)
        if (
            head[4:8] != self.identifier
            or int.from_bytes(head[:4], "little") >= path.stat().st_size
        ):
            raise InvalidFileError(
                f"{path} is damaged, or of another kind: it has no {self.identifier.decode()} "
                "header"
            )
        if not head[8:].startswith(_FLATBUFFER_KEY):
            _check_marker(path, head[8:], _FLATBUFFER_KEY, _KEY)
            return
        if head[8 + len(_FLATBUFFER_KEY) :] != self._digest(head[:8], path, size):
            raise InvalidFileError(
                f"{path} is damaged: it is not what was exported (its SHA-256 differs). Copy or "
                "export it again"
            )


TFLITE_SEAL = FlatbufferSeal(b"TFL3")
