"""Fine-tuning at 8, 4 and 2 bits, ternary and binary weights: accuracy beside FP32 and other tools.

ResNet-18 and MobileNetV2 are trained on scikit-learn's handwritten digits once. From these weights
every setting is fine-tuned by qtoolkit, and by torch.ao (8 bits) or Brevitas (below): the same
images in the same order, the same number of steps, optimizer, schedule and loss. The first layer,
the last one, the image and what the last layer reads have 8 bits in every setting, on both sides.

    python examples/qat_lowbit.py                                      # all settings of both models
    python examples/qat_lowbit.py --models resnet18 --settings W4A4 W2A4 --seed 1
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import _brevitas
import _torch_ao
import torch
from _common import Data, cpu_name, digits, make_model, markdown_table, train
from torch import nn

import qtoolkit as qt

AGREEMENT, SQNR = 99.5, 35.0  # of the converted model with the QAT model: per cent and dB, at least


@dataclass(frozen=True)
class Setting:
    """What has how many bits, how it is fine-tuned, and the accuracy that is asked for."""

    weight: str  # format of the weights
    activation: str  # format of the activations
    margin: float  # points of top-1 that may be lost against FP32
    epochs: int  # of fine-tuning; batch norms use running statistics in the last
    rate: float  # highest learning rate


SETTINGS = {
    "W8A8": Setting("int8", "uint8", 0.3, epochs=2, rate=2e-3),
    "W4A8": Setting("int4", "uint8", 1.0, epochs=3, rate=5e-3),
    "W4A4": Setting("int4", "uint4", 1.0, epochs=3, rate=5e-3),
    "W2A4": Setting("int2", "uint4", 2.5, epochs=4, rate=1e-2),
    "ternary": Setting("ternary", "uint8", 2.5, epochs=4, rate=1e-2),
    "binary": Setting("binary", "uint8", 5.0, epochs=4, rate=1e-2),
}


@dataclass(frozen=True)
class Network:
    """A torchvision classifier, its FP32 training, and the layers that keep 8-bit weights."""

    title: str
    epochs: int
    rate: float
    eight_bits: tuple[str, ...]


NETWORKS = {
    "resnet18": Network("ResNet-18", 10, 0.05, ("conv1", "fc")),
    "mobilenet_v2": Network("MobileNetV2", 20, 0.05, ("features.0.0", "classifier.1")),
}


@dataclass
class Row:
    """A line of the table; top-1, agreement in per cent, SQNR in dB, None: was not run."""

    model: str
    setting: str
    margin: float
    fp32: float
    weight_bytes: int
    fp32_bytes: int
    method: str = ""
    qtoolkit: float | None = None
    agreement: float | None = None
    sqnr: float | None = None
    peer_name: str = ""
    peer: float | None = None

    def misses(self) -> list[str]:
        """What was asked for and does not hold."""
        where, found = f"{self.model} {self.setting}", []
        if self.qtoolkit is None or self.agreement is None or self.sqnr is None:
            return []
        if self.qtoolkit < self.fp32 - self.margin:
            found.append(f"{where}: more than {self.margin} points below FP32")
        if self.peer is not None and self.qtoolkit < self.peer:
            found.append(f"{where}: below {self.peer_name}")
        if self.agreement < AGREEMENT or self.sqnr < SQNR:
            found.append(f"{where}: the converted model is not what was trained")
        return found


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message=".*torch.ao.quantization is deprecated.*")
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    data = digits(args.seed, args.size)
    rows = []
    for name in args.models:
        model = fp32_model(name, data, args)
        fp32 = top1(model, data)
        for setting in args.settings:
            rows.append(run(name, model, fp32, setting, data, args))
    report(rows, data, args, time.perf_counter() - started)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--size", type=int, default=32, help="pixels of an image's side")
    parser.add_argument("--seed", type=int, default=0, help="of the data's split and order")
    parser.add_argument("--epochs", type=int, help="of every training, in place of the settings'")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--no-peers", action="store_true", help="leave the other tools out")
    return parser.parse_args()


# --- FP32 ---------------------------------------------------------------------------------------


def fp32_model(name: str, data: Data, args: argparse.Namespace) -> nn.Module:
    """The trained model, from the file of an earlier run if there is one."""
    network = NETWORKS[name]
    epochs = args.epochs or network.epochs
    torch.manual_seed(args.seed)
    model = make_model(name, data.classes)
    file = args.output / f"{name}_fp32_{args.size}px_{epochs}epochs_seed{args.seed}.pt"
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        step(f"{network.title}: FP32 training, {epochs} epochs")
        train(model, data.train, epochs, network.rate)
        torch.save(model.state_dict(), file)
    return model.eval()


def top1(model: Callable, data: Data) -> float:
    return 100 * qt.evaluate(model, data.test, progress=False)


# --- one setting --------------------------------------------------------------------------------


def run(
    name: str,
    model: nn.Module,
    fp32: float,
    setting_name: str,
    data: Data,
    args: argparse.Namespace,
) -> Row:
    setting, network = SETTINGS[setting_name], NETWORKS[name]
    example = next(iter(data.calibration))[0][:1]

    def fine_tune(prepared: nn.Module, freeze: Callable[[], None]) -> None:
        """SGD; the last epoch trains what inference will compute."""
        epochs = args.epochs or setting.epochs
        torch.manual_seed(args.seed)  # the same images in the same order for all
        data.train.generator.manual_seed(args.seed)
        train(
            prepared,
            data.train,
            epochs,
            setting.rate,
            lambda epoch: freeze() if 0 < epoch == epochs - 1 else None,
        )

    row = Row(
        network.title,
        setting_name,
        setting.margin,
        fp32,
        weight_bytes(model, setting.weight, network.eight_bits),
        weight_bytes(model, "fp32", ()),
    )
    step(f"{network.title} {setting_name}: qtoolkit")
    quantize(row, model, setting, network, data, example, fine_tune)
    if args.no_peers:
        return row
    peer = _torch_ao if setting_name == "W8A8" else _brevitas
    row.peer_name = "torch.ao" if peer is _torch_ao else "Brevitas"
    missing = peer.why_missing()
    if missing:
        print(f"{row.peer_name} is left out: {missing}")
        return row
    step(f"{network.title} {setting_name}: {row.peer_name}")
    if peer is _torch_ao:
        row.peer = top1(_torch_ao.qat(model, example, fine_tune), data)
    else:
        bits = qt.formats.get_format(setting.activation).bits
        prepared = _brevitas.prepare_qat(
            model, data.calibration, setting.weight, bits, network.eight_bits
        )
        fine_tune(prepared, lambda: _brevitas.freeze_bn(prepared))
        row.peer = top1(prepared, data)
    return row


def quantize(
    row: Row,
    model: nn.Module,
    setting: Setting,
    network: Network,
    data: Data,
    example: torch.Tensor,
    fine_tune: Callable[[nn.Module, Callable[[], None]], None],
) -> None:
    """Fills in qtoolkit's part of the row."""
    prepared = qt.prepare_qat(model, mapping_for(setting, network), example_inputs=(example,))

    def freeze() -> None:
        qt.freeze_observers(prepared)
        qt.freeze_bn(prepared)

    fine_tune(prepared, freeze)
    converted = qt.convert(prepared.eval())
    row.method = METHODS[setting.weight]
    row.qtoolkit = top1(converted, data)
    row.agreement, row.sqnr = parity(prepared, converted, data)


