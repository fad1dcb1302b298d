"""How close W8A8 after training stays to FP32, beside ONNX Runtime's and NNCF's quantizers.

    python benchmarks/ptq_sqnr.py
    python benchmarks/ptq_sqnr.py --models vit_b_16 --recipe w8a8-fast

Random weights, batch-norm statistics settled on data; all calibrate on the same images. Printed:
SQNR of the logits in dB, of ONNX Runtime's `quantize_static` (QDQ, weights per channel) and of
`nncf.quantize` on the OpenVINO model, each run in its own runtime. Random networks amplify noise,
so the differences count, not the levels.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import _bench
import torch
import torchvision
from torch import Tensor, nn

import qtoolkit as qt

from _common import markdown_table  # isort: skip  (examples/)

#: Name and image size: the least that the network takes, or what keeps its output from vanishing.
MODELS = {
    "vit_b_16": 64,
    "swin_t": 64,
    "convnext_tiny": 64,
    "efficientnet_b0": 128,
    "mobilenet_v3_large": 128,
    "mobilenet_v3_small": 64,
    "mobilenet_v2": 64,
    "regnet_y_400mf": 64,
    "shufflenet_v2_x1_0": 64,
    "resnet18": 64,
    "densenet121": 64,
    "googlenet": 96,
    "resnet50": 64,
}
TRANSFORMERS = ("swin_t", "vit_b_16")
BATCH, BATCHES = 8, 4
TEST_SEEDS = range(1000, 1004)  # of one batch alone the SQNR swings by 4 dB
ALLOWED = 0.5  # dB


def make_model(name: str, size: int) -> nn.Module:
    if name not in ("vit_b_16", "convnext_tiny"):
        return _bench.settled_model(name, size)
    torch.manual_seed(0)
    options = {"image_size": size} if name == "vit_b_16" else {}
    model = torchvision.models.get_model(name, weights=None, **options)
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight, std=0.05)  # torchvision's is zero
    for key, parameter in model.named_parameters():
        if key.endswith("layer_scale"):
            nn.init.constant_(parameter, 0.5)  # 1e-6 would switch the blocks off
    return model.eval()


def qtoolkit(model: nn.Module, batches: list[Tensor], recipe: str) -> Callable[[Tensor], Tensor]:
    return qt.quantize(model, batches, recipe, progress=False)


def onnx_runtime(model: nn.Module, batches: list[Tensor], folder: Path) -> Callable[..., Tensor]:
    import onnxruntime as ort
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.left, None)
            return None if batch is None else {"x": batch.numpy()}

    files = [folder / f"{name}.onnx" for name in ("float", "ready", "int8")]
    torch.onnx.export(
        model, (batches[0],), files[0], input_names=["x"], opset_version=17, dynamo=False
    )
    quant_pre_process(files[0], files[1], skip_symbolic_shape=True)
    quantize_static(
        files[1],
        files[2],
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    session = ort.InferenceSession(files[2], providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def nncf_quantize(
    model: nn.Module, batches: list[Tensor], *, transformer: bool
) -> Callable[..., Tensor]:
    import nncf
    import openvino as ov

    nncf.set_log_level(logging.ERROR)
    converted = ov.convert_model(model, example_input=batches[0])
    # Asymmetric activations, as those of the others are; NNCF's default is symmetric.
    quantized = nncf.quantize(
        converted,
        nncf.Dataset(batches, lambda batch: batch.numpy()),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        subset_size=len(batches),
    )
    compiled = ov.Core().compile_model(quantized, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda x: torch.from_numpy(compiled(x.numpy())[0])


def measure(name: str, size: int, recipe: str, seeds: Sequence[int]) -> dict[str, float]:
    """SQNR in dB of each quantizer's model on images that it has not seen."""
    model = make_model(name, size)
    batches = [_bench.structured_images(BATCH, size, seed) for seed in range(BATCHES)]
    tests = [_bench.structured_images(BATCH, size, seed) for seed in seeds]
    here = Path.cwd()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        reference = [model(x) for x in tests]
        runs = {"qtoolkit": qtoolkit(model, batches, recipe)}
        os.chdir(folder)  # where ONNX Runtime's tools leave files
        try:
            runs["onnxruntime"] = onnx_runtime(model, batches, Path(folder))
        finally:
            os.chdir(here)
        runs["nncf"] = nncf_quantize(model, batches, transformer=name in TRANSFORMERS)
        return {
            key: _bench.sqnr_db(torch.cat(reference), torch.cat([run(x) for x in tests]))
            for key, run in runs.items()
        }


