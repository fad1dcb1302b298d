"""Damaged and hostile files, made of good ones, and the loaders that must refuse them.

A loader of another format joins ``LOADERS``; ``scripts/fuzz_loaders.py`` and
``test_fuzz_loaders.py`` then know it.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import random
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from networks import Kinds, batches, quantize, settle
from torch import nn

import qtoolkit as qt
from qtoolkit.algorithms.run_folder import RunFolder
from qtoolkit.checkpoint import Checkpoint
from qtoolkit.registry import Registry
from qtoolkit.saving import container
from qtoolkit.weight_only import load_folder, save_folder

_HUGE = [
    0,
    1,
    -1,
    127,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**40,
]
_TEXTS = [
    "",
    "x",
    "self",
    "None",
    "__class__",
    "__import__('os').abort()",
    "a" * 300,
    "\ud800",
    "é",
    '"',
]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes, of eight kinds."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        kind = rng.randrange(8)
        place = rng.randrange(len(result) + 1)
        length = min(rng.choice((1, 2, 8, 64, 1024)), len(result) - place)
        if kind == 0 and length:  # flip a bit
            result[place] ^= 1 << rng.randrange(8)
        elif kind == 1:  # cut off
            del result[place:]
        elif kind == 2:  # extend
            result += rng.choice((rng.randbytes(rng.randrange(1, 100)), bytes(100), data[:place]))
        elif kind == 3:  # splice
            source = rng.randrange(len(data))
            result[place : place + length] = data[source : source + length]
        elif kind == 4:  # leave out
            del result[place : place + length]
        elif kind == 5:  # insert
            result[place:place] = rng.choice((b"[", b"{", b'"', b"\\", b"\xff", b"\0", b"[" * 2000))
        elif kind == 6:  # a binary number, mostly the first
            place = rng.choice((0, 0, 0, place))
            number = rng.choice(_HUGE) % 2**64
            result[place : place + 8] = number.to_bytes(8, "little")
        else:  # a number in text
            numbers = list(re.finditer(rb"\d+", bytes(result)))
            if numbers:
                start, end = rng.choice(numbers).span()
                result[start:end] = str(rng.choice(_HUGE)).encode()
    return bytes(result)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in JSON with every key or index in it."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value)
    result = []
    for key, item in items:
        result.append((value, key))
        if isinstance(item, dict | list):
            result += _places(item)
    return result


def mutated_json(value: Any, rng: random.Random) -> Any:
    """JSON with one to three parts replaced, exchanged, repeated, renamed or left out."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = _places(value)
        if not places:
            break
        holder, key = rng.choice(places)
        other, other_key = rng.choice(places)
        kind = rng.randrange(6)
        if kind == 0:
            simple = [None, True, 1e308, 0.5, [], {}, [[]], {"node": "x"}, {"tuple": [1]}]
            holder[key] = rng.choice([*simple, *_HUGE, *_TEXTS])
        elif kind == 1:
            holder[key] = copy.deepcopy(other[other_key])
        elif kind == 2:
            del holder[key]
        elif kind == 3 and isinstance(holder, dict):
            holder[rng.choice([*_TEXTS, str(other_key)])] = holder.pop(key)
        elif kind == 4 and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(other[other_key]))
        elif kind == 5 and isinstance(holder[key], int | float):
            holder[key] = rng.choice(_HUGE)
        elif isinstance(holder[key], list):
            holder[key] = holder[key] * rng.choice((0, 2, 50))
    return value


@dataclass(frozen=True)
class Loader:
    """A function that reads files of others.

    Attributes:
        make: writes a good file in an empty folder, and returns its path.
        load: reads a file; whatever is wrong with it must raise one of ``refusals``.
        resealed: bytes with a change inside that a checksum does not reveal, where there is one.
        refusals: the exceptions that say what is wrong.
        imports: modules that it needs, so that their memory is not the file's.
        megabytes: of address space that it may take, beside four times the file's size.
    """

    make: Callable[[Path], Path]
    load: Callable[[Path], Any]
    resealed: Callable[[bytes, random.Random], bytes] | None = None
    refusals: tuple[type[Exception], ...] = (ValueError,)
    imports: tuple[str, ...] = ()
    megabytes: int = 256


def mutation(loader: Loader, good: bytes, seed: str) -> bytes:
    """The damaged file of a seed."""
    rng = random.Random(seed)
    if loader.resealed is not None and rng.random() < 0.5:
        return loader.resealed(good, rng)
    return mutated_bytes(good, rng)


