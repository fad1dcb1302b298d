"""qt.save and qt.load: the same bits, no code, nothing trusted."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import os
import pickle
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from low_bit import MAPPINGS
from networks import Kinds, ResNet, batches, settle, sqnr
from torch import nn
from torch.nn import functional

import qtoolkit as qt
from qtoolkit.nn.base import SAVED
from qtoolkit.saving import allowed, container, layers
from qtoolkit.saving import file as saving_file

DATA = Path(__file__).parent / "data"


def convert(model: nn.Module, *inputs: torch.Tensor, mapping=None) -> nn.Module:
    prepared = qt.prepare(model.eval(), mapping, inputs)
    with torch.no_grad():
        prepared(*inputs)
    return qt.convert(prepared)


@pytest.fixture(scope="module")
def mixed() -> nn.Module:
    return convert(settle(Kinds(), (2, 3, 16, 16)), *batches((2, 3, 16, 16), 1))


@pytest.fixture(scope="module")
def tiny() -> nn.Module:
    model = settle(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()), (2, 1, 4, 4))
    return convert(model, *batches((2, 1, 4, 4), 1))


def saved_and_loaded(model: nn.Module, folder: Path) -> nn.Module:
    qt.save(model, folder / "m.qt")
    return qt.load(folder / "m.qt")


def test_loaded_model_has_the_bits_and_serves_every_step(mixed, tmp_path):
    x, y = batches((3, 3, 16, 16), 2, seed=5)
    loaded = saved_and_loaded(mixed, tmp_path)
    assert torch.equal(loaded(x), mixed(x))
    assert torch.equal(torch.jit.script(loaded)(x), mixed(x))
    assert torch.equal(qt.compile(loaded, x)(y), mixed(y))
    assert torch.equal(copy.deepcopy(loaded)(x), mixed(x))
    assert torch.equal(pickle.loads(pickle.dumps(loaded))(x), mixed(x))
    assert qt.explain(loaded) == qt.explain(mixed)
    assert qt.model_size(loaded) == qt.model_size(mixed)
    model = settle(Kinds(), (2, 3, 16, 16))
    assert str(qt.compare(model, loaded, [x])) == str(qt.compare(model, mixed, [x]))
    report = qt.export.torchscript(loaded, tmp_path / "m.pt", x)
    assert report.verified
    state, expected = loaded.state_dict(), mixed.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in state)
    assert not any(module.training for module in loaded.modules())


def test_same_model_gives_the_same_bytes_also_after_loading(mixed, tmp_path):
    loaded = saved_and_loaded(mixed, tmp_path)
    qt.save(loaded, tmp_path / "again.qt")
    assert (tmp_path / "again.qt").read_bytes() == (tmp_path / "m.qt").read_bytes()


def test_fresh_process_gives_the_same_bits(tiny, tmp_path):
    x = batches((2, 1, 4, 4), 1)[0]
    qt.save(tiny, tmp_path / "m.qt")
    torch.save((x, tiny(x)), tmp_path / "io.pt")
    code = (
        "import sys, torch, qtoolkit as qt\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(qt.load(sys.argv[1])(x), y)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "m.qt", tmp_path / "io.pt"], check=True)


def test_compiled_model_is_kept_with_its_plans(mixed, tmp_path):
    x = batches((2, 3, 16, 16), 1)[0]
    compiled = qt.compile(mixed, x)
    loaded = saved_and_loaded(compiled, tmp_path)
    states = [model.get_submodule("plan_0").plan.state() for model in (compiled, loaded)]
    assert (states[0][0], states[0][2]) == (states[1][0], states[1][2])
    assert states[0][2][1], "its tuning is kept"
    assert torch.equal(loaded(x), mixed(x))
    assert torch.equal(torch.jit.script(loaded)(x), mixed(x))
    assert str(loaded.plan) == str(compiled.plan)
    assert qt.explain(loaded) == qt.explain(compiled)
    with pytest.raises(ValueError, match="compiled already"):
        qt.compile(loaded, x)


class Attention(nn.Module):
    """Float parts of several kinds between quantized layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_buffer("shift", torch.randn(8), persistent=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 4, 2, batch_first=True, bidirectional=True)
        self.shared = nn.Bilinear(8, 8, 8)
        self.head = nn.ModuleDict({"a-b": nn.Linear(8, 3), "c": nn.Linear(8, 2)})

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0] + self.shift
        x = self.lstm(x)[0].masked_fill(x > 3.0, float("-inf")).clamp(min=-1e30)
        x = self.shared(x, x) + self.shared(x, self.shift.expand_as(x))
        x = functional.normalize(x[:, 0, ...], dim=-1).to(torch.float32)
        return {"a": self.head["a-b"](x), "c": (self.head["c"](x), x.size(0))}


