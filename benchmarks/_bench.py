"""What the benchmarks share, beside the examples' timing and tables: facts, models, results."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))


def facts() -> dict[str, Any]:
    """CPU, threads and versions: what a number depends on."""
    from _common import cpu_name

    versions = {}
    for name in ("torch", "torchvision", "qtoolkit", "torchao", "onnxruntime", "openvino", "nncf"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "versions": versions}


def describe(known: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    return f"{known['cpu']}, {known['threads']} threads; {versions}"


def write_json(name: str, result: dict[str, Any]) -> None:
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=2) + "\n")
    print(f"Written: {file.relative_to(ROOT)}")


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise in dB: 10 log10(|reference|^2 / |reference - other|^2)."""
    noise = (reference.double() - other.double()).square().sum()
    return (10 * torch.log10(reference.double().square().sum() / noise)).item()


def structured_images(count: int, size: int, seed: int) -> Tensor:
    """Random images with the smooth structure of photographs, [count, 3, size, size]: noise of
    several resolutions, enlarged and added, coarse parts stronger; mean 0, deviation 1."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.zeros(count, 3, size, size)
    for cells in (4, 16, 64):
        noise = torch.randn(count, 3, cells, cells, generator=generator)
        image += (
            nn.functional.interpolate(noise, (size, size), mode="bilinear") * (4 / cells) ** 0.5
        )
    return (image - image.mean()) / image.std()


def settled_model(name: str, size: int, seed: int = 0) -> nn.Module:
    """A torchvision classifier with random weights whose batch-norm statistics fit the data."""
    from _common import make_model

    torch.manual_seed(seed)
    model = make_model(name, 1000)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the mean over all batches, not a moving average
            module.reset_running_stats()
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.train()
    with torch.no_grad():
        for batch in range(4):
            model(structured_images(8, size, 100 + batch))
    return model.eval()


def torch_ao_dynamic(linear: nn.Linear, engine: str) -> Callable[[Tensor], Any]:
    """torch.ao's dynamically quantized form of a layer, in one of its engines."""
    from torch.ao.quantization import quantize_dynamic

    torch.backends.quantized.engine = engine
    model = quantize_dynamic(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)

    def run(x: Tensor) -> Tensor:
        torch.backends.quantized.engine = engine
        return model(x)

    return run
