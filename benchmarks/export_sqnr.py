"""How close exported files stay to FP32, beside the converted model that they were made from.

    python benchmarks/export_sqnr.py
    python benchmarks/export_sqnr.py --targets onnx --models resnet18,vit_b_16  # others stay

Random weights, batch-norm statistics settled on random images; each target has the mapping that
suits it. Every file is verified in its runtime while it is written. Random networks amplify single
roundings, so file and model are compared with FP32 each: the file may be 0.5 dB below the model.
They are compared on images that they were not calibrated on, and on enough of them: on 8 images
the difference varied by 0.2 dB from seed to seed.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from _bench import describe, facts

from _common import markdown_table  # (examples/)  isort: skip
from torch import Tensor, nn

import qtoolkit as qt

# Name and image size: the least that the network takes, or what keeps its output from vanishing.
MODELS = {
    "resnet18": 64,
    "resnet50": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "efficientnet_b0": 64,
    "googlenet": 96,
    "densenet121": 64,
    "shufflenet_v2_x1_0": 64,
    "squeezenet1_1": 96,
    "vgg11_bn": 64,
    "regnet_y_400mf": 64,
    "deeplabv3_mobilenet_v3_large": 64,
    "vit_b_16": 32,
}
ALLOWED = 0.5  # dB
BATCH, BATCHES = 8, 8


def make_model(name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None}
    if name == "googlenet":
        options |= {"aux_logits": False, "init_weights": True}
    if name.startswith("vit"):
        options["image_size"] = size
    if name.startswith("deeplab"):
        options |= {"weights_backbone": None}
    model = torchvision.models.get_model(name, **options)
    if name.startswith("vit"):
        nn.init.normal_(model.heads.head.weight, std=0.05)  # torchvision's is zero
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(8, 3, size, size))
    return model.eval()


def first(output: Any) -> Tensor:
    """The first tensor of a model's output."""
    if isinstance(output, dict):
        output = next(iter(output.values()))
    return output[0] if isinstance(output, tuple | list) else output


def run(model: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """The model's first output on the images, in batches of the size that it was made with."""
    with torch.no_grad():
        return torch.cat([first(model(batch)) for batch in images.split(BATCH)])


def sqnr(expected: Tensor, actual: Tensor) -> float:
    noise = (expected.double() - actual.double()).square().sum()
    return float(10 * torch.log10(expected.double().square().sum() / noise))


def quantize(model: nn.Module, preset: str, x: Tensor) -> nn.Module:
    prepared = qt.prepare(model, qt.get_default_qconfig_mapping(preset), (x,))
    qt.calibrate(prepared, [(x,)], progress=False)
    return qt.convert(prepared)


def measure(name: str, size: int, targets: list[str]) -> list[dict[str, Any]]:
    model = make_model(name, size)
    x = torch.randn(BATCH, 3, size, size)
    images = torch.randn(BATCH * BATCHES, 3, size, size)
    infos = qt.export.targets()
    expected = run(model, images)
    converted: dict[str, nn.Module] = {}
    rows = []
    for target in targets:
        info = infos[target]
        if info.preset not in converted:
            converted[info.preset] = quantize(model, info.preset, x)
        own = sqnr(expected, run(converted[info.preset], images))
        row: dict[str, Any] = {"model": name, "target": target, "converted": own}
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}{info.suffix}"
            try:
                report = getattr(qt.export, target)(converted[info.preset], file, (x,))
                found = sqnr(expected, run(qt.export.load(target, file), images))
            except Exception as error:
                row |= {"ok": False, "note": f"{type(error).__name__}: {error}"[:200]}
            else:
                layers = report.layers
                row |= {
                    "file": found,
                    "ok": math.isnan(found) or found > own - ALLOWED,
                    "megabytes": report.size / 1e6,
                    "runtime": report.runtime,
                    "layers": None if layers is None else layers.compared,
                    "differing": None if layers is None else layers.differing,
                }
        rows.append(row)
        found, verdict = row.get("file", math.nan), "ok" if row["ok"] else "NOT OK"
        print(
            f"{name:28} {target:12} converted {own:6.2f} dB, file {found:6.2f} dB  {verdict} "
            f"{row.get('note', '')}",
            flush=True,
        )
    return rows


#: Rows that are no failure: what these targets hold is narrower by design.
ONE_PLAN = "not one plan"


def cell(row: dict[str, Any] | None) -> str:
    """The file's SQNR in dB and, where it is not the model's own, the difference."""
    if row is None:
        return ""
    if "file" not in row:
        return ONE_PLAN if row["target"] == "plan" else "refused"
    if math.isnan(row["file"]):
        return "verified"
    difference = row["file"] - row["converted"]
    return f"{row['file']:.2f} ({difference:+.2f})" if abs(difference) >= 0.005 else "same"


def table(rows: list[dict[str, Any]]) -> str:
    """Networks down, targets across."""
    found = {(row["model"], row["target"]): row for row in rows}
    targets = list(dict.fromkeys(row["target"] for row in rows))
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = next(r for r in rows if r["model"] == model and r["target"] != "tensorrt")
        cells = [cell(found.get((model, target))) for target in targets]
        lines.append([model, f"{own['converted']:.2f}", *cells])
    return markdown_table(["dB to FP32", "converted", *targets], lines)


def document(rows: list[dict[str, Any]], known: dict[str, Any]) -> dict[str, Any]:
    """What docs/benchmarks.md shows, and the rows."""
    return {
        "title": "Exported files against FP32",
        "command": "python benchmarks/export_sqnr.py",
        "table": table(rows),
        "notes": [
            "SQNR of each file's outputs to the FP32 network's in the runtime that it is for "
            "(TensorRT's in ONNX Runtime, without optimizations), and how far that is from the "
            "converted model's own; TensorRT's model has symmetric codes and another SQNR, which "
            f"its difference is from. Allowed are {ALLOWED} dB. Random weights and images. A plan "
            f"file holds networks that are one plan as a whole; where it says {ONE_PLAN!r}, a part "
            "of the network runs in PyTorch, and the export is refused with that part's name. "
            "Empty: not measured.\n"
        ],
        "facts": describe(known),
        "rows": rows,
    }


def read(file: Path) -> list[dict[str, Any]]:
    """Rows of an earlier run, which stay where this one has none."""
    if not file.is_file():
        return []
    data = json.loads(file.read_text())
    return data["rows"] if isinstance(data, dict) else data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--models", type=names, default=list(MODELS))
    parser.add_argument("--targets", type=names, help="default: all that are installed")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/export_sqnr.json"))
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    available = [name for name, info in qt.export.targets().items() if info.available]
    targets = args.targets or available
    order = list(MODELS)
    for name in args.models:
        rows = measure(name, MODELS.get(name, 64), targets)
        merged = {(row["model"], row["target"]): row for row in [*read(args.output), *rows]}
        ordered = sorted(
            merged.values(),
            key=lambda row: (
                order.index(row["model"]) if row["model"] in order else -1,
                row["target"],
            ),
        )
        args.output.write_text(json.dumps(document(ordered, facts()), indent=1) + "\n")
    good = sum(row["ok"] for row in ordered)
    print(f"{good} of {len(ordered)} files within {ALLOWED} dB; written to {args.output}")


if __name__ == "__main__":
    main()
