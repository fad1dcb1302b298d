"""Files are not trusted: qt.load refuses what qt.save does not write, and runs nothing of it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from networks import Kinds, batches, quantize, settle
from torch import nn

import qtoolkit as qt
from qtoolkit.saving import container


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    return quantize(settle(Kinds(), (2, 3, 16, 16)), *batches((2, 3, 16, 16), 1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    model = settle(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), (2, 1, 4, 4))
    return quantize(model, *batches((2, 1, 4, 4), 1))


def rewritten(path: Path, change, header_change=None) -> Path:
    """The file with another document, and a checksum that fits."""
    with container.opened(path) as opened:
        document = opened.document
        tensors = {name: opened.tensor(name) for name in opened.entries}
    document = copy.deepcopy(document)
    document = change(document) or document
    hostile = path.with_name("hostile.qt")
    container.write(hostile, document, tensors)
    return hostile


def first(document, **wanted):
    """The first node with such values."""
    return next(
        node
        for node in document["model"]["nodes"]
        if all(node.get(key) == value for key, value in wanted.items())
    )


def set_node(key, value, **wanted):
    return lambda document: first(document, **wanted).__setitem__(key, value)


def set_layer(name, *keys, value):
    def change(document):
        part = document["model"]["children"][name]
        for key in keys[:-1]:
            part = part[key]
        part[keys[-1]] = value

    return change


CODE = "__import__('os').system('touch /tmp/qtoolkit-was-here')"
HOSTILE = {
    "name": set_node("name", f"x; {CODE}", op="call_module"),
    "name of a keyword": set_node("name", "if", op="call_module"),
    "self": set_node("name", "self", op="placeholder"),
    "dunder": set_node("name", "__builtins__", op="placeholder"),
    "input": set_node("target", f"x={CODE}", op="placeholder"),
    "input with default": set_node("target", "x, y=1", op="placeholder"),
    "annotation": set_node("type", CODE, op="placeholder"),
    "layer": set_node("target", f'stem"), {CODE}, ("', op="call_module"),
    "layer's attribute": set_node("target", "stem.forward", op="call_module"),
    "method": set_node("target", "__reduce__", op="call_method"),
    "method of an attribute": set_node("target", "view.__self__.backward", op="call_method"),
    "method without a value": set_node("args", ["text"], op="call_method"),
    "function": set_node("target", "os.system", op="call_function"),
    "eval": set_node("target", "builtins.eval", op="call_function"),
    "load": set_node("target", "torch.load", op="call_function"),
    "attribute": lambda d: first(d, op="call_function").update(
        target="builtins.getattr", args=[{"node": "x"}, "__class__"], kwargs={}
    ),
    "named argument": set_node("kwargs", {f"a=1, b={CODE}": 1}, op="call_module"),
    "later node": set_node("args", [{"node": "output"}], op="call_module"),
    "op": set_node("op", "exec", op="call_module"),
    "value": set_node("args", [{"node": "x"}, {"eval": CODE}], op="call_module"),
    "device": set_node("args", [{"node": "x"}, {"device": CODE}], op="call_module"),
    "huge integer": set_node("args", [{"node": "x"}, 1 << 70], op="call_module"),
    "deep value": set_node("args", [json.loads("[" * 50 + "]" * 50)], op="call_module"),
    "class name": lambda d: d["model"].update(name=f"A: pass\n{CODE}\nclass B"),
    "two outputs": lambda d: d["model"]["nodes"].append({**d["model"]["nodes"][-1], "name": "o"}),
    "no nodes": lambda d: d["model"].update(nodes=[]),
    "child named like a method": lambda d: d["model"]["children"].update(
        forward=d["model"]["children"]["stem"]
    ),
    "child named like an attribute": lambda d: d["model"]["children"].update(
        _modules=d["model"]["children"]["stem"]
    ),
    "unknown kind": set_layer("stem", "kind", value="pickle"),
    "unknown type": set_layer("stem", "type", value="os.system"),
    "type of a layer": set_layer("stem", "type", value="Linear"),
    "option's type": set_layer("stem", "options", "stride", value="11"),
    "option": set_layer("stem", "options", "forward", value="x"),
    "option's value": set_layer("stem", "options", "input_format", value="int99"),
    "codes": set_layer("stem", "options", "quant_max", value=1 << 40),
    "tensor": set_layer("stem", "buffers", "weight", value="none"),
    "tensor's dtype": set_layer("stem", "buffers", "weight", value="stem.bias"),
    "tensor's name": set_layer("stem", "buffers", "weight", value=["stem.weight"]),
    "buffer": set_layer("stem", "buffers", "forward", value="stem.weight"),
    "same": lambda d: d["model"]["children"].update(stem={"kind": "same", "path": "self"}),
    "report": lambda d: d.update(report=None),
    "inputs": lambda d: d["report"].update(inputs=10**9),
    "list": lambda d: ["document"],
    "channels_last": lambda d: d.update(channels_last=[1]),
    "channels_last vector": lambda d: d.update(channels_last=["stem.bias"]),
    "no model": lambda d: {key: value for key, value in d.items() if key != "model"},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_documents_are_refused(mixed, tmp_path, change):
    qt.save(mixed, tmp_path / "m.qt")
    hostile = rewritten(tmp_path / "m.qt", change)
    with pytest.raises(qt.InvalidFileError, match=re.escape(f"cannot load '{hostile}': ")):
        qt.load(hostile)
    assert not os.path.exists("/tmp/qtoolkit-was-here")


def test_tensors_that_no_layer_uses_are_refused(mixed, tmp_path):
    def change(document):
        first, *_, last = document["model"]["nodes"]
        last["args"] = [{"node": first["name"]}]
        document["model"].update(nodes=[first, last], children={})

    qt.save(mixed, tmp_path / "m.qt")
    with pytest.raises(qt.InvalidFileError, match="no layer uses its tensors"):
        qt.load(rewritten(tmp_path / "m.qt", change))


def texts(value, path=()):
    """The path of every text in JSON, and of every key."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(value, dict):
            yield path, key
        if isinstance(item, str):
            yield (*path, key), None
        elif isinstance(item, dict | list):
            yield from texts(item, (*path, key))


