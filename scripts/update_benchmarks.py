"""Writes docs/benchmarks.md, its pictures and README's table of networks from benchmarks/results.

python scripts/update_benchmarks.py
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "examples")]

import _models_report as models  # noqa: E402  (benchmarks/)
from update_readme import between  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- models: begin -->", "<!-- models: end -->"
HEAD = """# Benchmarks

Written by `python scripts/update_benchmarks.py` from [benchmarks/results](../benchmarks/results).
Everything in a table took turns in one run; compare ratios, as absolute times change from machine
to machine.
"""
SUMMARY = (
    "INT8 at 224x224 with random weights: qtoolkit's time, its speed as a share of that of a loop "
    "of its instruction on registers alone (the median over rounds, in which all take turns), and "
    "its time as a share of that of each peer's fastest form. Every row is a run of its own; what "
    "each candidate really ran is in its file."
)


def section(name: str, result: dict) -> str:
    """One result as Markdown: title, command, table, and what the numbers depend on."""
    lines = [f"## {result['title']}", "", f"`{result['command']}`", "", result["table"], ""]
    lines += [f"{note}" for note in result.get("notes", [])]
    lines += [result["facts"] + f" ({name})", ""]
    return "\n".join(lines)


def networks(results: list[dict]) -> tuple[str, dict[str, str]]:
    """The section on whole networks, and its pictures by file name."""
    lines, pictures = ["## Whole networks", "", SUMMARY, ""], {}
    for isa, held in models.HELD.items():
        some = [result for result in results if result["isa"] == isa]
        if not some:
            continue
        path = models.peak_path(some[0])
        file = f"models_{isa}.svg"
        pictures[file] = models.picture(some, f"Share of the {path} peak, {held}")
        lines += [f"### {held[0].upper()}{held[1:]}", ""]
        lines += [f"`python benchmarks/models.py --isa {isa}`", "", models.summary(some), ""]
        lines += [f"![Share of the {path} peak]({file})", ""]
        lines += [models.facts(some), ""]
    return "\n".join(lines), pictures


def split(results: dict[str, dict]) -> tuple[list[dict], dict[str, dict]]:
    """The results of benchmarks/models.py, and by file name those that bring their own table."""
    runs = [result for name, result in sorted(results.items()) if name.startswith("models_")]
    return runs, {name: result for name, result in sorted(results.items()) if "table" in result}


def document(results: dict[str, dict]) -> tuple[str, dict[str, str]]:
    """docs/benchmarks.md for the results by file name, and its pictures."""
    runs, tables = split(results)
    parts, pictures = [HEAD], {}
    if runs:
        text, pictures = networks(runs)
        parts.append(text)
    parts += [section(name, result) for name, result in tables.items()]
    return "\n".join(parts), pictures


def main() -> None:
    results = {file.name: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    text, pictures = document(results)
    docs = ROOT / "docs"
    (docs / "benchmarks.md").write_text(text)
    for name, picture in pictures.items():
        (docs / name).write_text(picture)
    held = [result for result in split(results)[0] if result["isa"] == "avx512vnni"]
    if held:
        readme = ROOT / "README.md"
        lines = [models.summary(held), "", models.facts(held) + "."]
        readme.write_text(between(readme.read_text(), BEGIN, END, lines))


if __name__ == "__main__":
    main()