def test_float_parts_constants_and_structured_outputs_are_kept(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 6)
    model = convert(Attention(), x)
    loaded = saved_and_loaded(model, tmp_path)
    expected, actual = model(x), loaded(x)
    assert expected.keys() == actual.keys()
    assert torch.equal(expected["a"], actual["a"])
    assert torch.equal(expected["c"][0], actual["c"][0])
    assert expected["c"][1] == actual["c"][1] == 2
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert not any(p.requires_grad for p in loaded.parameters())


def test_layers_that_share_a_weight_still_do(tmp_path):
    layer = nn.Conv2d(2, 2, 3, padding=1)
    x = batches((1, 2, 6, 6), 1)[0]
    for model in (nn.Sequential(layer, nn.ReLU(), layer), nn.Sequential(nn.ELU(), layer, layer)):
        none = qt.QConfigMapping()
        for mapping in (None, none):
            quantized = convert(model, x, mapping=mapping)
            loaded = saved_and_loaded(quantized, tmp_path)
            assert torch.equal(loaded(x), quantized(x))
            assert list(loaded.state_dict()) == list(quantized.state_dict())
            assert qt.model_size(loaded) == qt.model_size(quantized)


def test_dynamically_quantized_model_of_torch_modules(tmp_path):
    x = torch.randn(4, 16)
    tied = nn.Linear(16, 16)
    model = nn.Sequential(tied, nn.GELU(), nn.LayerNorm(16), nn.Sequential(tied), nn.Linear(16, 3))
    quantized = qt.quantize_dynamic(model)
    loaded = saved_and_loaded(quantized, tmp_path)
    assert torch.equal(loaded(x), quantized(x))
    assert loaded[0].weight is loaded[3][0].weight
    assert qt.explain(loaded) == qt.explain(quantized)


def test_qat_model_with_a_float_batch_norm(tmp_path):
    mapping = qt.get_default_qat_qconfig_mapping().set_module_name("0", None)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = batches((2, 1, 8, 8), 1)[0]
    prepared = qt.prepare_qat(model, mapping, x)
    prepared(x)
    quantized = qt.convert(prepared.eval())
    loaded = saved_and_loaded(quantized, tmp_path)
    assert torch.equal(loaded(x), quantized(x))


class Uncaptured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.inner = Uncaptured()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.first(x))


def rejected_models():
    x = torch.randn(2, 4)
    yield nn.Linear(4, 4), "save needs the result of qt.convert"
    yield qt.prepare(nn.Linear(4, 4), None, (x,)), "save needs the result of qt.convert"
    yield convert(Outer(), x), r"cannot save inner \(test_save.Uncaptured\)"
    hooked = convert(nn.Sequential(nn.Linear(4, 4)), x)
    hooked.get_submodule("0").register_forward_hook(lambda *_: None)
    yield hooked, r"cannot save 0 \(qtoolkit.nn.linear.Linear\).*forward hooks"
    dynamic = qt.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), Uncaptured()))
    yield dynamic, "cannot save 1 "
    simulated = qt.prepare_qat(nn.Linear(4, 4), MAPPINGS["fp8"], (x,))
    simulated(x)
    yield qt.convert(simulated.eval()), "simulates formats"


def test_what_a_file_cannot_hold_is_named_and_nothing_is_written(tmp_path):
    for model, message in rejected_models():
        with pytest.raises(ValueError, match=message):
            qt.save(model, tmp_path / "m.qt")
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(TypeError, match="save needs"):
        qt.save("model", tmp_path / "m.qt")