METHODS = {"int8": "observed", "int4": "lsq", "int2": "lsq", "ternary": "twn", "binary": "xnor"}


def mapping_for(setting: Setting, network: Network) -> qt.QConfigMapping:
    """Low bits everywhere but in the first and the last layer and in what these read."""
    eight = qt.get_default_qat_qconfig_mapping("x86").global_qconfig
    assert eight is not None
    activation, weight = eight.activation, eight.weight
    if setting.activation != "uint8":
        activation = qt.TensorSpec(setting.activation, observer="histogram", method="lsq+")
    if setting.weight != "int8":
        weight = qt.TensorSpec(
            setting.weight,
            "per_channel",
            symmetric=setting.weight != "int2",
            observer="per_channel_minmax",
            method=METHODS[setting.weight],
        )
    mapping = qt.QConfigMapping().set_global(qt.QConfig(activation, weight))
    mapping = mapping.set_module_type(nn.AdaptiveAvgPool2d, eight)
    for name in network.eight_bits:
        mapping = mapping.set_module_name(name, eight)
    return mapping


@torch.no_grad()
def parity(prepared: nn.Module, converted: nn.Module, data: Data) -> tuple[float, float]:
    """Images with the same class from both, in per cent, and the SQNR of the logits in dB."""
    same = images = 0
    signal = noise = 0.0
    for batch, _ in data.test:
        expected, found = prepared(batch).double(), converted(batch).double()
        same += int((expected.argmax(1) == found.argmax(1)).sum())
        images += len(batch)
        signal += float(expected.square().sum())
        noise += float((expected - found).square().sum())
    sqnr = 10 * math.log10(signal / noise) if noise else math.inf
    return 100 * same / images, sqnr