class _Small(nn.Module):
    """One of each kind of module that a file has."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3)
        self.lstm = nn.LSTM(2, 2)
        self.heads = nn.ModuleDict({"a": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        x = torch.relu(self.conv(x)).flatten(2).transpose(1, 2)
        return {"a": self.heads["a"](self.lstm(x)[0][:, -1]) * scale}


def _make_saved(folder: Path) -> Path:
    torch.manual_seed(0)
    qt.save(quantize(_Small(), batches((2, 1, 4, 4), 1)[0]), folder / "m.qt")
    return folder / "m.qt"


def _make_compiled(folder: Path) -> Path:
    x = batches((2, 3, 16, 16), 1)[0]
    quantized = quantize(settle(Kinds(), (2, 3, 16, 16)), x)
    qt.save(qt.compile(quantized, x, tune=False), folder / "m.qt")
    return folder / "m.qt"


def _load_saved(*shape: int) -> Callable[[Path], None]:
    def load(path: Path) -> None:
        qt.file_info(path)
        model = qt.load(path)
        # What a file computes is its own affair, as long as it ends, if only in an exception;
        # torch.fx prints where.
        quiet = contextlib.redirect_stderr(io.StringIO())
        with quiet, contextlib.suppress(Exception), torch.no_grad():
            qt.explain(model)
            model(batches(shape, 1)[0])

    return load


def _reseal_saved(data: bytes, rng: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    body = data[8 + length :]
    if rng.random() < 0.9:
        meta["document"] = json.dumps(mutated_json(json.loads(meta["document"]), rng))
    elif rng.random() < 0.5:
        header = mutated_json(header, rng)
    else:
        body = mutated_bytes(body, rng)
    version = int(meta["version"])
    meta["sha256"] = container._digest(version, meta["document"], header, [body], len(body))
    text = json.dumps({"__metadata__": meta, **header}).encode()
    return len(text).to_bytes(8, "little") + text + body


def _make_registry(folder: Path) -> Path:
    torch.manual_seed(0)
    registry = Registry(folder)
    model = quantize(nn.Sequential(nn.Conv2d(1, 2, 3)), batches((2, 1, 4, 4), 1)[0])
    first = registry.push(model, "net", metrics={"top1": 0.5})
    registry.tag(first, "release")
    version = registry.push(model, "net", parent=first)
    return folder / "versions" / "net" / f"{version.id}.json"


def _load_registry(path: Path) -> None:
    """Reads a registry that holds the record under the name of its own checksum."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "r"
        shutil.copytree(path.parents[2], root)
        (root / path.relative_to(path.parents[2])).unlink()
        data = path.read_bytes()
        name = hashlib.sha256(data).hexdigest()[:16]
        (root / "versions" / "net" / f"{name}.json").write_bytes(data)
        registry = Registry(root)
        registry.verify()
        registry.diff("net@release", name)
        registry.checkout("net")


def _make_plan(folder: Path) -> Path:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    x = batches((2, 3, 16, 16), 1)[0]
    compiled = qt.compile(quantize(nn.Sequential(*layers), x), x, tune=False)
    qt.save_plan(compiled, folder / "m.qtplan", x)
    return folder / "m.qtplan"


def _load_plan(path: Path) -> None:
    plan = qt.load_plan(path)
    with contextlib.suppress(RuntimeError, TypeError, ValueError):
        plan([batches((1, 3, 16, 16), 1)[0]])


def _reseal_plan(data: bytes, rng: random.Random) -> bytes:
    """Changes the metadata; see csrc/engine/plan_file.h."""
    start, end = 40, 40 + int.from_bytes(data[24:32], "little")
    metadata = mutated_bytes(data[start:end], rng)
    size = len(data) - (end - start) + len(metadata)
    header = data[:12] + zlib.crc32(metadata).to_bytes(4, "little")
    header += size.to_bytes(8, "little") + len(metadata).to_bytes(8, "little") + bytes(4)
    return header + zlib.crc32(header).to_bytes(4, "little") + metadata + data[end:]


def _make_exported(target: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    x = batches((2, 1, 4, 4), 1)[0]
    path = folder / f"m{qt.export.targets()[target].suffix}"
    return getattr(qt.export, target)(quantize(model, x), path, (x,), verify=False).path


def _load_exported(target: str, path: Path) -> None:
    loaded = qt.export.load(target, path)
    with contextlib.suppress(Exception):
        loaded(batches((2, 1, 4, 4), 1)[0])


def _exported(target: str, *imports: str, megabytes: int) -> Loader:
    make, load = partial(_make_exported, target), partial(_load_exported, target)
    return Loader(make, load, imports=imports, megabytes=megabytes)


def _make_beside(make: Callable[[Path], Path], name: str, folder: Path) -> Path:
    return make(folder).with_name(name)


def _beside(make: Callable[[Path], Path], name: str) -> Callable[[Path], Path]:
    """Makes the same files, of which that of the name will be damaged."""
    return partial(_make_beside, make, name)  # which can be pickled


def _make_tensorrt(folder: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
    x = batches((2, 1, 4, 4), 1)[0]
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping("tensorrt"), (x,))
    converted = qt.convert(qt.calibrate(prepared, [(x,)], progress=False))
    return qt.export.tensorrt(converted, folder / "m.onnx", (x,), verify=False).path


#: Files of other runtimes, which are refused before these read them, see ``export.integrity``; and
#: the target of each.
_EXPORTED = {
    "onnx": ("onnx", _exported("onnx", "onnx", "onnxruntime", megabytes=1024)),
    "openvino": ("openvino", _exported("openvino", "openvino", megabytes=1024)),
    "openvino_weights": (
        "openvino",
        Loader(
            _beside(partial(_make_exported, "openvino"), "m.bin"),
            lambda path: _load_exported("openvino", path.with_suffix(".xml")),
            imports=("openvino",),
            megabytes=1024,
        ),
    ),
    "pt2": ("pt2", _exported("pt2", megabytes=1024)),
    "tensorrt": (
        "tensorrt",
        Loader(
            _make_tensorrt,
            partial(_load_exported, "tensorrt"),
            imports=("onnx", "onnxruntime"),
            megabytes=1024,
        ),
    ),
    "tflite": ("tflite", _exported("tflite", "ai_edge_litert.interpreter", megabytes=1024)),
    "torchscript": ("torchscript", _exported("torchscript", megabytes=1024)),
}


def _linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 8, bias=False)).eval()


