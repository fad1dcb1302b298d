"""Perplexity of a language model in every weight format, by every method, for some seeds.

    python benchmarks/llm_formats.py
    python benchmarks/llm_formats.py --seeds 0 --formats int4 int3

Runs examples/llm_int4.py, whose models are kept in the folder of --weights. Formats and seeds that
are not asked for keep the rows of the run before, where all settings are alike.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _bench import ROOT, describe, facts, write_json
from llm_int4 import FORMATS, LIMITS, METHODS
from llm_int4 import main as run_example

FILE = ROOT / "benchmarks" / "results" / "llm_formats.json"


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each format: what the perplexity rises by, and the divergence, of each seed."""
    seeds = sorted({row["seed"] for row in rows})
    lines = [
        "| format | MB | " + " | ".join(f"{method}: rise, divergence" for method in METHODS) + " |",
        "|---|---|" + "---|" * len(METHODS),
    ]
    for name in FORMATS:
        found = {(r["method"], r["seed"]): r for r in rows if r["format"] == name}
        if not found:
            continue
        cells = []
        for method in METHODS:
            some = [found[method, seed] for seed in seeds if (method, seed) in found]
            if not some:
                cells.append("")
                continue
            rises = " / ".join(f"{row['rise_percent']:+.2f} %" for row in some)
            apart = " / ".join(f"{row['divergence']:.2f}" for row in some)
            missed = any(row["within_limit"] is False for row in some)
            cells.append(f"{rises}, {apart}{' (missed)' if missed else ''}")
        size = next(iter(found.values()))["megabytes"]
        lines.append(f"| {name} | {size:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def notes(rows: list[dict[str, Any]]) -> list[str]:
    limits = {name: limit for (name, method), limit in LIMITS.items() if method == "gptq"}
    text = ", ".join(f"{name} {limit} %" for name, limit in limits.items())
    base = sorted((r for r in rows if r["format"] == "float32"), key=lambda r: r["seed"])
    bases = " / ".join(f"{r['perplexity']:.3f}" for r in base)
    several = len(base) > 1
    lines = [
        f"In float32: {base[0]['megabytes']:.2f} MB, perplexity {bases} a byte.",
        "Divergence: Kullback-Leibler, of the predictions from the float model's, in 1e-3 nats.",
        f"Asked for of AWQ and GPTQ, and of all methods at int8: a rise of at most {text}.",
    ]
    return [*lines, *(["Two numbers are of two seeds."] if several else []), ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=FORMATS, choices=FORMATS)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=600, help="of training")
    parser.add_argument("--weights", default="build/llm_formats", help="folder of trained models")
    arguments = parser.parse_args()
    folder = Path(arguments.weights)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"steps": arguments.steps}
    rows: list[dict[str, Any]] = []
    if FILE.is_file():
        kept = json.loads(FILE.read_text())
        rows = kept["rows"] if kept["settings"] == settings else []
    for seed in arguments.seeds:
        for name in arguments.formats:
            new = run_example([
                "--steps", str(arguments.steps), "--seed", str(seed), "--formats", name,
                "--methods", *arguments.methods, "--generate", "4",
                "--weights", str(folder / f"seed{seed}_steps{arguments.steps}.pt"),
            ])  # fmt: skip
            for row in new:
                row["seed"] = seed
                row.pop("tokens_per_second")  # of so few says nothing
            made = {(r["format"], r["method"], r["seed"]) for r in new}
            rows = [r for r in rows if (r["format"], r["method"], r["seed"]) not in made] + new
            known = facts()
            write_json("llm_formats", {
                **known,
                "settings": settings,
                "rows": rows,
                "title": "A language model in every weight format",
                "command": f"python benchmarks/llm_formats.py --steps {arguments.steps}",
                "table": table(rows),
                "notes": notes(rows),
                "facts": f"A byte-level transformer of 2.4 million weights, trained for "
                f"{arguments.steps} steps on Python's standard library; groups of 128. "
                f"{describe(known)}.",
            })  # fmt: skip


if __name__ == "__main__":
    main()
