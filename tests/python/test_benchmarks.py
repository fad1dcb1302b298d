"""benchmarks/models.py without its peers: arguments, counts, tables, picture, documents."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _paths(monkeypatch):
    for folder in ("benchmarks", "examples", "scripts"):
        monkeypatch.syspath_prepend(str(ROOT / folder))


def result(model="resnet18", isa="avx512vnni", **changes):
    times = {
        "PyTorch FP32": 40.0,
        "PyTorch FP32 channels_last": 30.0,
        "qtoolkit eager": 7.0,
        "qtoolkit scripted": 6.0,
        "torch.ao fbgemm": 9.0,
        "torch.ao x86": 8.0,
        "OpenVINO": 5.0,
    }
    return {
        "cpu": "Some CPU",
        "threads": 1,
        "versions": {"torch": "2.15.0"},
        "isa": isa,
        "model": model,
        "batch": 1,
        "macs": 1_500_000_000,
        "peak_macs_per_second": {"avx512vnni": 500e9},
        "shares_of_peak": {"avx512vnni": {name: 3.0 / value for name, value in times.items()}},
        "min_ms": times,
        "median_ms": {name: 1.5 * value for name, value in times.items()},
        "sqnr_db": {"qtoolkit scripted": 21.5},
        "ran": dict.fromkeys(times, "kernel"),
        "left_out": {"onnxruntime": "ModuleNotFoundError: none"},
    } | changes


def cells(table, row):
    line = next(line for line in table.splitlines() if line.startswith(f"| {row} "))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_arguments_are_lists():
    import models

    args = models.parse_arguments(
        ["--models=resnet18,vgg11_bn", "--batch=1,32", "--threads=2", "--peers=torch,openvino"]
    )
    assert args.models == ["resnet18", "vgg11_bn"]
    assert (args.batch, args.threads) == ([1, 32], [2])
    assert args.peers == ["torch", "openvino"]
    assert args.isa == "avx512vnni"


def test_wrong_arguments_are_named():
    import models

    with pytest.raises(argparse.ArgumentTypeError, match="tvm: none of torch, torchao"):
        models.peer_names("torch,tvm")
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 on"):
        models.numbers("1,0")


def test_multiply_adds_are_counted():
    import models

    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(6, 5))
    assert models.multiply_adds(model, torch.zeros(2, 4, 3, 3)) == 2 * (6 * 2 * 9 + 6 * 5)


def test_speeds_are_those_of_rounds():
    import models

    assert models.by_rounds([9.0, 1.0, 3.0, 5.0, 7.0], rounds=2) == [2.0, 6.0]


def test_runs_take_turns():
    import models

    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    samples = models.take_turns(runs, rounds=3, seconds=1e-9)
    assert order == ["a", "b"] * 4  # one call each to see how long it takes
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3}


def test_table_of_one_configuration():
    import _models_report as report

    table = report.table(result())
    assert cells(table, "qtoolkit scripted") == ["6.00", "9.00", "1.000", "0.500", "21.5", "kernel"]
    assert cells(table, "OpenVINO") == ["5.00", "7.50", "1.200", "0.600", "-", "kernel"]
    assert "left out: onnxruntime: ModuleNotFoundError: none" in table


def test_layers_are_timed_and_counted():
    import _layers
    import _models_report as report

    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    first, second = _layers.of_modules(model, torch.zeros(1, 3, 2, 2), runs=2)
    assert (first.name, first.kind, first.macs) == ("0", "Conv2d", 4 * 4 * 3)
    assert (second.name, second.macs) == ("1", 0)
    assert not model[0]._forward_hooks
    layers = {"plan": [{"name": "fc", "kind": "linear", "macs": 10**9, "ms": 4.0}]}
    table = report.layer_table(result(layers=layers), "plan")
    assert cells(table, "fc") == ["linear", "4.0000", "1.000", "1000.00", "0.500"]


def test_ratios_are_of_the_plan_where_there_is_one():
    import _models_report as report

    times = result()["min_ms"] | {"qtoolkit plan": 4.0}
    more = {name: dict.fromkeys(times, "kernel") for name in ("ran", "median_ms")}
    assert report.ours(result(min_ms=times, ran=more["ran"])) == "qtoolkit plan"


def test_summary_compares_with_the_fastest_of_each_peer():
    import _models_report as report

    summary = report.summary([result("mobilenet_v2"), result()])
    assert summary.index("resnet18") < summary.index("mobilenet_v2")
    row = cells(summary, "resnet18, batch 1, 1 threads")
    assert row == ["6.00", "0.500", "0.200", "0.750", "-", "-", "1.200"]


def test_what_was_not_held_is_left_out_of_ratios():
    import _models_report as report

    ran = result()["ran"] | {"OpenVINO": "not held"}
    row = cells(report.summary([result(ran=ran)]), "resnet18, batch 1, 1 threads")
    assert row[-1] == "-"


def test_picture_is_an_svg_with_a_bar_for_each_runtime():
    import _models_report as report

    root = ElementTree.fromstring(report.picture([result(), result("resnet50")], "Title & more"))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "Title & more" in texts
    assert texts.count("0.50") == 2  # qtoolkit's share
    assert texts.count("0.60") == 2  # OpenVINO's


def test_benchmarks_page_has_a_part_for_each_instruction_set():
    import update_benchmarks

    other = {"title": "Other", "command": "c", "table": "| t |", "facts": "f"}
    files = {"models_a.json": result(), "models_b.json": result(isa="native"), "z.json": other}
    text, pictures = update_benchmarks.document(files)
    assert sorted(pictures) == ["models_avx512vnni.svg", "models_native.svg"]
    assert "### Held to AVX512-VNNI" in text
    assert "### With all that the CPU has" in text
    assert "## Other" in text


def test_onednn_implementations_are_counted():
    pytest.importorskip("torch.ao.quantization")
    import _peers

    start = "onednn_verbose,v1,primitive,"
    verbose = (
        f"{start}exec,cpu,convolution,brg_conv_fwd:avx512_core_vnni,forward_training,src:u8,1\n"
        f"{start}exec,cpu,reorder,jit:uni,undef,src:f32,1\n"
        f"{start}create:cache_hit,cpu,convolution,other,forward_training,src:u8,1\n"
        f"{start}exec,cpu,matmul,brg_matmul:avx2,undef,src:u8,1\n"
    )
    counts = _peers.count_implementations(verbose)
    assert counts == {"brg_conv_fwd:avx512_core_vnni": 1, "brg_matmul:avx2": 1}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
def test_amx_can_be_refused_to_a_process():
    code = (
        "import json, ctypes, _machine\n"
        "_machine.refuse_amx()\n"
        "status = ctypes.CDLL(None).syscall(158, 0x1023, 18)\n"
        "print(json.dumps([status, _machine.amx_granted()]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "benchmarks",
        capture_output=True,
        text=True,
        check=False,
    )
    if "allows no seccomp filter" in run.stderr:
        pytest.skip("this system allows no seccomp filter")
    assert json.loads(run.stdout) == [-1, False]
