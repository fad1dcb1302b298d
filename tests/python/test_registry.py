"""The registry: versions that nothing overwrites, and damage that is noticed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import batches, quantize
from torch import nn

import qtoolkit as qt
from qtoolkit import registry as module
from qtoolkit.registry import Registry


def make(seed: int = 0, mapping: qt.QConfigMapping | None = None) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    return quantize(model, *batches((2, 1, 4, 4), 1), mapping=mapping)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    return [make(0), make(1)]


@pytest.fixture(params=["folder", "memory"])
def registry(request, tmp_path):
    if request.param == "folder":
        return Registry(tmp_path / "models")
    pytest.importorskip("fsspec", reason="registries at URLs need it")
    return Registry(f"memory://{tmp_path.name}-{request.node.name[:20]}/models")


def same(a: nn.Module, b: nn.Module) -> bool:
    x = batches((2, 1, 4, 4), 1)[0]
    return torch.equal(a(x), b(x))


def test_push_log_tag_and_checkout(registry, models):
    first = registry.push(models[0], "net", metrics={"top1": 0.5}, message="start")
    second = registry.push(models[1], "net", metrics={"top1": 0.75}, parent=first)
    assert registry.log("net") == [second, first]
    assert second.parent == first.id
    assert (first.message, first.metrics) == ("start", {"top1": 0.5})
    registry.tag(first, "release")
    assert registry.tags("net") == {"release": first.id}
    assert same(registry.checkout("net"), models[1])
    for reference in ("net@release", f"net@{first.id}", first.id, first):
        assert same(registry.checkout(reference), models[0])
    registry.tag("net", "release")
    assert registry.tags("net") == {"release": second.id}
    assert registry.find("net@release") == second
    assert registry.names() == ["net"]
    assert registry.info(second).size == second.size
    assert registry.verify() == []
    assert Registry(registry.url).log("net") == [second, first]


def test_equal_models_are_kept_once(tmp_path, models):
    registry = Registry(tmp_path)
    a = registry.push(models[0], "a")
    b = registry.push(models[0], "b")
    assert a.blob == b.blob
    assert a.id != b.id
    assert len(list((tmp_path / "blobs").iterdir())) == 1


def test_diff_tells_metrics_size_formats_and_scales(tmp_path, models):
    registry = Registry(tmp_path)
    a = registry.push(models[0], "net", metrics={"top1": 0.5, "latency_ms": 2.0, "cpu": "x"})
    mapping = qt.get_default_qconfig_mapping().set_module_name("2", None)
    b = registry.push(make(1, mapping), "net", metrics={"top1": 0.6, "cpu": "x"})
    diff = registry.diff(a, b)
    assert diff.metrics == {"top1": (0.5, 0.6), "latency_ms": (2.0, None)}
    assert diff.sizes == (a.size, b.size)
    layers = {layer.name: layer for layer in diff.layers}
    assert layers["2"].kinds == ("Conv2d", "Conv2d")
    assert layers["2"].formats == ("uint8 x int8 -> float32", "float32")
    before, after = layers["0"].scales["weight"]
    assert before != after
    assert before == registry.info(a).layers[0].scales["weight"]
    assert "top1: 0.5 -> 0.6 (+20.00%)" in str(diff)
    assert "latency_ms: 2.0 -> none" in str(diff)
    same_version = registry.diff(a, a)
    assert (same_version.metrics, same_version.layers) == ({}, ())


def test_two_processes_that_push_lose_nothing(tmp_path, models):
    qt.save(models[0], tmp_path / "m.qt")
    code = (
        "import sys, qtoolkit as qt\n"
        "model = qt.load(sys.argv[1])\n"
        "registry = qt.registry.Registry(sys.argv[2])\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "for i in range(20):\n"
        "    v = registry.push(model, 'net', message=f'{sys.argv[3]} {i}')\n"
        "    registry.tag(v, 'latest')\n"
        "    registry.log('net')\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "m.qt"), str(tmp_path / "r")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*arguments, who], **pipes) for who in "ab"]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait(60) for process in processes] == [0, 0]
    for process in processes:
        process.stdin.close()
        process.stdout.close()
    registry = Registry(tmp_path / "r")
    messages = {version.message for version in registry.log("net")}
    assert messages == {f"{who} {i}" for who in "ab" for i in range(20)}
    assert registry.verify() == []
    assert registry.tags("net")["latest"] in {version.id for version in registry.log("net")}
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


def test_child_is_newer_than_its_parent_on_a_slow_clock(tmp_path, models, monkeypatch):
    registry = Registry(tmp_path)
    parent = registry.push(models[0], "net")

    class Clock(module.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2001, 1, 1, tzinfo=tz)

    monkeypatch.setattr(module, "datetime", Clock)
    child = registry.push(models[1], "net", parent=parent)
    assert registry.log("net")[0] == child


def test_damage_is_noticed_and_a_push_repairs_it(tmp_path, models):
    registry = Registry(tmp_path)
    version = registry.push(models[0], "net")
    blob = tmp_path / "blobs" / f"{version.blob}.qt"
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    for damaged in (bytes(data), data[:-1], data + b"x"):
        blob.write_bytes(damaged)
        with pytest.raises(qt.InvalidFileError, match=r"damaged|longer"):
            registry.checkout("net")
        assert len(registry.verify()) == 1
    blob.unlink()
    with pytest.raises(qt.InvalidFileError, match="is missing"):
        registry.checkout("net")
    registry.push(models[0], "net")
    assert registry.verify() == []

    record = tmp_path / "versions" / "net" / f"{version.id}.json"
    record.write_bytes(record.read_bytes().replace(b'"message"', b'"massage"'))
    with pytest.raises(qt.InvalidFileError, match=re.escape(f"{version.id}.json of {tmp_path} is")):
        registry.log("net")


@pytest.mark.parametrize(
    "change",
    [{"blob": "../../x"}, {"size": "1"}, {"name": "other"}, {"created": "now"}, {"schema": 2},
     {"more": 1}, {"metrics": []}],
)  # fmt: skip
def test_hostile_records_are_refused(tmp_path, models, change):
    registry = Registry(tmp_path)
    version = registry.push(models[0], "net")
    path = tmp_path / "versions" / "net" / f"{version.id}.json"
    record = {**json.loads(path.read_text()), **change}
    text = json.dumps(record).encode()
    path.unlink()
    number = module.hashlib.sha256(text).hexdigest()[:16]
    path.with_name(f"{number}.json").write_bytes(text)
    with pytest.raises(qt.InvalidFileError):
        registry.checkout("net")


def test_failed_push_adds_nothing(tmp_path, models):
    registry = Registry(tmp_path / "r")
    with pytest.raises(ValueError, match="save needs"):
        registry.push(nn.Linear(2, 2), "net")
    for name in ("../x", "", "a/b", ".hidden", "a" * 101, "0123456789abcdef", None):
        with pytest.raises(ValueError, match="is no name of a model"):
            registry.push(models[0], name)
    with pytest.raises(TypeError, match="push: metrics"):
        registry.push(models[0], "net", metrics=[1])
    with pytest.raises(LookupError, match="no version"):
        registry.push(models[0], "net", parent="0123456789abcdef")
    assert not (tmp_path / "r").exists()


def test_what_is_not_there_is_named(tmp_path, models):
    registry = Registry(tmp_path)
    version = registry.push(models[0], "net")
    with pytest.raises(LookupError, match=re.escape("no model 'other'; it has ['net']")):
        registry.checkout("other")
    with pytest.raises(LookupError, match="no net@none"):
        registry.checkout("net@none")
    with pytest.raises(ValueError, match="is no tag"):
        registry.tag(version, "a/b")
    with pytest.raises(ValueError, match="is no name"):
        registry.checkout("../net@x")
    with pytest.raises(TypeError, match="got int"):
        registry.checkout(3)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a folder"):
        Registry(tmp_path / "file")


def test_url_without_fsspec_gives_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImportError, match="pip install fsspec"):
        Registry("s3://bucket/models")


def test_file_url_is_a_folder(tmp_path, models):
    Registry(f"file://{tmp_path}").push(models[0], "net")
    assert Registry(Path(tmp_path)).names() == ["net"]
