"""The main job: a classifier from FP32 to a verified INT8 TorchScript file, by PTQ and by QAT.

By default torchvision's ResNet-18 is trained for a few epochs on scikit-learn's handwritten digits
(enlarged to 64x64). Then it is quantized after training and with fine-tuning, by qtoolkit and, for
comparison, by torch.ao.quantization; accuracy, size and latency of all are printed and written.

    python examples/resnet18.py                                # digits, 4 minutes at most
    python examples/resnet18.py --data ~/images --pretrained   # an ImageFolder, known weights
    python examples/resnet18.py --fake --model resnet50        # no data: sizes and latency at 224
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import _torch_ao
import torch
from _common import (
    Data,
    cpu_name,
    digits,
    fake_data,
    image_folder,
    load_pretrained,
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
QAT_RATE = 2e-3


@dataclass
class Variant:
    """A row of the table: a model as it is deployed, with its file."""

    name: str
    model: torch.jit.ScriptModule
    file: Path
    top1: float = 0.0
    batch1_ms: float = 0.0
    batch32_ms: float = 0.0


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    warnings.filterwarnings("ignore", message=".*torch.jit.*")  # announced to go
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    data = load_data(args)
    model = fp32_model(args, data)
    example = next(iter(data.calibration))[0][:1]
    variants = [save_script("FP32", torch.jit.trace(model, example), args, "fp32")]

    step("PTQ with qtoolkit: prepare, calibrate, convert, compile, export")
    ptq = quantize_ptq(model, data, example)
    variants.append(export("qtoolkit PTQ", ptq, example, args, "int8_ptq"))

    step("QAT with qtoolkit: prepare, fine-tune, convert, compile, export")
    qat = quantize_qat(model, data, example, args)
    variants.append(export("qtoolkit QAT", qat, example, args, "int8"))
    check_in_new_process(qat, variants[-1].file, data, args)

    skipped = why_no_peers(args)
    if skipped:
        print(f"\ntorch.ao.quantization is left out: {skipped}")
    else:
        step("PTQ and QAT with torch.ao.quantization")
        variants += quantize_torch_ao(model, data, example, args)

    step("Accuracy and latency")
    measure(variants, data)
    report(variants, data, args, skipped, time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="any torchvision classifier")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data", type=Path, help="an ImageFolder (224x224 is used); default: digits"
    )
    source.add_argument("--fake", action="store_true", help="random images of 224x224")
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument("--weights", type=Path, help="a state dict: the model is not trained")
    weights.add_argument("--pretrained", action="store_true", help="torchvision's own weights")
    parser.add_argument(
        "--epochs", type=int, help="FP32 epochs; default: 7, 0 with trained weights"
    )
    parser.add_argument("--qat-epochs", type=int, default=2, help="the last with frozen statistics")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-peers", action="store_true", help="leave torch.ao.quantization out")
    return parser.parse_args()


def load_data(args: argparse.Namespace) -> Data:
    if args.data:
        data = image_folder(args.data, args.seed)
    elif args.fake:
        data = fake_data(args.seed)
    else:
        data = digits(args.seed)
    print(f"{data.name}: {data.classes} classes, {len(data.train.dataset)} images to train on, "
          f"{len(data.test.dataset)} to test on")  # fmt: skip
    return data


def fp32_model(args: argparse.Namespace, data: Data) -> nn.Module:
    model = make_model(args.model, data.classes)
    trained = False
    if args.weights:
        load_weights(model, args.weights)
        trained = True
    elif args.pretrained:
        trained = load_pretrained(model, args.model)
    epochs = args.epochs if args.epochs is not None else (0 if trained else 1 if args.fake else 7)
    if epochs:
        step(f"FP32 training of {args.model}, {epochs} epochs")
        train(model, data.train, epochs, rate=0.01 if args.pretrained else 0.05)
    return model.eval()


def quantize_ptq(model: nn.Module, data: Data, example: torch.Tensor) -> nn.Module:
    mapping = qt.get_default_qconfig_mapping("x86")
    prepared = qt.prepare(model, mapping, example_inputs=(example,))
    qt.calibrate(prepared, data.calibration, max_batches=CALIBRATION_BATCHES)
    return qt.convert(prepared)


def quantize_qat(
    model: nn.Module, data: Data, example: torch.Tensor, args: argparse.Namespace
) -> nn.Module:
    mapping = qt.get_default_qat_qconfig_mapping("x86")
    prepared = qt.prepare_qat(model, mapping, example_inputs=(example,))

    def freeze() -> None:
        qt.freeze_observers(prepared)
        qt.freeze_bn(prepared)

    fine_tune(prepared, freeze, data, args)
    return qt.convert(prepared.eval())


def fine_tune(
    prepared: nn.Module, freeze: Callable[[], None], data: Data, args: argparse.Namespace
) -> None:
    """SGD at a small rate; the last epoch trains what inference will compute."""

    def before_epoch(epoch: int) -> None:
        if 0 < epoch == args.qat_epochs - 1:  # ranges must have seen data before
            freeze()

    torch.manual_seed(args.seed)  # the same images in the same order for all who are compared
    data.train.generator.manual_seed(args.seed)
    train(prepared, data.train, args.qat_epochs, QAT_RATE, before_epoch)


def quantize_torch_ao(
    model: nn.Module, data: Data, example: torch.Tensor, args: argparse.Namespace
) -> list[Variant]:
    ptq = _torch_ao.ptq(model, data.calibration, CALIBRATION_BATCHES)
    qat = _torch_ao.qat(model, example, lambda m, freeze: fine_tune(m, freeze, data, args))
    return [
        save_script("torch.ao PTQ", ptq, args, "torch_ao_ptq"),
        save_script("torch.ao QAT", qat, args, "torch_ao_qat"),
    ]


def why_no_peers(args: argparse.Namespace) -> str | None:
    return "--no-peers" if args.no_peers else _torch_ao.why_missing()


def export(
    name: str, converted: nn.Module, example: torch.Tensor, args: argparse.Namespace, suffix: str
) -> Variant:
    file = args.output / f"{args.model}_{suffix}.pt"
    fast = qt.compile(converted, (example,))  # the whole network as one operator
    qt.export.torchscript(fast, file, example_inputs=(example,))
    return Variant(name, torch.jit.load(file), file)


def save_script(
    name: str, script: torch.jit.ScriptModule, args: argparse.Namespace, suffix: str
) -> Variant:
    file = args.output / f"{args.model}_{suffix}.pt"
    torch.jit.save(script, file)
    return Variant(name, script, file)


def check_in_new_process(
    converted: nn.Module, file: Path, data: Data, args: argparse.Namespace
) -> None:
    """Loads the file where nothing of this process is, and compares with the converted model."""
    batch = next(iter(data.test))[0]
    with torch.inference_mode():
        outputs = converted(batch)
    files = [args.output / f"{args.model}_{name}.pt" for name in ("batch", "outputs")]
    for content, path in zip((batch, outputs), files):
        torch.save(content, path)
    checker = Path(__file__).with_name("check_torchscript.py")
    if subprocess.run([sys.executable, checker, file, *files]).returncode != 0:
        raise SystemExit(f"{file} does not give the converted model's outputs in a new process")


def measure(variants: list[Variant], data: Data) -> None:
    for variant in variants:
        variant.top1 = 100 * qt.evaluate(variant.model, data.test, metric="top1", progress=False)
    image = next(iter(data.test))[0][:1]
    with torch.inference_mode():
        for size in (1, 32):
            batch = image.expand(size, -1, -1, -1).contiguous()
            runs = {v.name: lambda v=v, batch=batch: v.model(batch) for v in variants}
            for name, ms in medians(time_interleaved(runs)).items():
                variant = next(v for v in variants if v.name == name)
                setattr(variant, f"batch{size}_ms", ms)


def report(
    variants: list[Variant],
    data: Data,
    args: argparse.Namespace,
    skipped: str | None,
    seconds: float,
) -> None:
    size = {v.name: v.file.stat().st_size for v in variants}
    fp32 = variants[0]
    header = ["Model", "Top-1 %", "File MB", "of FP32", "Batch 1 ms", "Batch 32 ms", "Speed-up"]
    rows = [
        [
            v.name,
            f"{v.top1:.2f}",
            f"{size[v.name] / 1e6:.2f}",
            f"{size[v.name] / size[fp32.name]:.3f}",
            f"{v.batch1_ms:.2f}",
            f"{v.batch32_ms:.1f}",
            f"{fp32.batch1_ms / v.batch1_ms:.1f} / {fp32.batch32_ms / v.batch32_ms:.1f}",
        ]
        for v in variants
    ]
    table = markdown_table(header, rows)
    facts = (
        f"{args.model}, {data.name}, {len(data.test.dataset)} test images; "
        f"{cpu_name()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}, "
        f"qtoolkit {qt.__version__}; TorchScript files; median latency."
    )
    print(f"\n{table}\n\n{facts}")
    result = {
        "model": args.model,
        "data": data.name,
        "facts": facts,
        "torch_ao_left_out": skipped,
        "seconds": round(seconds, 1),
        "variants": [
            {
                "name": v.name,
                "top1": v.top1,
                "bytes": size[v.name],
                "batch1_ms": v.batch1_ms,
                "batch32_ms": v.batch32_ms,
            }
            for v in variants
        ],
        "table": table,
    }
    json_file = args.output / f"{args.model}.json"
    json_file.write_text(json.dumps(result, indent=2) + "\n")
    json_file.with_suffix(".md").write_text(f"{table}\n\n{facts}\n")
    print(f"Written: {json_file}, {json_file.with_suffix('.md')} ({seconds:.0f} s in all)")


def step(title: str) -> None:
    print(f"\n--- {title}", flush=True)


if __name__ == "__main__":
    main()