def test_info_and_recipe(mixed, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(mixed, path, metrics={"top1": 0.5, "cpu": "any"})
    info = qt.file_info(path)
    assert info.metrics == {"top1": 0.5, "cpu": "any"}
    assert info.version == 1
    assert info.qtoolkit == qt.__version__
    assert info.size == path.stat().st_size
    noted = qt.QConfigMapping.from_dict(info.recipe)
    assert noted == qt.get_default_qconfig_mapping("x86")
    assert [layer.name for layer in info.layers] == [r.name for r in qt.explain(mixed).layers]
    stem = next(layer for layer in info.layers if layer.name == "stem")
    scale = float(mixed.stem.output_scale)
    zero_point = int(mixed.stem.output_zero_point)
    assert stem.scales["output"] == (scale, scale)
    assert stem.ranges["output"] == (-zero_point * scale, (255 - zero_point) * scale)
    assert stem.scales["weight"][0] == float(mixed.stem.weight_scale.min())

    given = qt.get_default_qconfig_mapping("tflite")
    qt.save(qt.load(path), path, recipe=given)
    assert qt.QConfigMapping.from_dict(qt.file_info(path).recipe) == given


@pytest.mark.parametrize(
    ("metrics", "error"),
    [({"a": float("nan")}, ValueError), ({"a": object()}, TypeError), ([1], TypeError),
     ({1: 2}, TypeError)],
)  # fmt: skip
def test_metrics_are_numbers_and_texts(tiny, tmp_path, metrics, error):
    with pytest.raises(error, match="metric"):
        qt.save(tiny, tmp_path / "m.qt", metrics=metrics)


def test_failed_write_leaves_the_old_file(tiny, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    old = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*m\.qt: .*too large"):
            qt.save(tiny, path, metrics={"a": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["m.qt"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        qt.save(tiny, tmp_path / "none" / "m.qt")


def test_file_is_a_safetensors_file(mixed, tmp_path):
    safetensors = pytest.importorskip("safetensors", reason="checks the format independently")
    qt.save(mixed, tmp_path / "m.qt")
    with safetensors.safe_open(tmp_path / "m.qt", framework="pt") as file:
        assert torch.equal(file.get_tensor("stem.weight"), mixed.stem.weight)
        assert file.metadata()["format"] == "qtoolkit"


def test_channels_last_stays(tmp_path):
    layer = nn.Conv3d(2, 2, 3).eval()
    images = nn.Conv2d(8, 8, 3, padding_mode="reflect").eval().to(memory_format=torch.channels_last)
    x = batches((1, 8, 5, 5), 1)[0]
    quantized = convert(nn.Sequential(images, nn.Flatten()), x, mapping=qt.QConfigMapping())
    loaded = saved_and_loaded(quantized, tmp_path)
    assert layer.weight.is_contiguous()
    assert loaded.get_submodule("0").weight.stride() == quantized.get_submodule("0").weight.stride()
    assert torch.equal(loaded(x), quantized(x))


# --- versions


def test_version_1_file_loads():
    """The file was written when version 1 was new, and must load for ever."""
    model = qt.load(DATA / "version1.qt")
    x = torch.linspace(-2, 2, 16).reshape(1, 1, 4, 4)
    expected = json.loads((DATA / "version1.json").read_text())
    assert model(x).tolist() == expected


def test_newer_version_reads_older_files_through_migrations(tiny, tmp_path, monkeypatch):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    monkeypatch.setattr(container, "VERSION", 2)
    with pytest.raises(qt.InvalidFileError, match="version 1 is unknown"):
        qt.load(path)

    def migrate(document):
        return {**document, "metrics": {"from": 1}}

    monkeypatch.setitem(saving_file._MIGRATIONS, 1, migrate)
    assert qt.file_info(path).metrics == {"from": 1}
    x = batches((2, 1, 4, 4), 1)[0]
    assert torch.equal(qt.load(path)(x), tiny(x))
    qt.save(tiny, path)
    monkeypatch.setattr(container, "VERSION", 1)
    with pytest.raises(qt.InvalidFileError, match="update qtoolkit"):
        qt.load(path)


# --- what is in a file is not trusted


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


# --- the lists of what files may hold


def test_every_quantized_module_can_be_saved():
    classes = [
        value
        for value in vars(qt.nn).values()
        if isinstance(value, type) and issubclass(value, qt.nn.QuantizedModule)
    ]
    missing = [cls.__name__ for cls in classes if SAVED.get(cls.__name__, (None,))[0] is not cls]
    assert missing == ["QuantizedModule"]


ARGUMENTS = {
    "AdaptiveAvgPool1d": [2], "AdaptiveAvgPool2d": [(2, None)], "AdaptiveAvgPool3d": [2],
    "AdaptiveMaxPool1d": [2], "AdaptiveMaxPool2d": [2, True], "AdaptiveMaxPool3d": [2],
    "AvgPool1d": [2], "AvgPool2d": [2, 1, 1, True, False, 3], "AvgPool3d": [2],
    "BatchNorm1d": [3], "BatchNorm2d": [3, 1e-3, None, False], "BatchNorm3d": [3],
    "Bilinear": [2, 3, 4], "ChannelShuffle": [2], "CircularPad1d": [1], "CircularPad2d": [1],
    "CircularPad3d": [1], "ConstantPad1d": [1, 2.0], "ConstantPad2d": [1, 2.0],
    "ConstantPad3d": [1, 2.0], "Conv1d": [2, 4, 3], "Conv2d": [2, 4, (3, 1), 2, "valid", 1, 2],
    "Conv3d": [2, 4, 3], "ConvTranspose1d": [2, 4, 3],
    "ConvTranspose2d": [2, 4, 3, 2, 1, 1, 2, False], "ConvTranspose3d": [2, 4, 3],
    "Embedding": [5, 3, 1], "EmbeddingBag": [5, 3], "Fold": [4, 2], "GRU": [3, 2, 2],
    "GroupNorm": [2, 4], "Hardtanh": [-2.0, 3.0], "InstanceNorm1d": [3],
    "InstanceNorm2d": [3, 1e-4, 0.2, True, True], "InstanceNorm3d": [3],
    "LayerNorm": [[3, 2], 1e-3, True, False], "LPPool1d": [2, 3], "LPPool2d": [2, 3],
    "LSTM": [3, 2, 2, True, True, 0.1, True, 1], "Linear": [3, 2, False],
    "LocalResponseNorm": [2], "MaxPool1d": [2], "MaxPool2d": [2, 1, 1, 1, True, True],
    "MaxPool3d": [2], "MultiheadAttention": [4, 2, 0.1, True, True, True, 3, 2, True],
    "NonDynamicallyQuantizableLinear": [3, 2], "PReLU": [3, 0.1], "PixelShuffle": [2],
    "PixelUnshuffle": [2], "RMSNorm": [3], "RNN": [3, 2, 1, "relu"], "ReflectionPad1d": [1],
    "ReflectionPad2d": [1], "ReflectionPad3d": [1], "ReplicationPad1d": [1],
    "ReplicationPad2d": [(1, 2, 0, 1)], "ReplicationPad3d": [1], "Threshold": [0.1, 2.0],
    "Unflatten": [1, (2, 2)], "Unfold": [2], "Upsample": [None, 2.0, "bilinear", True],
    "UpsamplingBilinear2d": [None, 2], "UpsamplingNearest2d": [4], "ZeroPad1d": [1],
    "ZeroPad2d": [1], "ZeroPad3d": [1],
}  # fmt: skip
OWN_ARGUMENTS = {
    "Cat": [1], "GlobalAvgPool2d": [True], "Mean": [[1], False], "Pad": ["reflect"],
    "StochasticDepth": [0.1, "row"], "Sum": [[1], False],
    "UpsampleBilinear2d": ["bilinear", [2.0, 2.0], True],
    "UpsampleNearest2d": ["nearest", None], "WithNumber": ["sub", 3.0],
}  # fmt: skip


@pytest.mark.parametrize("name", allowed.LAYERS)
def test_float_layers_are_made_again_from_their_options(name):
    leaf = name.rpartition(".")[2]
    table = OWN_ARGUMENTS if name.startswith("qtoolkit.nn.functional") else ARGUMENTS
    layer = allowed.LAYERS[name](*table.get(leaf, [])).eval()
    options = json.loads(json.dumps(layers.float_options(layer)))
    count = len(list(layer.parameters()))
    again = layers.make_float(allowed.LAYERS[name], options, count)
    assert repr(again) == repr(layer)
    assert layers.float_options(again) == layers.float_options(layer)
    shapes = {key: value.shape for key, value in layer.state_dict().items()}
    assert {key: value.shape for key, value in again.state_dict().items()} == shapes


def test_names_and_functions_are_each_others_reverse():
    for name, function in allowed._FUNCTIONS.items():
        found = allowed.name_of(function)
        assert found is not None
        assert allowed.function_of(found) is function, name
    assert allowed.function_of("os.system") is None


def test_accuracy_does_not_change(tmp_path):
    model = settle(ResNet(), (4, 1, 8, 8))
    x = batches((4, 1, 8, 8), 1)[0]
    quantized = convert(model, x)
    loaded = saved_and_loaded(quantized, tmp_path)
    assert sqnr(model(x), loaded(x)) == sqnr(model(x), quantized(x)) > 10


def test_checksum_is_that_of_the_documentation(tiny, tmp_path):
    path = tmp_path / "m.qt"
    qt.save(tiny, path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    meta = header.pop("__metadata__")
    digest = hashlib.sha256()
    table = json.dumps(header, sort_keys=True, separators=(",", ":"))
    for part in (b"1", meta["document"].encode(), table.encode(), data[8 + length :]):
        digest.update(len(part).to_bytes(8, "little") + part)
    assert digest.hexdigest() == meta["sha256"] == qt.file_info(path).sha256