def test_no_text_of_a_file_becomes_code(tiny, tmp_path):
    qt.save(tiny, tmp_path / "m.qt")
    mark = tmp_path / "mark"
    code = f"open({str(mark)!r}, 'w')"
    payloads = [code, f'x"); {code}; ("', f"x\n    {code}\n", f"x, y={code}"]
    x = batches((2, 1, 4, 4), 1)[0]
    with container.opened(tmp_path / "m.qt") as file:
        places = list(texts({"model": file.document["model"]}))
    refused = 0
    for path, key in places:
        for payload in payloads:

            def change(document, path=path, key=key, payload=payload):
                *parents, leaf = path if key is None else (*path, key)
                for part in parents:
                    document = document[part]
                if key is None:
                    document[leaf] = payload
                else:
                    document[payload] = document.pop(key)

            try:
                model = qt.load(rewritten(tmp_path / "m.qt", change))
            except qt.InvalidFileError:
                refused += 1
                continue
            with contextlib.suppress(Exception):
                model(x)
            with contextlib.suppress(Exception):
                torch.jit.script(model)
    assert refused > len(places)
    assert not mark.exists()


def test_hostile_float_layers_take_no_memory(tmp_path):
    x = torch.randn(1, 2, 4)
    model = nn.Sequential(nn.LSTM(4, 4), nn.Identity()).eval()
    none = qt.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)))
    assert model(x) is not None
    qt.save(none, tmp_path / "m.qt")
    for options in ({"num_layers": 10**9}, {"hidden_size": 1 << 62}, {"input_size": -1},
                    {"batch_first": None, "proj_size": 99}):  # fmt: skip
        change = lambda d, o=options: d["model"]["children"]["1"]["options"].update(o)  # noqa: E731
        with pytest.raises(qt.InvalidFileError):
            qt.load(rewritten(tmp_path / "m.qt", change))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer["options"].update(activation="eval"),
        lambda layer: layer["options"].pop("activation"),
        lambda layer: layer["options"].update(norm_first=1),
        lambda layer: layer["options"].update(forward="relu"),
        lambda layer: layer["children"].pop("norm1"),
        lambda layer: layer["children"].update(norm3=layer["children"]["norm1"]),
        lambda layer: layer.update(type="torch.nn.Transformer"),
    ],
)
def test_hostile_transformers_are_refused(tmp_path, change):
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    qt.save(qt.quantize_dynamic(nn.Sequential(layer)), tmp_path / "m.qt")
    with pytest.raises(qt.InvalidFileError, match=": 0: "):
        qt.load(
            rewritten(tmp_path / "m.qt", lambda d: change(d["model"]["children"]["0"]) and None)
        )