def to_the_better(found: dict[str, float]) -> float:
    """dB by which qtoolkit is ahead of the better peer."""
    return found["qtoolkit"] - max(found["onnxruntime"], found["nncf"])


def row_of(name: str, found: dict[str, float]) -> list[str]:
    cells = [f"{found[key]:.2f}" for key in ("qtoolkit", "onnxruntime", "nncf")]
    return [name, *cells, f"{to_the_better(found):+.2f}"]


def table_of(results: dict[str, dict[str, float]]) -> str:
    header = ["Model", "qtoolkit dB", "ONNX Runtime dB", "NNCF dB", "to the better"]
    return markdown_table(header, [row_of(name, found) for name, found in results.items()])


def write(
    known: dict[str, Any],
    recipe: str,
    results: dict[str, dict[str, float]],
    seeds: Sequence[int] | None,
) -> None:
    """Puts the results in the place of those that the file has of the same networks.

    Args:
        seeds: of other test images than the table's, whose results have a place of their own.
    """
    file = _bench.ROOT / "benchmarks" / "results" / "ptq_sqnr.json"
    old = json.loads(file.read_text()) if file.is_file() else {}

    def merged(key: str) -> dict[str, dict[str, float]]:
        new = results if (key == "checks") == (seeds is not None) else {}
        before = old.get(key, {})
        return {name: found for name in MODELS if (found := new.get(name) or before.get(name))}

    models, checks = merged("models"), merged("checks")
    check_seeds = old.get("check_seeds", []) if seeds is None else list(seeds)
    notes = [
        f"SQNR of the logits of {BATCH * len(TEST_SEEDS)} images to FP32's, recipe {recipe}; "
        f"random weights, batch norms settled; {BATCHES} batches of {BATCH} images to quantize "
        "with. How bias correction counts chance was chosen on these images."
    ]
    if checks:
        count = BATCH * len(check_seeds)
        others = ", ".join(f"{name} {to_the_better(found):+.2f}" for name, found in checks.items())
        notes[0] += f" On {count} others (`--test-seeds`), dB to the better: {others}."
    result = {
        **known,
        "title": "W8A8 after training beside other quantizers",
        "command": "python benchmarks/ptq_sqnr.py",
        "table": table_of(models),
        "notes": notes,
        "facts": _bench.describe(known),
        "recipe": recipe,
        "models": models,
        "check_seeds": check_seeds,
        "checks": checks,
    }
    _bench.write_json("ptq_sqnr", result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--no-write", action="store_true", help="leave the result file alone")
    parser.add_argument(
        "--test-seeds",
        type=int,
        nargs="+",
        help=f"of other batches of {BATCH} test images, to check the table",
    )
    args = parser.parse_args()
    seeds = args.test_seeds or TEST_SEEDS
    warnings.filterwarnings("ignore")
    torch.backends.mha.set_fastpath_enabled(False)  # which torch.onnx cannot export
    logging.disable(logging.WARNING)

    known = _bench.facts()
    print(f"recipe {args.recipe}; {_bench.describe(known)}")
    results, behind = {}, []
    for name in args.models:
        start = time.perf_counter()
        size = MODELS.get(name, 64)
        found = measure(name, size, args.recipe, seeds)
        if to_the_better(found) < -ALLOWED:
            behind.append(name)
        results[name] = {"size": size, **found}
        if not args.no_write:  # at once, as the whole table takes minutes
            write(known, args.recipe, results, args.test_seeds)
        print(f"  {row_of(name, found)} {time.perf_counter() - start:.0f} s", flush=True)
    print(table_of(results))
    if behind:
        sys.exit(f"more than {ALLOWED} dB below the better one: {', '.join(behind)}")


if __name__ == "__main__":
    main()
