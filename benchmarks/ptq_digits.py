"""What quantization after training costs on a task that is learned: scikit-learn's digits.

    python benchmarks/ptq_digits.py
    python benchmarks/ptq_digits.py --seed 1 --models resnet18

MobileNetV2 and ResNet-18 are trained; then 256 training images without labels quantize them. The
last rows are of a ResNet-18 whose channels were rescaled by up to 100 so that one scale for all
weights of a layer cannot serve them, which changes nothing in float. Exits with an error where more
is lost than is allowed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from dataclasses import replace
from typing import Any

import _bench
import torch
from torch import nn

import qtoolkit as qt

from _common import Data, digits, make_model, markdown_table, train  # isort: skip  (examples/)

SIZE, TEST_IMAGES, CALIBRATION_BATCHES = 32, 600, 8
#: Network, recipe, and the points of top-1 that it may lose.
ROWS = [
    ("mobilenet_v2", "w8a8-fast", None),
    ("mobilenet_v2", "w8a8", 0.5),
    ("resnet18", "w8a8", 0.5),
    ("resnet18", "w4a8 without AdaRound", None),
    ("resnet18", "w4a8", 1.0),
    ("resnet18", "w4a4 without reconstruction", None),
    ("resnet18", "w4a4", 2.0),
    ("resnet18 rescaled", "qnnpack without equalization", None),
    ("resnet18 rescaled", "qnnpack", 1.0),
]
ROWS_IN_ORDER = [(name, text) for name, text, _ in ROWS]
EPOCHS = {"mobilenet_v2": 8, "resnet18": 6}
BROKEN = 10.0  # what the rescaled network loses at least without equalization


def trained(name: str, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model(name, data.classes)
    train(model, data.train, EPOCHS[name], rate=0.05)
    return model.eval()


def rescaled(model: nn.Module, seed: int) -> nn.Module:
    """The same function, with the channels inside each residual block multiplied by 0.01 to 100."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.modules():
            if not hasattr(block, "bn2"):
                continue
            factor = 10 ** (4 * torch.rand(block.bn1.num_features, generator=generator) - 2)
            block.bn1.weight.mul_(factor)
            block.bn1.bias.mul_(factor)
            block.conv2.weight.div_(factor.reshape(1, -1, 1, 1))
    return model


def recipe_of(text: str) -> qt.Recipe:
    name, _, without = text.partition(" without ")
    recipe = qt.get_recipe(name)
    return replace(recipe, passes=()) if without else recipe


def write(known: dict[str, Any], new: list[dict[str, Any]]) -> None:
    """Puts rows in the place of those that the file has of the same network, recipe and seed."""
    file = _bench.ROOT / "benchmarks" / "results" / "ptq_digits.json"
    old = json.loads(file.read_text())["rows"] if file.is_file() else []
    by_row: dict[tuple[str, str], dict[int, dict[str, Any]]] = {key: {} for key in ROWS_IN_ORDER}
    for row in old + new:
        by_row[row["model"], row["recipe"]][row["seed"]] = row
    rows = [found[seed] for found in by_row.values() for seed in sorted(found)]
    seeds = sorted({row["seed"] for row in rows})
    cells = []
    for (name, text), found in by_row.items():
        if not found:
            continue
        allowed = next(iter(found.values()))["allowed"]
        cells.append([f"{name}, {text}", "" if allowed is None else f"{allowed:.1f}"])
        for row in map(found.get, seeds):
            both = ("fp32", "quantized")
            cells[-1] += ["", ""] if row is None else [f"{row[key]:.2f}" for key in both]
    header = ["Model, recipe", "May lose"]
    header += [f"{what} %, seed {s}" for s in seeds for what in ("FP32", "quantized")]
    result = {
        **known,
        "title": "Recipes on networks trained on the digits",
        "command": "python benchmarks/ptq_digits.py --seed 0, and 1",
        "table": markdown_table(header, cells),
        "notes": [
            f"Top-1 on {TEST_IMAGES} images that were not trained on; quantized with "
            f"{CALIBRATION_BATCHES * 32} images without labels. A row has the FP32 accuracy of its "
            "own run: training gives other bits in each."
        ],
        "facts": _bench.describe(known),
        "rows": rows,
    }
    _bench.write_json("ptq_digits", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", nargs="+", default=list(EPOCHS))
    recipes = [text for _, text in ROWS_IN_ORDER]
    parser.add_argument("--recipes", nargs="+", default=recipes, choices=recipes)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    data = digits(args.seed, SIZE, TEST_IMAGES)
    known = _bench.facts()
    print(f"digits {SIZE}x{SIZE}, {TEST_IMAGES} test images; {_bench.describe(known)}")
    images = [x for x, _ in data.calibration][:CALIBRATION_BATCHES]

    def top1(model: nn.Module) -> float:
        return 100 * qt.evaluate(model, data.test, metric="top1", progress=False)

    models, cells, results, failed = {}, [], [], []
    for name, text, allowed in ROWS:
        base = name.split()[0]
        if base not in args.models or text not in args.recipes:
            continue
        if base not in models:
            models[base] = trained(base, data, args.seed)
        if name not in models:
            models[name] = rescaled(models[base], args.seed)  # the last rows of this network
        start = time.perf_counter()
        quantized = qt.quantize(models[name], images, recipe_of(text), progress=False)
        seconds = time.perf_counter() - start
        before, after = top1(models[name]), top1(quantized)
        lost = before - after
        wrong = lost < BROKEN if "equalization" in text else allowed is not None and lost > allowed
        if wrong:
            failed.append(f"{name} {text}")
        row = {"model": name, "recipe": text, "seed": args.seed}
        row |= {"fp32": before, "quantized": after}
        results.append({**row, "allowed": allowed, "seconds": round(seconds, 1)})
        limit = "" if allowed is None else f"{allowed:.1f}"
        cells.append(
            [name, text, f"{before:.2f}", f"{after:.2f}", f"{-lost:+.2f}", limit, f"{seconds:.0f}"]
        )
        print(f"  {cells[-1]}", flush=True)
        write(known, results)  # at once, as the whole table takes minutes
    header = ["Model", "Recipe", "FP32 %", "Quantized %", "Difference", "May lose", "Seconds"]
    print(markdown_table(header, cells))
    if failed:
        sys.exit(f"not within what is allowed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
