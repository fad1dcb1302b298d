"""A registry of quantized models: versions of them in a folder or on a remote file system.

A version is one small file that nothing changes later, named by the checksum of what is in it; a
model is one file named by its own. So there is no index that two writers could overwrite, and what
is damaged is noticed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from qtoolkit._version import __version__
from qtoolkit.export.errors import MissingPackageError
from qtoolkit.export.files import staged
from qtoolkit.saving import FileInfo, InvalidFileError, LayerInfo, file_info, load, save
from qtoolkit.saving.container import parse_json, require
from qtoolkit.saving.file import check_metrics

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_ID = re.compile(r"[0-9a-f]{16}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_TIME = re.compile(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}\.\d{6}\+00:00")
_SCHEMA = 1
#: Bytes of a version's file at most.
_LARGEST_RECORD = 1 << 20


@dataclass(frozen=True)
class Version:
    """A model as it was pushed.

    Attributes:
        id: 16 hexadecimal digits; no two versions have the same.
        name: of the model.
        parent: id of the version that it came from, or None.
        message: what the one who pushed it said.
        metrics: numbers and texts by name.
        created: time in UTC, as ISO 8601.
        blob: SHA-256 of the model's file.
        size: bytes of the model's file.
        qtoolkit: the version of qtoolkit that pushed it.
    """

    id: str
    name: str
    parent: str | None
    message: str
    metrics: dict[str, Any]
    created: str
    blob: str
    size: int
    qtoolkit: str

    def __str__(self) -> str:
        metrics = ", ".join(f"{key} {value}" for key, value in self.metrics.items())
        parts = (self.id, self.created[:19], self.name, f"{self.size} bytes", metrics, self.message)
        return "  ".join(part for part in parts if part)


@dataclass(frozen=True)
class LayerChange:
    """A layer that differs between two versions; what one lacks is None there.

    Attributes:
        name: dotted name in the float model.
        kinds: its class in each.
        formats: what it reads and writes in each.
        scales: of the tensors whose scales differ, the least and greatest scale in each.
    """

    name: str
    kinds: tuple[str | None, str | None]
    formats: tuple[str | None, str | None]
    scales: dict[str, tuple[tuple[float, float] | None, tuple[float, float] | None]]


@dataclass(frozen=True)
class Diff:
    """How two versions differ; ``print`` it for a table.

    Attributes:
        versions: the two.
        metrics: those that differ, such as accuracy or latency; None where one lacks it.
        sizes: bytes of each file.
        layers: the layers that differ.
    """

    versions: tuple[Version, Version]
    metrics: dict[str, tuple[Any, Any]]
    sizes: tuple[int, int]
    layers: tuple[LayerChange, ...]

    def __str__(self) -> str:
        a, b = self.versions
        lines = [f"{a.name} {a.id} -> {b.name} {b.id}", f"size: {_change(self.sizes)}"]
        lines += [f"{name}: {_change(pair)}" for name, pair in self.metrics.items()]
        for layer in self.layers:
            facts = [_change(pair) for pair in (layer.kinds, layer.formats) if pair[0] != pair[1]]
            for name, (first, second) in layer.scales.items():
                if first is not None and second is not None:
                    facts.append(f"{name} scale {first[1]:.4g} -> {second[1]:.4g}")
            lines.append(f"{layer.name}: {'; '.join(facts) or 'other scales'}")
        return "\n".join(lines)


def _change(pair: tuple[Any, Any]) -> str:
    first, second = pair
    text = f"{'none' if first is None else first} -> {'none' if second is None else second}"
    if type(first) in (int, float) and type(second) in (int, float) and first:
        text += f" ({(second - first) / abs(first):+.2%})"
    return text


class _Store(Protocol):
    """Files by relative path; a file is there whole or not at all."""

    def put(self, source: Path, path: str) -> None: ...

    def get(self, path: str, limit: int) -> contextlib.AbstractContextManager[Path]: ...

    def names(self, path: str) -> list[str]: ...


class _Folder:
    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, source: Path, path: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target) as temporary:
            shutil.copyfile(source, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())

    @contextlib.contextmanager
    def get(self, path: str, limit: int) -> Iterator[Path]:
        file = self.root / path
        require(file.stat().st_size <= limit, f"{file} is longer than {limit} bytes")
        yield file

    def names(self, path: str) -> list[str]:
        try:
            return sorted(name for name in os.listdir(self.root / path) if name[0] != ".")
        except FileNotFoundError:
            return []


class _Remote:
    def __init__(self, url: str) -> None:
        try:
            fsspec = importlib.import_module("fsspec.core")
        except ImportError as error:
            raise MissingPackageError(
                f"a registry at {url} needs fsspec: pip install fsspec (and the package that it "
                "names for this kind of URL); a folder needs nothing"
            ) from error
        self.files, self.root = fsspec.url_to_fs(url)

    def _path(self, path: str) -> str:
        return f"{self.root.rstrip('/')}/{path}"

    def put(self, source: Path, path: str) -> None:
        folder, _, name = self._path(path).rpartition("/")
        temporary = f"{folder}/.{name}.{uuid.uuid4().hex}"
        self.files.makedirs(folder, exist_ok=True)
        try:
            self.files.put_file(str(source), temporary)
            self.files.mv(temporary, f"{folder}/{name}")
        except BaseException:
            with contextlib.suppress(Exception):
                self.files.rm(temporary)
            raise

    @contextlib.contextmanager
    def get(self, path: str, limit: int) -> Iterator[Path]:
        size = self.files.size(self._path(path))
        require(size is None or size <= limit, f"{path} is longer than {limit} bytes")
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            self.files.get_file(self._path(path), str(target))
            yield target

    def names(self, path: str) -> list[str]:
        folder = self._path(path)
        self.files.invalidate_cache(folder)
        try:
            found = self.files.ls(folder, detail=False)
        except FileNotFoundError:
            return []
        names = (str(entry).rstrip("/").rpartition("/")[2] for entry in found)
        return sorted(name for name in names if name and name[0] != ".")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_name(name: Any, what: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or _ID.fullmatch(name):
        raise ValueError(
            f"{name!r} is no {what}: use up to 100 letters, digits, dots, underscores and dashes, "
            "and not 16 hexadecimal digits alone, which are a version"
        )
    return name


class Registry:
    """Versions of quantized models in a folder, or wherever fsspec reaches.

    Any number of processes may push, tag and read at the same time.

    Args:
        url: a folder, made when something is pushed, or a URL for fsspec such as
            ``"s3://bucket/models"``.

    Raises:
        NotADirectoryError: ``url`` is a file.
        MissingPackageError: ``url`` needs fsspec, which is not installed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        text = os.fspath(url)
        self._store: _Store
        if "://" in text and not text.startswith("file://"):
            self._store = _Remote(text)
        else:
            root = Path(text.removeprefix("file://"))
            if root.exists() and not root.is_dir():
                raise NotADirectoryError(f"a registry is a folder, and {root} is none")
            self._store = _Folder(root)
        self.url = text

    def push(
        self,
        model: nn.Module,
        name: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        parent: Version | str | None = None,
        message: str = "",
    ) -> Version:
        """Adds a version of a model.

        Args:
            model: what ``qt.save`` takes. A model that is there already is not kept twice.
            name: letters, digits, dots, underscores and dashes.
            metrics: numbers and texts by name, such as accuracy, or latency in milliseconds.
            parent: the version that it came from, as ``checkout`` takes it.
            message: what is new.

        Raises:
            TypeError, ValueError: as ``qt.save``; or the name is none.
            LookupError: there is no such parent.
            OSError: it cannot be written; then nothing has changed.
        """
        _check_name(name, "name of a model")
        known = check_metrics(metrics, "push")
        origin = None if parent is None else self.find(parent)
        now = datetime.now(timezone.utc)
        if origin is not None:  # clocks differ
            now = max(now, datetime.fromisoformat(origin.created) + timedelta(microseconds=1))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.qt"
            save(model, file)
            record = {
                "schema": _SCHEMA,
                "name": name,
                "parent": None if origin is None else origin.id,
                "message": str(message),
                "metrics": known,
                "created": now.isoformat(timespec="microseconds"),
                "blob": _sha256(file),
                "size": file.stat().st_size,
                "qtoolkit": __version__,
                "nonce": uuid.uuid4().hex,
            }
            text = json.dumps(record, sort_keys=True).encode()
            if len(text) > _LARGEST_RECORD:
                raise ValueError(
                    f"push: message and metrics have more than {_LARGEST_RECORD} bytes"
                )
            number = hashlib.sha256(text).hexdigest()[:16]
            entry = Path(folder) / "version.json"
            entry.write_bytes(text)
            # The model first: whoever sees a version finds its model.
            self._store.put(file, f"blobs/{record['blob']}.qt")
            self._store.put(entry, f"versions/{name}/{number}.json")
        return self._read(name, number)

    def names(self) -> list[str]:
        """The names of all models."""
        return self._store.names("versions")

    def log(self, name: str) -> list[Version]:
        """The versions of a model, the newest first.

        Raises:
            LookupError: there is no model of that name.
            InvalidFileError: a version's file is damaged; names it.
        """
        _check_name(name, "name of a model")
        files = [file for file in self._store.names(f"versions/{name}") if file.endswith(".json")]
        if not files:
            raise LookupError(f"{self.url} has no model {name!r}; it has {self.names()}")
        versions = [self._read(name, file.removesuffix(".json")) for file in files]
        return sorted(versions, key=lambda v: (v.created, v.id), reverse=True)

    def tag(self, version: Version | str, tag: str) -> None:
        """Lets ``name@tag`` stand for a version from now on.

        Raises:
            LookupError: there is no such version.
            ValueError: the tag is no name.
        """
        _check_name(tag, "tag")
        found = self.find(version)
        moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
        name = f"{moment}-{uuid.uuid4().hex[:8]}-{found.id}"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "tag"
            file.write_text(found.id)
            self._store.put(file, f"tags/{found.name}/{tag}/{name}")

    def tags(self, name: str) -> dict[str, str]:
        """The tags of a model, and the ids of the versions that they stand for."""
        _check_name(name, "name of a model")
        found = {tag: self._tagged(name, tag) for tag in self._store.names(f"tags/{name}")}
        return {tag: number for tag, number in found.items() if number is not None}

    def find(self, version: Version | str) -> Version:
        """A version by its id, ``name`` (the newest), ``name@tag`` or ``name@id``.

        Raises:
            LookupError: there is none.
            InvalidFileError: its file is damaged.
        """
        text = version.id if isinstance(version, Version) else version
        if not isinstance(text, str):
            raise TypeError(f"a version is a Version or its name, got {type(text).__name__}")
        if _ID.fullmatch(text):
            for name in self.names():
                if f"{text}.json" in self._store.names(f"versions/{name}"):
                    return self._read(name, text)
            raise LookupError(f"{self.url} has no version {text}")
        name, _, tag = text.partition("@")
        if not tag:
            return self.log(name)[0]
        _check_name(name, "name of a model")
        if _ID.fullmatch(tag):
            number: str | None = tag
        else:
            number = self._tagged(name, _check_name(tag, "tag"))
        if number is None or f"{number}.json" not in self._store.names(f"versions/{name}"):
            raise LookupError(f"{self.url} has no {text}; {name} has the tags {self.tags(name)}")
        return self._read(name, number)

    def checkout(self, version: Version | str) -> nn.Module:
        """The model of a version, in evaluation mode.

        Raises:
            LookupError: there is no such version.
            InvalidFileError: its file, or the model's, is missing or damaged.
        """
        found = self.find(version)
        with self._blob(found) as file:
            return load(file)

    def info(self, version: Version | str) -> FileInfo:
        """What the file of a version's model says of itself.

        Raises:
            LookupError, InvalidFileError: as ``checkout``.
        """
        found = self.find(version)
        with self._blob(found) as file:
            return file_info(file)

    def diff(self, a: Version | str, b: Version | str) -> Diff:
        """How two versions differ: metrics, size, formats and scales of layers.

        Raises:
            LookupError, InvalidFileError: as ``checkout``.
        """
        first, second = self.find(a), self.find(b)
        names = dict.fromkeys((*first.metrics, *second.metrics))
        pairs = {name: (first.metrics.get(name), second.metrics.get(name)) for name in names}
        return Diff(
            (first, second),
            {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
            (first.size, second.size),
            _changed_layers(self.info(first).layers, self.info(second).layers),
        )

    def verify(self) -> list[str]:
        """What is wrong with the registry, a line each: files that are damaged or missing."""
        problems = []
        for name in self.names():
            for file in self._store.names(f"versions/{name}"):
                try:
                    with self._blob(self._read(name, file.removesuffix(".json"))) as path:
                        file_info(path)
                except ValueError as error:
                    problems.append(f"{name}/{file}: {error}")
        return problems

    def _tagged(self, name: str, tag: str) -> str | None:
        # Each name is a time and the version: the last one counts, and none is ever overwritten.
        numbers = [entry.rpartition("-")[2] for entry in self._store.names(f"tags/{name}/{tag}")]
        numbers = [number for number in numbers if _ID.fullmatch(number)]
        return numbers[-1] if numbers else None

    def _read(self, name: str, number: str) -> Version:
        path = f"versions/{name}/{number}.json"
        with self._store.get(path, _LARGEST_RECORD) as file:
            data = file.read_bytes()
        good = hashlib.sha256(data).hexdigest()[:16] == number
        require(good, f"{path} of {self.url} is damaged: its checksum is wrong")
        record = parse_json(data, path)
        types: dict[str, Any] = {"size": int, "metrics": dict, "parent": str | None, "schema": int}
        names = {field.name for field in fields(Version)} - {"id"} | {"schema", "nonce"}
        good = isinstance(record, dict) and record.keys() == names
        good = good and all(isinstance(record[key], types.get(key, str)) for key in names)
        good = good and record["name"] == name and bool(_DIGEST.fullmatch(record["blob"]))
        good = good and bool(_TIME.fullmatch(record["created"]))
        require(good, f"{path} of {self.url} is no version")
        require(record["schema"] == _SCHEMA, f"{path} is of a newer registry: update qtoolkit")
        return Version(number, **{k: v for k, v in record.items() if k not in ("schema", "nonce")})

    @contextlib.contextmanager
    def _blob(self, version: Version) -> Iterator[Path]:
        """The file of a version's model, which is what was pushed."""
        where = f"the model of {version.name} {version.id} in {self.url}"
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(
                    self._store.get(f"blobs/{version.blob}.qt", version.size)
                )
            except FileNotFoundError as error:
                raise InvalidFileError(f"{where} is missing") from error
            good = file.stat().st_size == version.size and _sha256(file) == version.blob
            require(good, f"{where} is damaged: push it again to repair it")
            yield file


def _changed_layers(
    first: tuple[LayerInfo, ...], second: tuple[LayerInfo, ...]
) -> tuple[LayerChange, ...]:
    tables = [_by_name(layers) for layers in (first, second)]
    changes = []
    for key in dict.fromkeys((*tables[0], *tables[1])):
        a, b = (table.get(key) for table in tables)
        if a is not None and b is not None and asdict(a) == asdict(b):
            continue
        scales = [{} if layer is None else layer.scales for layer in (a, b)]
        tensors = dict.fromkeys((*scales[0], *scales[1]))
        pairs = {name: (scales[0].get(name), scales[1].get(name)) for name in tensors}
        changes.append(
            LayerChange(
                key[0],
                (None if a is None else a.kind, None if b is None else b.kind),
                (None if a is None else a.format, None if b is None else b.format),
                {name: pair for name, pair in pairs.items() if pair[0] != pair[1]},
            )
        )
    return tuple(changes)


def _by_name(layers: tuple[LayerInfo, ...]) -> dict[tuple[str, int], LayerInfo]:
    """Layers by name, and by how many of that name came before."""
    counts: Counter[str] = Counter()
    result: dict[tuple[str, int], LayerInfo] = {}
    for layer in layers:
        result[(layer.name, counts[layer.name])] = layer
        counts[layer.name] += 1
    return result


__all__ = ["Diff", "LayerChange", "Registry", "Version"]
