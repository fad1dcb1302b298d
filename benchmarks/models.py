"""Latency of whole INT8 networks at 224x224 beside FP32 and other INT8 runtimes.

    python benchmarks/models.py
    python benchmarks/models.py --models resnet18 --batch 1,32 --threads 1,2 --isa native
    python benchmarks/models.py --peers openvino --rounds 40 --layers

Each configuration (network, batch, threads) runs in a process of its own, in which all candidates
have the same random weights and images and take turns in every round, and so does a loop of the
peak's instruction. `--isa` holds every candidate to an instruction set; how, and the traps of it,
is in _machine.py, and what each really ran is in the last column. Peers take part where they are
installed: pip install onnx onnxruntime onnxscript openvino nncf torchao. Without --peers the
results are kept in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import _machine

PEERS = ("torch", "torchao", "onnxruntime", "openvino")


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    values = [int(part) for part in names(text)]
    if any(value < 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: numbers from 1 on")
    return values


def peer_names(text: str) -> list[str]:
    unknown = set(names(text)) - set(PEERS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: none of {', '.join(PEERS)}")
    return names(text)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=names, default=["resnet18", "resnet50", "mobilenet_v2"])
    parser.add_argument("--batch", type=numbers, default=[1], help="for example 1,32")
    parser.add_argument("--threads", type=numbers, default=[1], help="for example 1,2")
    parser.add_argument("--peers", type=peer_names, default=list(PEERS))
    parser.add_argument("--isa", choices=_machine.ISAS, default="avx512vnni")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument(
        "--layers", action="store_true", help="show where qtoolkit's time goes, layer by layer"
    )
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)  # of one configuration
    return parser.parse_args(words)


# --- in the process of one configuration --------------------------------------------------------


def multiply_adds(model: Any, images: Any) -> int:
    """Multiply-adds of all convolutions and linear layers in one call."""
    import torch

    total = 0

    def count(module: Any, inputs: Any, output: Any) -> None:
        nonlocal total
        weight = module.weight
        total += output.numel() * weight[0].numel()

    layers = (torch.nn.Conv2d, torch.nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, layers)]
    with torch.inference_mode():
        model(images)
    for hook in hooks:
        hook.remove()
    return total


def make_candidates(job: Any, peers: list[str]) -> tuple[list[Any], dict[str, str]]:
    """All that run, and why the others do not. One that fails is named, not fatal."""
    import _peers

    made, left_out = [], {}
    makers = [("", _peers.torch_fp32), ("", _peers.qtoolkit)]
    makers += [(peer, maker) for peer in peers for maker in _peers.MAKERS[peer]]
    for peer, maker in makers:
        try:
            for candidate in maker(job):
                candidate.run()
                made.append(candidate)
        except Exception as error:
            if not peer:
                raise
            left_out[peer] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return made, left_out


def take_turns(
    runs: dict[str, Callable[[], object]], rounds: int, seconds: float = 0.05
) -> dict[str, list[float]]:
    """Milliseconds a call, `rounds` samples of each run, of at least about `seconds` each.

    Before its sample a run waits until threads of the one before have stopped spinning (OpenMP's
    and ONNX Runtime's do so for some milliseconds), and makes a call that is not counted, unless
    calls are so long that a sample is one.
    """

    def time_of(run: Callable[[], object], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count

    calls = {name: max(1, round(seconds / time_of(run, 1))) for name, run in runs.items()}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            time.sleep(0.02)
            if calls[name] > 1:
                run()
            samples[name].append(time_of(run, calls[name]) * 1e3)
    return samples


def by_rounds(values: list[float], rounds: int) -> list[float]:
    """What the calls of `take_turns` gave, a mean for each round. The first call was its trial."""
    values = values[1:]
    calls = len(values) // rounds
    return [statistics.fmean(values[i * calls : (i + 1) * calls]) for i in range(rounds)]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One configuration, in this process."""
    if args.isa != "native":
        _machine.refuse_amx()
    import _bench
    import _peers
    import torch

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    [name], [batch], [threads] = args.models, args.batch, args.threads
    torch.set_num_threads(threads)
    model = _bench.settled_model(name, args.size)
    images = _bench.structured_images(batch, args.size, seed=1000)
    calibration = [_bench.structured_images(4, args.size, seed) for seed in range(4)]
    job = _peers.Job(model, images, calibration, threads, args.isa)
    candidates, left_out = make_candidates(job, args.peers)

    reference = torch.as_tensor(candidates[0].run()).clone()
    sqnr = {
        c.name: _bench.sqnr_db(reference, torch.as_tensor(c.run()))
        for c in candidates
        if "FP32" not in c.name
    }
    evidence = {c.name: c.evidence() for c in candidates if c.run() is not None}

    peak = _machine.load_peak()
    paths = [args.isa] if args.isa != "native" else ["avx512vnni", "amx", "avx2"]
    paths = [path for path in paths if peak(path, threads, 1e-3) > 0]
    peaks: dict[str, list[float]] = {path: [] for path in paths}

    def measure_peak(path: str) -> Callable[[], object]:
        return lambda: peaks[path].append(peak(path, threads, 0.01))

    runs = {c.name: c.run for c in candidates}
    runs |= {f"peak {path}": measure_peak(path) for path in paths}
    samples = take_turns(runs, args.rounds)
    macs = multiply_adds(model, images)
    speeds = {path: by_rounds(values, args.rounds) for path, values in peaks.items()}
    layers = {}
    if args.layers:
        layers = {c.name: [asdict(layer) for layer in c.layers()] for c in candidates if c.layers}
    return {
        **_bench.facts(),
        "isa": args.isa,
        "model": name,
        "batch": batch,
        "size": args.size,
        "rounds": args.rounds,
        "macs": macs,
        "peak_macs_per_second": {path: max(values) for path, values in speeds.items()},
        "shares_of_peak": {
            path: {
                c.name: statistics.median(
                    macs / (ms * 1e-3) / speed for ms, speed in zip(samples[c.name], values)
                )
                for c in candidates
            }
            for path, values in speeds.items()
        },
        "min_ms": {c.name: min(samples[c.name]) for c in candidates},
        "median_ms": {c.name: statistics.median(samples[c.name]) for c in candidates},
        "sqnr_db": sqnr,
        "ran": evidence,
        "left_out": left_out,
        "layers": layers,
    }


# --- in the process that the user starts --------------------------------------------------------


def run_configuration(args: argparse.Namespace, model: str, batch: int, threads: int) -> dict:
    """`measure` in a process of its own, whose environment holds its libraries."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        words = ["--models", model, "--batch", str(batch), "--threads", str(threads)]
        words += ["--peers", ",".join(args.peers), "--isa", args.isa, "--size", str(args.size)]
        words += ["--rounds", str(args.rounds), *(["--layers"] if args.layers else [])]
        environment = os.environ | _machine.environment(args.isa, threads)
        log = Path(folder) / "log"
        with log.open("w") as output:
            code = subprocess.run(
                [sys.executable, __file__, *words, "--result", str(file)],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            ).returncode
        if code != 0:
            sys.exit(f"{log.read_text()}\n{model}, batch {batch}, {threads} threads: failed")
        return json.loads(file.read_text())


def main() -> None:
    args = parse_arguments()
    if args.result:
        args.result.write_text(json.dumps(measure(args)))
        return
    import _bench
    import _models_report as report

    results = []
    for model in args.models:
        for batch in args.batch:
            for threads in args.threads:
                result = run_configuration(args, model, batch, threads)
                print(report.describe(result), report.table(result), sep="\n", flush=True)
                for form in result["layers"]:
                    print(form, report.layer_table(result, form), sep="\n", flush=True)
                _bench.write_json(
                    f"models_{args.isa}_{model}_batch{batch}_threads{threads}", result
                )
                results.append(result)
    print(report.summary(results), report.facts(results), sep="\n\n")


if __name__ == "__main__":
    main()
