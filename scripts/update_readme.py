"""Puts the table of the latest main job (results/resnet18.json) between the markers of README.md.

python scripts/update_readme.py [results/resnet18.json]
"""

import json
import sys
from pathlib import Path

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def between(readme: str, begin: str, end: str, lines: list[str]) -> str:
    """The text with these lines between two markers; raises ValueError without the markers."""
    before, found_begin, rest = readme.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end:
        raise ValueError(f"README.md needs the lines {begin} and {end}")
    return before + begin + "\n" + "\n".join(lines) + "\n" + end + after


def with_results(readme: str, result: dict) -> str:
    """The text of README.md with the result's table."""
    note = result["torch_ao_left_out"]
    lines = [result["table"], "", result["facts"]]
    if note:
        lines.append(f"torch.ao.quantization is left out: {note}.")
    return between(readme, BEGIN, END, lines)


def main() -> None:
    root = Path(__file__).resolve().parents[1]
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else root / "results" / "resnet18.json"
    if not source.is_file():
        sys.exit(f"{source} is missing: run ./scripts/quickstart.sh first")
    readme = root / "README.md"
    readme.write_text(with_results(readme.read_text(), json.loads(source.read_text())))


if __name__ == "__main__":
    main()
