"""Latency of exported files beside those that the runtimes' own quantizers make.

    python benchmarks/export_latency.py
    python benchmarks/export_latency.py --models resnet18,mobilenet_v2 --threads 1,2

All files come from one float model with random weights, are calibrated on the same images, and run
in turns in one process, batch 1. The runtimes' own are, as their documents recommend: ONNX
Runtime's ``quantize_static`` in QDQ form with one scale a channel, after ``quant_pre_process`` (its
activations are uint8, as its default, int8, leaves half of the convolutions in float on x86), and
``nncf.quantize`` for OpenVINO. NNCF's range of the input is symmetric, which saves OpenVINO the
zero point in the first convolution, and so it is here.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import describe, facts, settled_model, structured_images, write_json

from _common import markdown_table  # (examples/)  isort: skip
from torch import Tensor, nn

import qtoolkit as qt

SIZE = 224
#: The file may take so much of the time of the runtime's own.
ALLOWED = 1.05

Run = Callable[[], Any]


def _converted(model: nn.Module, images: Tensor, target: str) -> nn.Module:
    preset = qt.export.targets()[target].preset
    mapping = qt.get_default_qconfig_mapping(preset)
    if target == "openvino":
        symmetric = qt.TensorSpec("uint8", symmetric=True, observer="histogram")
        mapping = mapping.set_module_type("input", qt.QConfig(symmetric, None))
    prepared = qt.prepare(model, mapping, (images,))
    return qt.convert(qt.calibrate(prepared, [(images,)], progress=False))


def onnxruntime_files(model: nn.Module, images: Tensor, folder: Path) -> tuple[Any, Any]:
    """Our file and that of ONNX Runtime's quantizer."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    ours, plain, clean, theirs = (folder / f"{k}.onnx" for k in ("ours", "plain", "clean", "own"))
    qt.export.onnx(_converted(model, images, "onnx"), ours, (images[:1],))
    torch.onnx.export(
        model, (images[:1],), plain, input_names=["x"], dynamo=True, verbose=False,
        external_data=False,
    )  # fmt: skip
    quant_pre_process(plain, clean)

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter({"x": image[None].numpy()} for image in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.batches, None)

    quantization.quantize_static(
        clean,
        theirs,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
    )
    return ours, theirs


def onnxruntime_run(file: Any, threads: int, x: np.ndarray) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x})


def openvino_files(model: nn.Module, images: Tensor, folder: Path) -> tuple[Any, Any]:
    """Our file and the model that NNCF quantizes."""
    import nncf
    import openvino as ov

    path = folder / "ours.xml"
    qt.export.openvino(_converted(model, images, "openvino"), path, (images[:1],))
    translated = ov.convert_model(model, example_input=images[:1], input=[[1, 3, SIZE, SIZE]])
    batches = [image[None].numpy() for image in images]
    own = nncf.quantize(translated, nncf.Dataset(batches), subset_size=len(batches))
    return ov.Core().read_model(path), own


def openvino_run(file: Any, threads: int, x: np.ndarray) -> Run:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
    }
    file.reshape(list(x.shape))
    request = ov.Core().compile_model(file, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: x}, share_inputs=True, share_outputs=True)


RUNTIMES: dict[str, tuple[Callable[..., tuple[Any, Any]], Callable[..., Run]]] = {
    "onnxruntime": (onnxruntime_files, onnxruntime_run),
    "openvino": (openvino_files, openvino_run),
}


def time_in_turns(runs: list[Run], seconds: float) -> list[list[float]]:
    """Milliseconds of each run, in turns, without the first ten."""
    times: list[list[float]] = [[] for _ in runs]
    rounds, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run, found in zip(runs, times):
            start = time.perf_counter()
            run()
            if rounds >= 10:
                found.append((time.perf_counter() - start) * 1e3)
        rounds += 1
    return times


def measure(name: str, runtime: str, threads: list[int], seconds: float) -> list[dict[str, Any]]:
    model, images = settled_model(name, SIZE), structured_images(8, SIZE, 0)
    make, load = RUNTIMES[runtime]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = make(model, images, Path(folder))
        for count in threads:
            x = images[:1].numpy()
            times = time_in_turns([load(file, count, x) for file in files], seconds)
            minima = [min(found) for found in times]
            medians = [statistics.median(found) for found in times]
            row = {
                "model": name,
                "runtime": runtime,
                "batch": 1,
                "threads": count,
                "rounds": len(times[0]),
                "min_ms": {"qtoolkit": minima[0], "own quantizer": minima[1]},
                "median_ms": {"qtoolkit": medians[0], "own quantizer": medians[1]},
                "ratio": {"min": minima[0] / minima[1], "median": medians[0] / medians[1]},
            }
            good = max(row["ratio"].values()) <= ALLOWED
            print(
                f"{name} in {runtime}, threads {count}: {minima[0]:.2f} ms, its own quantizer's "
                f"{minima[1]:.2f} ms; ratio of minima {row['ratio']['min']:.3f}, of medians "
                f"{row['ratio']['median']:.3f}  {'ok' if good else 'NOT OK'}",
                flush=True,
            )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="resnet18")
    parser.add_argument("--runtimes", default=",".join(RUNTIMES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=15, help="of each pair of files")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    known = facts()
    known.pop("threads")
    print(describe({**known, "threads": args.threads}))
    threads = [int(count) for count in args.threads.split(",")]
    rows = [
        row
        for name in args.models.split(",")
        for runtime in args.runtimes.split(",")
        for row in measure(name, runtime, threads, args.seconds)
    ]
    table = markdown_table(
        ["", "qtoolkit ms", "own quantizer's ms", "ratio (least)", "ratio (median)"],
        [
            [
                f"{row['model']} in {row['runtime']}, {row['threads']} threads",
                *(f"{row['min_ms'][name]:.2f}" for name in ("qtoolkit", "own quantizer")),
                *(f"{row['ratio'][name]:.3f}" for name in ("min", "median")),
            ]
            for row in rows
        ],
    )
    result = {
        "title": "Exported files beside those of the runtimes' own quantizers",
        "command": "python benchmarks/export_latency.py",
        "table": table,
        "notes": [f"Batch 1, {SIZE}x{SIZE}, random weights; least and median of runs in turns.\n"],
        "facts": describe({**known, "threads": args.threads}),
    }
    write_json("export_latency", {**result, **known, "size": SIZE, "rows": rows})


if __name__ == "__main__":
    main()
