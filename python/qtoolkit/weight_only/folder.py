"""Models with weights of codes as folders: safetensors and JSON, loaded without float weights."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from qtoolkit.dynamic import replace_modules
from qtoolkit.export.errors import MissingPackageError
from qtoolkit.export.files import staged
from qtoolkit.graph.report import FloatLayer, Report, get_report, set_report
from qtoolkit.nn.base import QuantizedModule
from qtoolkit.nn.weight_only import QuantizedWeight, QuantizedWeightLinear
from qtoolkit.saving.container import (
    Container,
    InvalidFileError,
    opened,
    parse_json,
    require,
    write,
)
from qtoolkit.saving.layers import make_quantized, quantized_options
from qtoolkit.weight_only.checkpoints import read_layer
from qtoolkit.weight_only.loading import skeleton
from qtoolkit.weight_only.shards import Shards

_DOCUMENT = "quantization.json"
_FORMAT, _VERSION = "qtoolkit_weights", 1


def save_folder(
    model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int = 4_000_000_000
) -> None:
    """Writes the result of ``quantize_weights`` as ``save_pretrained`` of transformers would.

    The folder has ``model.safetensors``, or shards of it with an index; ``quantization.json``,
    which says what each layer of codes is; and, for a model of transformers, its configuration.
    Python code is not saved: whoever loads it has the model's class.

    Args:
        model: any, with layers of codes.
        path: the folder, made if it is not there.
        max_shard_size: bytes of a file at most, but for a tensor that is larger.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: it has no weights of codes, or quantized layers of another kind.
        OSError: it cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save_folder needs a torch.nn.Module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}
    if not layers or not all(isinstance(m, QuantizedWeight) for m in layers.values()):
        raise ValueError("save_folder needs the result of quantize_weights; see qt.save for others")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    shared = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach()
    report = get_report(model)
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "layers": {
            name: {"type": type(layer).__name__, "options": quantized_options(layer)}
            for name, layer in layers.items()
        },
        "shared": shared,
        "floats": [dataclasses.asdict(f) for f in (report.floats if report else [])],
    }
    (folder / _DOCUMENT).unlink(missing_ok=True)
    for old in (*folder.glob("model*.safetensors"), *folder.glob("*.safetensors.index.json")):
        old.unlink()
    shards = list(_shards(tensors, max_shard_size))
    index = {}
    for i, names in enumerate(shards):
        number = f"-{i + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        file = f"model{number}.safetensors"
        with staged(folder / file) as target:
            write(target, {"shard": i}, {name: tensors[name] for name in names})
        index.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        size = sum(t.nbytes for t in tensors.values())
        _write_json(
            folder / "model.safetensors.index.json",
            {"metadata": {"total_size": size}, "weight_map": index},
        )
    for key in ("config", "generation_config"):
        config: Any = getattr(model, key, None)
        if hasattr(config, "save_pretrained"):
            config = copy.deepcopy(config)
            if key == "config":  # as transformers' own save_pretrained does
                config.architectures = [type(model).__name__]
            config.save_pretrained(folder)
    # The last one, as a folder without it is not whole.
    _write_json(folder / _DOCUMENT, document)


def _write_json(path: Path, value: Any) -> None:
    with staged(path) as target:
        target.write_text(json.dumps(value, indent=1) + "\n")


