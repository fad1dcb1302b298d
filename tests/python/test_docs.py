"""The Python snippets of the documents run, in order, and the README's table can be regenerated."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def snippets(document: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/workflow.md",
        "docs/saving.md",
        "docs/weight_only.md",
        "docs/migrating.md",
        "docs/algorithms.md",
    ],
)
def test_snippets_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = snippets(ROOT / name)
    assert found
    namespace: dict[str, object] = {"__name__": name}
    for index, code in enumerate(found):
        exec(compile(code, f"{name}, snippet {index + 1}", "exec"), namespace)


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", *sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))])  # fmt: skip
def test_links_lead_somewhere(document):
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)\)", path.read_text())
    missing = [link for link in links if "://" not in link and not (path.parent / link).exists()]
    assert missing == []


def test_readme_results_are_replaced_between_the_markers():
    file = ROOT / "scripts" / "update_readme.py"
    spec = importlib.util.spec_from_file_location("update_readme", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    result = {"table": "| t |", "facts": "Facts.", "torch_ao_left_out": None}
    readme = f"a\n{module.BEGIN}\nold\n{module.END}\nb\n"
    once = module.with_results(readme, result)
    assert once == f"a\n{module.BEGIN}\n| t |\n\nFacts.\n{module.END}\nb\n"
    assert module.with_results(once, result) == once
    with pytest.raises(ValueError, match="needs the lines"):
        module.with_results("no markers", result)
