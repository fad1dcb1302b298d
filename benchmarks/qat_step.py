"""A training step of quantization-aware training beside the FP32 step: time and peak memory.

Times are interleaved in one process. Peak memory is the resident set above its size before the
first step, of a process for each variant.

python benchmarks/qat_step.py --model resnet18 --batch 32 --threads 2
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import _bench
import torch
from torch import nn

import qtoolkit as qt

from _common import make_model, markdown_table  # (examples/)  isort: skip

Step = Callable[[], None]


def trainer(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def torch_ao_qat(model: nn.Module, images: torch.Tensor) -> nn.Module:
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    return prepare_qat_fx(model, get_default_qat_qconfig_mapping("x86"), (images,))


def low_bit(model: nn.Module, images: torch.Tensor) -> nn.Module:
    mapping = qt.low_bit_qconfig_mapping(model, "w4a4")
    return qt.prepare_qat(model, mapping, example_inputs=(images,))


# name: what is made of the float model and an image
VARIANTS: dict[str, Callable[[nn.Module, torch.Tensor], nn.Module]] = {
    "FP32": lambda model, _: model,
    "FP32 channels_last": lambda model, _: model.to(memory_format=torch.channels_last),
    "FP32 torch.compile": lambda model, _: torch.compile(model),
    "torch.ao QAT": torch_ao_qat,
    "qtoolkit QAT": lambda model, images: qt.prepare_qat(model, example_inputs=(images,)),
    "qtoolkit QAT W4A4 (LSQ)": low_bit,
}


def make_step(name: str, args: argparse.Namespace) -> Step:
    torch.manual_seed(0)
    model = make_model(args.model, 10).train()
    images = torch.randn(args.batch, 3, args.size, args.size)
    if name.endswith("channels_last"):
        images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (args.batch,))
    return trainer(VARIANTS[name](model, images[:1]).train(), images, labels)


def peak_mib(step: Step) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def memory_of(name: str, args: argparse.Namespace) -> float:
    """`peak_mib` in a new process."""
    options = {"model": args.model, "batch": args.batch, "size": args.size, "threads": args.threads}
    command = [sys.executable, __file__, "--memory-of", name]
    command += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def interleaved_seconds(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18", help="a torchvision classifier")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(peak_mib(make_step(args.memory_of, args)))
        return

    names = ["FP32", *(name for name in args.variants if name != "FP32")]
    memory = {name: memory_of(name, args) for name in names}
    seconds = interleaved_seconds({name: make_step(name, args) for name in names}, args.rounds)
    known = _bench.facts()
    least = {name: min(values) for name, values in seconds.items()}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    rows = [
        [
            name,
            f"{least[name]:.3f}",
            f"{median[name]:.3f}",
            f"{least[name] / least['FP32']:.3f}",
            f"{median[name] / median['FP32']:.3f}",
            f"{memory[name]:.0f}",
            f"{memory[name] / memory['FP32']:.3f}",
        ]
        for name in names
    ]
    header = ["", "min s", "median s", "of FP32 (min)", "of FP32 (median)", "peak MiB", "of FP32"]
    facts = f"Batch {args.batch} at {args.size}x{args.size}; {_bench.describe(known)}"
    table = markdown_table(header, rows)
    print(f"{args.model}. {facts}\n{table}")
    _bench.write_json(
        f"qat_step_{args.model}_batch{args.batch}_threads{args.threads}",
        {
            **known,
            "title": f"Training step of {args.model}: FP32 and quantization-aware",
            "command": f"python benchmarks/qat_step.py --model {args.model} --batch {args.batch} "
            f"--size {args.size} --threads {args.threads}",
            "facts": facts,
            "table": table,
            "seconds": seconds,
            "peak_mib": memory,
        },
    )


if __name__ == "__main__":
    main()
