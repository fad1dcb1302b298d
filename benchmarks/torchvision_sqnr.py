"""How close INT8 stays to FP32 on torchvision's networks, beside torch.ao.quantization (onednn).

    python benchmarks/torchvision_sqnr.py
    python benchmarks/torchvision_sqnr.py --models resnet18 mobilenet_v2 --size 128

Random weights, batch-norm statistics settled on data; both calibrate on the same images. Printed:
SQNR of the logits in dB, and whether the scripted file gives the converted model's bits. Random
networks amplify noise, so the difference counts, not the level.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import _bench
import torch

import qtoolkit as qt

import _torch_ao  # (examples/)  isort: skip
from _common import markdown_table  # isort: skip

MODELS = [
    "resnet18",
    "resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "googlenet",
    "shufflenet_v2_x1_0",
    "densenet121",
    "vgg11_bn",
]


def quantize(model: torch.nn.Module, calibration: list[torch.Tensor]) -> torch.nn.Module:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(model, mapping, example_inputs=(calibration[0],))
    qt.calibrate(prepared, calibration, progress=False)
    return qt.convert(prepared)


def scripted_is_equal(converted: torch.nn.Module, images: torch.Tensor) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.pt"
        qt.export.torchscript(converted, file, example_inputs=(images[:1],))
        return torch.equal(torch.jit.load(file)(images), converted(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--tolerance", type=float, default=0.5, help="dB below torch.ao allowed")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    known = _bench.facts()
    print(f"{args.size}x{args.size}; {_bench.describe(known)}")
    calibration = [_bench.structured_images(8, args.size, seed) for seed in range(4)]
    labelled = [(images, torch.zeros(len(images))) for images in calibration]
    images = _bench.structured_images(8, args.size, seed=1000)
    rows, results, failed = [], {}, []
    for name in args.models:
        start = time.perf_counter()
        model = _bench.settled_model(name, args.size)
        converted = quantize(model, calibration)
        peer = _torch_ao.ptq(model, labelled, len(labelled), "onednn")
        with torch.no_grad():
            reference = model(images)
            ours = _bench.sqnr_db(reference, converted(images))
            theirs = _bench.sqnr_db(reference, peer(images))
            equal = scripted_is_equal(converted, images)
        if not equal or ours < theirs - args.tolerance:
            failed.append(name)
        results[name] = {"qtoolkit_db": ours, "torch_ao_db": theirs, "scripted_equal": equal}
        rows.append(
            [
                name,
                f"{ours:.2f}",
                f"{theirs:.2f}",
                f"{ours - theirs:+.2f}",
                "yes" if equal else "NO",
            ]
        )
        print(f"  {name}: {time.perf_counter() - start:.0f} s", flush=True)
    header = ["Model", "qtoolkit dB", "torch.ao dB", "difference", "scripted = converted"]
    print(markdown_table(header, rows))
    _bench.write_json("torchvision_sqnr", {**known, "size": args.size, "models": results})
    if failed:
        sys.exit(
            f"more than {args.tolerance} dB below torch.ao, or other bits: {', '.join(failed)}"
        )


if __name__ == "__main__":
    main()
