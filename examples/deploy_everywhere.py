"""One trained network to every runtime: size, accuracy, latency and agreement, in one table.

ResNet-18 and MobileNetV2 are trained for a few epochs on scikit-learn's handwritten digits
(enlarged to 64x64), quantized after training, and exported to all targets whose packages are
installed. Each file is verified while it is written, then evaluated on the test images, one by one,
in the runtime it is for.

    python examples/deploy_everywhere.py
    python examples/deploy_everywhere.py --models resnet18 --targets onnx,openvino
    python examples/deploy_everywhere.py --data ~/images --weights resnet18=~/resnet18.pt
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _common import (
    Data,
    cpu_name,
    digits,
    image_folder,
    load_weights,
    make_model,
    markdown_table,
    medians,
    time_interleaved,
    train,
)
from torch import nn

import qtoolkit as qt

CALIBRATION_BATCHES = 10


@dataclass
class Row:
    """One file, or the model in PyTorch.

    Attributes:
        agreement: share of test images on which its class is that of the converted model.
    """

    model: str
    target: str
    megabytes: float
    top1: float
    agreement: float
    batch1_ms: float
    note: str = ""


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")
    args.output.mkdir(parents=True, exist_ok=True)
    data = image_folder(args.data, args.seed) if args.data else digits(args.seed)
    known = qt.export.targets()
    unknown = set(args.targets) - known.keys()
    if unknown:
        raise SystemExit(f"--targets {', '.join(sorted(unknown))}: use {', '.join(known)}")
    wanted = [known[name] for name in args.targets or known]
    for info in wanted:
        if not info.available:
            print(f"{info.name} is left out: {info.install}")
    rows: list[Row] = []
    for name in args.models:
        rows += deploy(name, [info for info in wanted if info.available], data, args)
    report(rows, data, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--models", type=names, default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--targets", type=names, default=[], help="default: all")
    parser.add_argument("--data", type=Path, help="an ImageFolder; default: digits")
    parser.add_argument(
        "--weights", type=names, default=[], help="MODEL=FILE,...: state dicts, not trained then"
    )
    parser.add_argument("--epochs", type=int, default=7, help="FP32 epochs")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def trained(name: str, data: Data, args: argparse.Namespace) -> nn.Module:
    model = make_model(name, data.classes)
    files = dict(entry.split("=", 1) for entry in args.weights)
    if name in files:
        load_weights(model, Path(files[name]).expanduser())
    else:
        print(f"\nFP32 training of {name}, {args.epochs} epochs")
        train(model, data.train, args.epochs, rate=0.05)
    return model.eval()


def quantized(model: nn.Module, preset: str, data: Data, example: torch.Tensor) -> nn.Module:
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping(preset), (example,))
    qt.calibrate(prepared, data.calibration, max_batches=CALIBRATION_BATCHES, progress=False)
    return qt.convert(prepared)


def classes(model: object, data: Data) -> torch.Tensor:
    """The highest class of each test image."""
    with torch.no_grad():
        return torch.cat([model(images).argmax(1) for images, _ in data.test])


def deploy(
    name: str, wanted: list[qt.export.TargetInfo], data: Data, args: argparse.Namespace
) -> list[Row]:
    """Rows for the model in PyTorch and for its file of each target."""
    model = trained(name, data, args)
    labels = torch.cat([labels for _, labels in data.test])
    example = next(iter(data.calibration))[0][:1]
    fp32 = classes(model, data)
    converted = {preset: quantized(model, preset, data, example) for preset in
                 dict.fromkeys(["x86", *(info.preset for info in wanted)])}  # fmt: skip
    found = {preset: classes(q, data) for preset, q in converted.items()}
    runs = {"PyTorch FP32": model, "PyTorch INT8": qt.compile(converted["x86"], (example,))}
    predicted = {"PyTorch FP32": fp32, "PyTorch INT8": classes(runs["PyTorch INT8"], data)}
    sizes = {"PyTorch FP32": qt.model_size(model), "PyTorch INT8": qt.model_size(converted["x86"])}
    reference = {"PyTorch FP32": fp32, "PyTorch INT8": found["x86"]}
    notes = {}
    for info in wanted:
        file = args.output / f"{name}_{info.name}{info.suffix}"
        export = getattr(qt.export, info.name)
        try:
            written = export(converted[info.preset], file, example_inputs=(example,))
        except (qt.export.UnsupportedError, qt.export.VerificationError) as error:
            print(f"{info.name}: {error}")
            continue
        print(f"\n{written}", flush=True)
        loaded = qt.export.load(info.name, file)
        runs[info.name], sizes[info.name] = loaded, written.size
        predicted[info.name] = classes_one_by_one(loaded, data)
        reference[info.name] = found[info.preset]
        notes[info.name] = loaded.version
    samples = medians(time_interleaved({n: bound(run, example) for n, run in runs.items()}))
    return [
        Row(
            name,
            target,
            sizes[target] / 1e6,
            float((predicted[target] == labels).double().mean()),
            float((predicted[target] == reference[target]).double().mean()),
            samples[target],
            notes.get(target, ""),
        )
        for target in runs
    ]


def classes_one_by_one(model: object, data: Data) -> torch.Tensor:
    """``classes`` by a file that may take no other batch than the one it was written with."""
    images = torch.cat([images for images, _ in data.test])
    return torch.cat([model(image).argmax(1) for image in images.split(1)])


def bound(model: object, image: torch.Tensor):
    def run() -> object:
        with torch.no_grad():
            return model(image)

    return run


def report(rows: list[Row], data: Data, args: argparse.Namespace) -> None:
    table = markdown_table(
        ["Model and target", "Top-1 %", "Agreement %", "MB", "Batch 1 ms", "Runtime"],
        [
            [
                f"{row.model}, {row.target}",
                f"{100 * row.top1:.2f}",
                f"{100 * row.agreement:.2f}",
                f"{row.megabytes:.2f}",
                f"{row.batch1_ms:.2f}",
                row.note,
            ]
            for row in rows
        ],
    )
    facts = (
        f"{data.name}, {len(data.test.dataset)} test images; {cpu_name()}, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"\n{table}\n\n{facts}")
    file = args.output / "deploy_everywhere.json"
    result = {
        "title": "One network in every runtime",
        "command": "python examples/deploy_everywhere.py",
        "table": table,
        "notes": [
            "Agreement is the share of test images with the class of the converted model. The "
            "files' sizes and times are beside each other only: a plan is made for the machine, "
            "TensorRT's file runs in ONNX Runtime without optimizations.\n"
        ],
        "facts": facts,
        "rows": [asdict(row) for row in rows],
    }
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {file}")


if __name__ == "__main__":
    main()
