"""Writes docs/benchmarks.md from the results in benchmarks/results that hold a table.

python scripts/update_benchmarks.py
"""

import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Written by `python scripts/update_benchmarks.py` from [benchmarks/results](../benchmarks/results).
Everything in a table took turns in one run; compare ratios, as absolute times change from machine
to machine.
"""


def section(name: str, result: dict) -> str:
    """One result as Markdown: title, command, table, and what the numbers depend on."""
    lines = [f"## {result['title']}", "", f"`{result['command']}`", "", result["table"], ""]
    lines += [f"{note}" for note in result.get("notes", [])]
    lines += [result["facts"] + f" ({name})", ""]
    return "\n".join(lines)


def document(results: dict[str, dict]) -> str:
    """docs/benchmarks.md for the results by file name; those without a table are left out."""
    parts = [section(name, result) for name, result in sorted(results.items()) if "table" in result]
    return "\n".join([HEAD, *parts])


def main() -> None:
    results = {file.name: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    (ROOT / "docs" / "benchmarks.md").write_text(document(results))


if __name__ == "__main__":
    main()