def weight_bytes(model: nn.Module, weight: str, eight_bits: tuple[str, ...]) -> int:
    """Bytes of the weights of all convolutions and linear layers: packed codes and scales."""
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            if weight == "fp32":
                total += 4 * module.weight.numel()
                continue
            bits = qt.formats.get_format("int8" if name in eight_bits else weight).bits
            total += math.ceil(module.weight.numel() * bits / 8) + 4 * len(module.weight)
    return total


# --- the table ----------------------------------------------------------------------------------

HEADER = [
    "Model",
    "Setting",
    "Method",
    "FP32 top-1 %",
    "qtoolkit top-1 %",
    "Peer top-1 %",
    "Agreement %",
    "SQNR dB",
    "Weights MB",
    "of FP32",
]


def report(rows: list[Row], data: Data, args: argparse.Namespace, seconds: float) -> None:
    table = markdown_table(HEADER, [cells(row) for row in rows])
    facts = (
        f"{data.name}, seed {args.seed}, {len(data.test.dataset)} test images (one is "
        f"{100 / len(data.test.dataset):.2f} points); {cpu_name()}, {torch.get_num_threads()} "
        f"threads, PyTorch {torch.__version__}, qtoolkit {qt.__version__}. qtoolkit: the converted "
        "model. Agreement and SQNR: of the converted model with the QAT model. Weights: packed "
        "codes and scales."
    )
    misses = [miss for row in rows for miss in row.misses()]
    print(f"\n{table}\n\n{facts}\n")
    print("\n".join(["Not reached:", *misses]) if misses else "All that is asked for holds.")
    result = {
        "title": "Few bits on the digits: " + ", ".join(NETWORKS[m].title for m in args.models),
        "command": f"python examples/qat_lowbit.py --models {' '.join(args.models)} "
        f"--seed {args.seed}",
        "facts": facts,
        "seconds": round(seconds, 1),
        "rows": [asdict(row) for row in rows],
        "misses": misses,
        "table": table,
    }
    file = args.output / "qat_lowbit.json"
    file.write_text(json.dumps(result, indent=2) + "\n")
    file.with_suffix(".md").write_text(f"{table}\n\n{facts}\n")
    print(f"Written: {file}, {file.with_suffix('.md')} ({seconds:.0f} s in all)")
    if misses:
        sys.exit(1)


def cells(row: Row) -> list[str]:
    def number(value: float | None, digits: int = 2) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    return [
        row.model,
        row.setting,
        row.method,
        number(row.fp32),
        number(row.qtoolkit),
        f"{row.peer_name} {number(row.peer)}".strip(),
        number(row.agreement),
        number(row.sqnr, 1),
        number(row.weight_bytes / 1e6),
        f"{row.weight_bytes / row.fp32_bytes:.3f}",
    ]


def step(title: str) -> None:
    print(f"\n--- {title}", flush=True)


if __name__ == "__main__":
    main()