def _shards(tensors: dict[str, Tensor], largest: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > largest:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def load_folder(
    path: str | os.PathLike[str],
    model: nn.Module | Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Reads a folder that ``save_folder`` wrote, or a GPTQ or AWQ checkpoint of transformers.

    Float weights of quantized layers are never made.

    Args:
        path: the folder.
        model: a float model of the same structure, which is not changed and may be on the meta
            device; or what makes one, called within ``skeleton``. None: the class that
            ``config.json`` names, of transformers.

    Raises:
        InvalidFileError: a ``ValueError``: a file is missing or damaged, or is not of this model;
            the message names it.
        FileNotFoundError: there is no such folder.
        MissingPackageError: ``model`` is None, and transformers is not installed.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"load_folder: there is no folder {folder}")
    if model is None:
        model = _transformers_model(folder)
    if not isinstance(model, nn.Module):
        with skeleton():
            model = model()
    tensors = (*model.parameters(), *model.buffers())
    new = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
    if (folder / _DOCUMENT).is_file():
        _load_own(folder, new)
    else:
        _load_foreign(folder, new)
    for name, tensor in (*new.named_parameters(), *new.named_buffers()):
        require(
            not tensor.is_meta,
            f"{folder} has no tensor {name!r}; make the model within "
            "qtoolkit.weight_only.skeleton() for buffers that no file holds",
        )
    return new


def _json(path: Path) -> dict[str, Any]:
    try:
        data = parse_json(path.read_text(), str(path))
    except FileNotFoundError:
        raise InvalidFileError(f"there is no {path}") from None
    require(isinstance(data, dict), f"{path} is no object")
    return data


def _transformers_model(folder: Path) -> Callable[[], nn.Module]:
    known = _json(folder / "config.json")
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise MissingPackageError(
            "load_folder without a model needs transformers: pip install transformers"
        ) from error
    names = known.get("architectures") or [None]
    cls = getattr(transformers, str(names[0]), None)
    good = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    require(good, f"{folder}/config.json names no architecture of transformers: {names}")
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config

    def make() -> nn.Module:
        made = cls(config)  # type: ignore[misc]
        if (folder / "generation_config.json").is_file():
            made.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        return made

    return make


def _load_own(folder: Path, model: nn.Module) -> None:
    document = _json(folder / _DOCUMENT)
    require(document.get("format") == _FORMAT, f"{folder / _DOCUMENT} is of another program")
    version = document.get("version")
    require(version == _VERSION, f"it has version {version}, this qtoolkit reads {_VERSION}")
    described: Any = document.get("layers")
    shared: Any = document.get("shared")
    good = isinstance(described, dict) and isinstance(shared, dict)
    require(good, f"{folder / _DOCUMENT} must have layers and shared")
    modules = dict(model.named_modules())
    lost = [name for name in described if name == "" or name not in modules]
    require(not lost, f"the model has no layers {lost[:3]}, which {folder} has codes for")
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        holders: dict[str, Container] = {}
        for file in Shards(folder).files():
            container = stack.enter_context(opened(file))
            holders.update(dict.fromkeys(container.entries, container))

        def read(name: str) -> Tensor | None:
            key = shared.get(name, name)
            if key not in tensors and key in holders:
                tensors[key] = holders[key].tensor(key)
            return tensors.get(key)

        for name, layer in described.items():
            good = isinstance(layer, dict) and layer.keys() == {"type", "options"}
            require(good and isinstance(layer["type"], str), f"{name} must have type and options")
            keys = ("codes", "scale", "zero_point", "table", "bias", "input_factor", "input_order")
            buffers = {key: read(f"{name}.{key}") for key in keys}
            if layer["type"] != "QuantizedWeightLinear":
                buffers = {k: t for k, t in buffers.items() if not k.startswith("input_")}
            if layer["type"] == "QuantizedWeightEmbedding":
                buffers.pop("bias")
            try:
                made = make_quantized(layer["type"], layer["options"], buffers)
            except InvalidFileError as error:
                raise InvalidFileError(f"{folder}: {name}: {error}") from error
            require(isinstance(made, QuantizedWeight), f"{name} has no weight of codes")
            shape = tuple(modules[name].weight.shape)
            require(tuple(made.shape) == shape, f"{name} has the shape {made.shape}, not {shape}")
            replace_modules({id(modules[name]): made.eval()}, model)
        _fill(model, read, str(folder))
    floats = document.get("floats", [])
    names = {field.name for field in dataclasses.fields(FloatLayer)}
    good = isinstance(floats, list) and all(
        isinstance(f, dict) and f.keys() == names for f in floats
    )
    require(good, f"{folder / _DOCUMENT} must list layers in float")
    set_report(model, Report(floats=[FloatLayer(**f) for f in floats], converted=True))


def _fill(model: nn.Module, read: Callable[[str], Tensor | None], where: str) -> None:
    """Takes what files have for the tensors of layers that are not of codes."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantizedWeight):
            continue
        for own in (module._parameters, module._buffers):
            for key, old in own.items():
                name = f"{prefix}.{key}" if prefix else key
                if old is None or key in module._non_persistent_buffers_set:
                    continue
                tensor = read(name)
                if tensor is None and id(old) not in made:
                    raise InvalidFileError(f"{where} has no tensor {name!r}")
                if tensor is not None and tensor.shape != old.shape:
                    raise InvalidFileError(
                        f"{where}: {name} has the shape {list(tensor.shape)}, the model needs "
                        f"{list(old.shape)}"
                    )
                if own is module._buffers:
                    own[key] = tensor
                    continue
                if id(old) not in made:
                    assert tensor is not None
                    made[id(old)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
                own[key] = made[id(old)]


def _load_foreign(folder: Path, model: nn.Module) -> None:
    config = _json(folder / "config.json").get("quantization_config")
    require(isinstance(config, dict), f"{folder} has neither {_DOCUMENT} nor a quantization_config")
    assert isinstance(config, dict)
    shards = Shards(folder)
    report = Report(converted=True)
    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        if f"{name}.qweight" not in shards:
            report.floats.append(
                FloatLayer(name, type(layer).__name__, "it is float in the checkpoint")
            )
            continue
        parts = ("qweight", "qzeros", "scales", "g_idx", "bias")
        tensors = {p: shards.read(f"{name}.{p}") for p in parts if f"{name}.{p}" in shards}
        try:
            weight, order = read_layer(tensors, config)
        except InvalidFileError as error:
            raise InvalidFileError(f"{folder}: {name}: {error}") from error
        shape = (weight.codes.size(0), weight.columns)
        require(
            shape == tuple(layer.weight.shape),
            f"{folder}: {name} has the shape {shape}, the model needs {tuple(layer.weight.shape)}",
        )
        new = QuantizedWeightLinear(
            weight,
            tensors.get("bias"),
            dtype=layer.weight.dtype,
            method=str(config["quant_method"]),
            input_order=order,
        )
        new.source = name
        replace_modules({id(layer): new.eval()}, model)
    _fill(model, lambda name: shards.read(name) if name in shards else None, str(folder))
    set_report(model, report)