def _make_weights(folder: Path) -> Path:
    save_folder(qt.quantize_weights(_linear(), "int4", 8, progress=False), folder)
    return folder / "model.safetensors"


def _make_foreign(method: str, folder: Path) -> Path:
    """A checkpoint in the form of GPTQ or AWQ: the first layer has 4-bit codes, in two groups."""
    model, rng = _linear(), torch.Generator().manual_seed(0)
    words = (2, 8) if method == "gptq" else (16, 1)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-(2**31), 2**31, shape, generator=rng).to(torch.int32)

    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "0.weight"}
    tensors |= {"0.qweight": integers(*words), "0.qzeros": integers(2, 1)}
    tensors["0.scales"] = torch.rand(2, 8, generator=rng).half()
    container.write(folder / "model.safetensors", {}, tensors)
    config = {"quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors"


def _load_weights(path: Path) -> None:
    model = load_folder(path.parent, _linear())
    with contextlib.suppress(Exception), torch.no_grad():
        model(batches((2, 16), 1)[0])


def _reseal_header(data: bytes, rng: random.Random) -> bytes:
    """Changes what a safetensors file says of its tensors."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(mutated_json(json.loads(data[8 : 8 + length]), rng)).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _reseal_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(mutated_json(json.loads(data), rng)).encode()


#: Folders of safetensors and JSON with models whose weights are codes.
_WEIGHTS = {
    "weights": Loader(_make_weights, _load_weights, _reseal_header),
    "weights_document": Loader(
        _beside(_make_weights, "quantization.json"), _load_weights, _reseal_json
    ),
    "gptq": Loader(partial(_make_foreign, "gptq"), _load_weights, _reseal_header),
    "gptq_config": Loader(
        _beside(partial(_make_foreign, "gptq"), "config.json"), _load_weights, _reseal_json
    ),
    "awq": Loader(partial(_make_foreign, "awq"), _load_weights, _reseal_header),
}


def _make_recipe(folder: Path) -> Path:
    qt.get_recipe(qt.recipe_names()[-1]).save(folder / "recipe.json")
    return folder / "recipe.json"


def _make_checkpoint(folder: Path) -> Path:
    checkpoint = Checkpoint(folder / "run.json", "run")
    checkpoint.state = {"done": 1}
    checkpoint.save()
    return folder / "run.json"


def _make_run(folder: Path) -> Path:
    RunFolder(folder, {"recipe": "w8a8", "seed": 0, "digest": "0" * 8})
    return folder / "run.json"


def _load_run(path: Path) -> None:
    RunFolder(path.parent, {"recipe": "w8a8", "seed": 0, "digest": "0" * 8})


def _make_blob(folder: Path) -> Path:
    _make_registry(folder)
    return next(path for path in (folder / "blobs").rglob("*") if path.is_file())


def _load_blob(path: Path) -> None:
    root = next(parent for parent in path.parents if (parent / "versions").is_dir())
    problems = Registry(root).verify()
    Registry(root).checkout("net@release")
    if problems:
        raise ValueError(problems[0])


#: By the name that ``scripts/fuzz_loaders.py --loader`` takes.
LOADERS: dict[str, Loader] = {
    "save": Loader(_make_saved, _load_saved(2, 1, 4, 4), _reseal_saved),
    "save_compiled": Loader(_make_compiled, _load_saved(2, 3, 16, 16), _reseal_saved),
    "plan": Loader(_make_plan, _load_plan, _reseal_plan),
    "registry": Loader(_make_registry, _load_registry, _reseal_json),
    "registry_blob": Loader(_make_blob, _load_blob),
    "recipe": Loader(_make_recipe, qt.Recipe.load, _reseal_json),
    "checkpoint": Loader(_make_checkpoint, lambda path: Checkpoint(path, "run")),
    "run_folder": Loader(_make_run, _load_run, _reseal_json),
    **_WEIGHTS,
    **{
        name: loader
        for name, (target, loader) in _EXPORTED.items()
        if qt.export.targets()[target].available
    },
}
