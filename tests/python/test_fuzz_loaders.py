"""Damaged files: each loader refuses them with its own exception, and the fuzzer notices if not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from fuzzing import LOADERS, Loader, mutated_bytes, mutated_json, mutation

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fuzz_loaders

    return fuzz_loaders


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_refuse_what_they_cannot_read(name, tmp_path):
    loader = LOADERS[name]
    path = loader.make(tmp_path)
    good = path.read_bytes()
    loader.load(path)
    refused = 0
    for index in range(100):
        path.write_bytes(mutation(loader, good, f"test-{name}-{index}"))
        try:
            loader.load(path)
        except loader.refusals:
            refused += 1
    assert refused > 50


def test_mutations_differ_and_can_be_made_again():
    data = bytes(range(48, 58)) * 20
    made = [mutated_bytes(data, random.Random(index)) for index in range(200)]
    assert made == [mutated_bytes(data, random.Random(index)) for index in range(200)]
    assert sum(changed != data for changed in made) > 180
    assert {len(changed) < len(data) for changed in made} == {True, False}
    document = {"a": [1, {"b": "c"}], "d": None}
    texts = {json.dumps(mutated_json(document, random.Random(index))) for index in range(200)}
    assert len(texts) > 100
    assert document == {"a": [1, {"b": "c"}], "d": None}


def misbehave(path: Path) -> None:
    what = path.read_text()
    if what == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(77)
    elif what == "hang":
        time.sleep(60)
    elif what == "memory":
        bytearray(1 << 30)
    elif what == "wrapped memory":
        try:
            bytearray(1 << 30)
        except MemoryError as error:
            raise ValueError("refused") from error
    elif what == "exception":
        raise KeyError(what)
    elif what == "refused":
        raise ValueError(what)


@pytest.mark.parametrize(
    ("what", "verdict"),
    [
        ("crash", "crash (SIGKILL)"),
        ("exit", "crash (exit 77)"),
        ("hang", "hang"),
        ("memory", "memory"),
        ("wrapped memory", "memory"),
        ("exception", "exception"),
        ("refused", "refused"),
        ("nothing", "loaded"),
    ],
)
def test_the_fuzzer_tells_what_became_of_a_file(script, tmp_path, what, verdict):
    path = tmp_path / "file"
    path.write_text(what)
    loader = Loader(make=lambda folder: path, load=misbehave)
    assert script.check(loader, path, seconds=0.5 if what == "hang" else 20) == verdict


def test_the_script_reports(script, monkeypatch, capfd, tmp_path):
    arguments = ["fuzz_loaders.py", "--count", "5", "--loader", "registry", "--keep", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert script.main() == 0
    assert capfd.readouterr().out.startswith("registry: 5 files: ")
    bad = Loader(make=LOADERS["registry"].make, load=refuse_changes)
    monkeypatch.setitem(LOADERS, "registry", bad)
    assert script.main() == 1
    assert "registry: file 0 of seed 0: exception" in capfd.readouterr().out
    assert any(tmp_path.iterdir())


def refuse_changes(path: Path) -> None:
    if not path.stem.startswith(hashlib.sha256(path.read_bytes()).hexdigest()[:16]):
        raise KeyError