def raw(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    size = len(header) if length is None else length
    return size.to_bytes(8, "little") + header + data


def tensor_header(**changes) -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **changes}
    meta = {"format": "qtoolkit", "version": "1", "sha256": "", "document": "{}"}
    return json.dumps({"__metadata__": meta, "t": entry}).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too short"),
        (b"abc", "too short"),
        (raw(b"{}", length=1 << 62), "cut off"),
        (raw(b"{}", length=3), "cut off"),
        (raw(b" " * (17 << 20)), "more than"),
        (raw(b"\xff\xff"), "no valid JSON"),
        (raw(b"[" * 100000), "no valid JSON"),
        (raw(b"[]"), "no object"),
        (raw(b"{}"), "not written by"),
        (raw(b'{"a": NaN}'), "no valid JSON"),
        (raw(b'{"a": 1, "a": 2}'), "appears twice"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "no valid JSON"),
        (raw(b'{"__metadata__": {"format": "qtoolkit"}}'), "its version is 'None'"),
        (raw(b'{"__metadata__": {"format": "qtoolkit", "version": "1"}}'), "metadata must be"),
        (raw(b'{"__metadata__": {"format": "qtoolkit", "version": "2"}}'), "update qtoolkit"),
        (raw(tensor_header(), b"1234"), "checksum"),
        (raw(tensor_header(), b"123"), "have 4 bytes"),
        (raw(tensor_header(), b"12345"), "have 4 bytes"),
        (raw(tensor_header(dtype="I4"), b"1234"), "unknown type"),
        (raw(tensor_header(shape=[1 << 61]), b"1234"), "does not have"),
        (raw(tensor_header(shape=[-1]), b"1234"), "no sizes"),
        (raw(tensor_header(shape=[True]), b"1234"), "no sizes"),
        (raw(tensor_header(shape=[1.0]), b"1234"), "no sizes"),
        (raw(tensor_header(data_offsets=[4, 8]), b"1234"), "overlaps"),
        (raw(tensor_header(data_offsets=[0]), b"1234"), "two offsets"),
    ],
)
def test_damaged_containers_are_refused(tmp_path, content, message):
    path = tmp_path / "m.qt"
    path.write_bytes(content)
    with pytest.raises(qt.InvalidFileError, match=message):
        qt.load(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        qt.load(tmp_path / "none.qt")
    with pytest.raises(qt.InvalidFileError, match="no regular file"):
        qt.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(qt.InvalidFileError, match="no regular file"):
        qt.load(tmp_path / "pipe")
    torch.save({"a": 1}, tmp_path / "m.pt")
    with pytest.raises(qt.InvalidFileError, match="cut off"):
        qt.load(tmp_path / "m.pt")


def test_every_flipped_byte_is_noticed(tiny, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    data = bytearray(path.read_bytes())
    for position in [*range(0, len(data), 41), len(data) - 1]:
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(qt.InvalidFileError):
            qt.load(path)
