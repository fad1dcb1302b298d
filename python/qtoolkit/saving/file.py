"""``qt.save``, ``qt.load`` and ``qt.file_info``."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qtoolkit._version import __version__
from qtoolkit.export.files import staged
from qtoolkit.graph.prepare import is_observer
from qtoolkit.graph.report import FloatLayer, Report, get_report, set_report
from qtoolkit.qconfig import QConfigMapping
from qtoolkit.saving.container import Container, migrated, opened, require, write
from qtoolkit.saving.modules import Reader, Writer
from qtoolkit.saving.summary import LayerInfo, read_layers, summarize

#: For a version, what makes a document of it one of the next version.
_MIGRATIONS: dict[int, Callable[[Any], Any]] = {}
_KEYS = {"written_by", "recipe", "metrics", "report", "layers", "channels_last", "model"}


@dataclass(frozen=True)
class FileInfo:
    """What a file says of itself.

    Attributes:
        path: the file.
        size: bytes.
        sha256: checksum over all that it holds.
        version: of its schema.
        qtoolkit: the version of qtoolkit that wrote it.
        torch: the version of PyTorch that wrote it.
        recipe: the ``QConfigMapping`` that made the model, for ``QConfigMapping.from_dict``, or
            None.
        metrics: what was given to ``save``.
        layers: each layer's format and scales.
    """

    path: Path
    size: int
    sha256: str
    version: int
    qtoolkit: str
    torch: str
    recipe: dict[str, Any] | None
    metrics: dict[str, Any]
    layers: tuple[LayerInfo, ...]


def check_metrics(metrics: Mapping[str, Any] | None, function: str) -> dict[str, Any]:
    """Metrics as a dict of JSON.

    Raises:
        TypeError: they are no mapping from names to what JSON can hold.
        ValueError: a number is NaN or infinite.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping) or not all(isinstance(key, str) for key in metrics):
        raise TypeError(f'{function}: metrics must be a dict by name, such as {{"top1": 0.76}}')
    try:
        return json.loads(json.dumps(dict(metrics), allow_nan=False))
    except TypeError as error:
        raise TypeError(f"{function}: metrics must be numbers and texts: {error}") from error
    except ValueError as error:
        raise ValueError(f"{function}: a metric is NaN or infinite") from error


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metrics: Mapping[str, Any] | None = None,
    recipe: QConfigMapping | None = None,
) -> None:
    """Writes a quantized model: tensors and JSON, no pickle and no code.

    The file is a safetensors file; ``docs/saving.md`` describes it. The same model gives the same
    bytes. Graphs are held as lists of nodes and float layers by name, so what a file can hold is
    limited to layers of ``torch.nn`` and qtoolkit and to functions of tensors.

    Args:
        model: the result of ``qt.convert`` or ``qt.compile``, or of ``qt.quantize_dynamic`` where
            it is made of PyTorch's own modules. It is not changed.
        path: the file; written under another name and renamed when all went well, so that an older
            file there stays whole if something fails.
        metrics: what is known of the model, numbers and texts by name.
        recipe: how it was quantized; what ``qt.prepare`` was given, if None.

    Raises:
        TypeError: ``model`` is not a module, ``metrics`` no dict of numbers and texts, or
            ``recipe`` no ``QConfigMapping``.
        ValueError: the model is not quantized, simulates a format in float, or has a layer that a
            file cannot hold (names it); nothing is written.
        OSError: the file cannot be written; an older one is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save needs a torch.nn.Module, got {type(model).__name__}")
    if recipe is not None and not isinstance(recipe, QConfigMapping):
        raise TypeError(f"save: recipe must be a QConfigMapping, got {type(recipe).__name__}")
    report = get_report(model)
    if report is None or not report.converted:
        raise ValueError("save needs the result of qt.convert; of a float model save state_dict()")
    if any(is_observer(module) for module in model.modules()):
        raise ValueError(
            "save: this model simulates formats that have no integer kernel (see qt.explain), "
            "which files cannot hold: prepare it with integer formats of up to 8 bits"
        )
    known = check_metrics(metrics, "save")
    writer = Writer()
    description = writer.module(model)
    document = {
        "written_by": {"qtoolkit": __version__, "torch": str(torch.__version__)},
        "recipe": report.recipe if recipe is None else recipe.to_dict(),
        "metrics": known,
        "report": {
            "inputs": report.inputs,
            "uncaptured": [dataclasses.asdict(layer) for layer in report.uncaptured],
            "floats": [dataclasses.asdict(layer) for layer in report.floats],
        },
        "layers": summarize(model),
        "channels_last": writer.channels_last,
        "model": description,
    }
    with staged(path) as temporary:
        try:
            write(temporary, document, writer.tensors)
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write {os.fspath(path)}: {error.strerror}"
            ) from error


def _document(container: Container) -> dict[str, Any]:
    document = migrated(container.version, container.document, _MIGRATIONS)
    good = isinstance(document, dict) and document.keys() == _KEYS
    require(good, f"its document must be an object of {sorted(_KEYS)}")
    return document


def _float_layers(value: Any) -> list[FloatLayer]:
    names = {field.name for field in dataclasses.fields(FloatLayer)}
    good = isinstance(value, list) and all(
        isinstance(layer, dict)
        and layer.keys() == names
        and all(isinstance(text, str) for text in layer.values())
        for layer in value
    )
    require(good, "its report must list float layers")
    return [FloatLayer(**layer) for layer in value]


def _report(document: dict[str, Any]) -> Report:
    report, recipe = document["report"], document["recipe"]
    good = isinstance(report, dict) and report.keys() == {"inputs", "uncaptured", "floats"}
    good = good and type(report["inputs"]) is int and 0 <= report["inputs"] <= 1000
    require(good, "its report must have inputs, uncaptured and floats")
    require(recipe is None or isinstance(recipe, dict), "its recipe must be an object")
    return Report(
        inputs=report["inputs"],
        uncaptured=_float_layers(report["uncaptured"]),
        floats=_float_layers(report["floats"]),
        converted=True,
        recipe=recipe,
    )


def load(path: str | os.PathLike[str]) -> nn.Module:
    """Reads a model that ``qt.save`` wrote, in evaluation mode on the CPU.

    It has the saved model's bits, and may be explained, compared, exported and compiled like it.
    Files from others are safe to load: what is in them is checked, and none of it is run.

    Raises:
        InvalidFileError: a ``ValueError``: the file is damaged, cut off, no such file, written by
            a newer version, or holds what no version writes; the message says what.
        OSError: it cannot be read.
        ImportError: a function of torchvision is called in its graph, which is not installed.
    """
    with opened(path) as container:
        document = _document(container)
        report = _report(document)
        reader = Reader(container, document["channels_last"])
        model = reader.module(document["model"])
        unused = sorted(reader.unused())
        require(not unused, f"no layer uses its tensors {unused[:3]}")
    set_report(model, report)
    return model.eval()


def file_info(path: str | os.PathLike[str]) -> FileInfo:
    """What a file that ``qt.save`` wrote says of itself; the model is not made.

    Raises:
        InvalidFileError, OSError: as ``load``.
    """
    with opened(path) as container:
        document = _document(container)
        report = _report(document)
        versions, metrics = document["written_by"], document["metrics"]
        good = isinstance(versions, dict) and versions.keys() == {"qtoolkit", "torch"}
        good = good and all(isinstance(text, str) for text in versions.values())
        require(good, "written_by must name qtoolkit and torch")
        require(isinstance(metrics, dict), "its metrics must be an object")
        layers = read_layers(document["layers"])
        return FileInfo(
            Path(path),
            container.size,
            container.sha256,
            container.version,
            versions["qtoolkit"],
            versions["torch"],
            report.recipe,
            metrics,
            layers,
        )
