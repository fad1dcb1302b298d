"""Latency of an INT8 classifier at 224x224 beside FP32 and other INT8 runtimes, interleaved.

    python benchmarks/resnet_latency.py --batch 1 --threads 1
    python benchmarks/resnet_latency.py --model resnet50 --rounds 30

All run the same random weights on the same images and take turns in every round. ONNX Runtime and
OpenVINO take part where they are installed (pip install onnx onnxscript onnxruntime openvino nncf).
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

Run = Callable[[], object]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="any torchvision classifier")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    return parser.parse_args()


args = parse_arguments()
# Before any library starts its threads.
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(args.threads)

import _bench  # noqa: E402
import _torch_ao  # noqa: E402  (examples/)
import torch  # noqa: E402
from _common import markdown_table, time_interleaved  # noqa: E402

import qtoolkit as qt  # noqa: E402

CALIBRATION = [_bench.structured_images(4, args.size, seed) for seed in range(4)]
LABELLED = [(images, torch.zeros(len(images))) for images in CALIBRATION]


def torch_run(model: Callable, images: torch.Tensor) -> Run:
    def run() -> torch.Tensor:
        with torch.inference_mode():
            return model(images)

    return run


def qtoolkit_runs(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Run]:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(model, mapping, example_inputs=(images,))
    qt.calibrate(prepared, CALIBRATION, progress=False)
    converted = qt.convert(prepared)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        qt.export.torchscript(converted, file, example_inputs=(images,))
        scripted = torch.jit.load(file)
    return {
        "qtoolkit, scripted": torch_run(scripted, images),
        "qtoolkit, eager": torch_run(converted, images),
    }


def torch_ao_run(model: torch.nn.Module, images: torch.Tensor, engine: str) -> Run:
    scripted = _torch_ao.ptq(model, LABELLED, len(LABELLED), engine)

    def run() -> torch.Tensor:
        torch.backends.quantized.engine = engine
        with torch.inference_mode():
            return scripted(images)

    return run


def onnxruntime_run(model: torch.nn.Module, images: torch.Tensor) -> Run:
    import onnxruntime
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(CALIBRATION)

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch[: len(images)].numpy()}

    with tempfile.TemporaryDirectory() as folder:
        float_file, clean_file, file = (f"{folder}/{n}.onnx" for n in ("float", "clean", "int8"))
        torch.onnx.export(
            model, (images,), float_file, input_names=["x"], dynamo=True, external_data=False
        )
        quant_pre_process(float_file, clean_file)
        quantize_static(
            clean_file,
            file,
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = args.threads, 1
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    array = images.numpy()
    return lambda: session.run(None, {"x": array})[0]


def openvino_run(model: torch.nn.Module, images: torch.Tensor) -> Run:
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=images, input=[list(images.shape)])
    dataset = nncf.Dataset([batch[: len(images)].numpy() for batch in CALIBRATION])
    quantized = nncf.quantize(converted, dataset, subset_size=len(CALIBRATION))
    settings = {
        "INFERENCE_NUM_THREADS": args.threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()
    array = images.numpy()
    return lambda: request.infer({0: array})[0]


def all_runs(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Run]:
    nhwc = copy.deepcopy(model).to(memory_format=torch.channels_last)
    runs = {
        "PyTorch FP32, eager": torch_run(model, images),
        "PyTorch FP32, channels_last": torch_run(
            nhwc, images.to(memory_format=torch.channels_last)
        ),
        **qtoolkit_runs(model, images),
    }
    peers: dict[str, Callable[[], Run]] = {
        f"torch.ao INT8, {engine}": lambda engine=engine: torch_ao_run(model, images, engine)
        for engine in ("fbgemm", "x86", "onednn")
    }
    peers["ONNX Runtime INT8"] = lambda: onnxruntime_run(model, images)
    peers["OpenVINO INT8"] = lambda: openvino_run(model, images)
    for name, make in peers.items():
        try:
            runs[name] = make()
            runs[name]()
        except Exception as error:  # a peer that is absent or broken is named, not fatal
            runs.pop(name, None)
            print(f"left out: {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    return runs


def main() -> None:
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    model = _bench.settled_model(args.model, args.size)
    images = _bench.structured_images(args.batch, args.size, seed=1000)
    known = _bench.facts()
    print(f"{args.model}, batch {args.batch}, {args.size}x{args.size}; {_bench.describe(known)}")

    runs = all_runs(model, images)
    reference = torch.as_tensor(runs["PyTorch FP32, eager"]())
    sqnr = {n: _bench.sqnr_db(reference, torch.as_tensor(run())) for n, run in runs.items()}
    samples = time_interleaved(runs, args.rounds, seconds=0.1)
    best = {name: min(values) for name, values in samples.items()}
    median = {name: statistics.median(values) for name, values in samples.items()}

    fp32, fbgemm = best["PyTorch FP32, eager"], best.get("torch.ao INT8, fbgemm")
    header = ["Model", "min ms", "median ms", "x FP32 eager", "x torch.ao fbgemm", "SQNR dB"]
    rows = [
        [
            name,
            f"{best[name]:.2f}",
            f"{median[name]:.2f}",
            f"{fp32 / best[name]:.2f}",
            f"{fbgemm / best[name]:.2f}" if fbgemm else "-",
            "-" if "FP32" in name else f"{sqnr[name]:.1f}",
        ]
        for name in runs
    ]
    print(markdown_table(header, rows))
    _bench.write_json(
        f"latency_{args.model}_batch{args.batch}_threads{args.threads}",
        {
            **known,
            "model": args.model,
            "batch": args.batch,
            "size": args.size,
            "rounds": args.rounds,
            "min_ms": best,
            "median_ms": median,
            "sqnr_db": {n: v for n, v in sqnr.items() if "FP32" not in n},
        },
    )


if __name__ == "__main__":
    main()
